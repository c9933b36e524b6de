from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from asap.metrics import Result
from asap.report import build_report
from asap_evaluator.plots import make_plot, ticks
from asap_evaluator.report_html import render_html

EVIL = "</pre></details><script>alert(1)</script><img src=x onerror=alert(2)> & \ud800"
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails on tags that do not nest."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def results(solved, tokens, tasks=12, budgets=(1024, 2048)):
    return [
        Result(
            benchmark="humaneval",
            task_id=f"HumanEval/{task}",
            budget=budget,
            number=0,
            extraction="strict",
            verdict="passed" if task < solved else "wrong",
            tokens=tokens + task,
            truncated=False,
            loop=False,
            flags=(),
            started_at=0.0,
            seconds=1.0,
        )
        for budget in budgets
        for task in range(tasks)
    ]


def page(texts=None, **options):
    given = {"<b>ours</b>": results(8, 100), "Original": results(6, 300)}
    report = build_report(given, candidate="<b>ours</b>", provenance={"note": "<script>"})
    return render_html(report, texts, **options)


def completions(text):
    return {
        (model, "humaneval", f"HumanEval/{task}", budget, 0): f"{model} {task} {text}"
        for model in ("<b>ours</b>", "Original")
        for task in range(12)
        for budget in (1024, 2048)
    }


def test_the_page_needs_nothing_and_runs_nothing():
    parsed = Page(page(completions(EVIL)))
    assert not {"script", "img", "link", "iframe", "object"} & set(parsed.tags)
    loading = {"src", "href", "srcset", "data", "action", "poster", "background"}
    links = [value for _, name, value in parsed.attributes if name in loading]
    assert links
    assert all(value.startswith("#c") for value in links)
    assert not [name for _, name, _ in parsed.attributes if name.startswith("on")]
    policy = [value for _, name, value in parsed.attributes if name == "content"]
    assert any(value.startswith("default-src 'none'") for value in policy)
    assert "url(" not in page()
    assert "@import" not in page()


def test_completions_stand_escaped_behind_their_links():
    text = page(completions(EVIL))
    parsed = Page(text)
    # Two tasks differ at each of two budgets; each shows both completions.
    assert parsed.tags.count("details") == 8
    words = "".join(parsed.words)
    assert words.count("<script>alert(1)</script>") == 8
    assert "Original 6 </pre></details>" in words
    targets = {value for _, name, value in parsed.attributes if name == "id"}
    links = {value[1:] for _, name, value in parsed.attributes if name == "href"}
    assert links == targets
    assert text.encode()  # half surrogates are gone


def test_tasks_without_completions_are_listed_without_links():
    parsed = Page(page())
    assert "HumanEval/6" in "".join(parsed.words)
    assert {"a", "details"}.isdisjoint(parsed.tags)


def test_the_page_has_both_plots_the_tests_and_the_papers_table():
    parsed = Page(page())
    words = "".join(parsed.words)
    assert (parsed.tags.count("svg"), parsed.tags.count("polyline")) == (2, 4)
    assert parsed.tags.count("circle") == 8
    for text in ("McNemar p", "Incomplete.", "12 of 164 tasks", "As the paper prints it", "84.15"):
        assert text in words
    assert "<b>ours</b>" in words


def test_the_page_has_times_of_tokens_and_chances_of_several_tries():
    tries = [
        replace(r, number=n, ttft_s=0.5, tokens=11, verdict="passed" if n == 0 else "wrong")
        for r in results(12, 0, budgets=(1024,))
        for n in range(5)
    ]
    words = " ".join(Page(render_html(build_report({"ours": tries}))).words)
    assert "first token p50 s" in words
    assert "per token p50 ms" in words
    assert "0.50 0.50 50.00 50.00 5: 100.00" in words


def test_equal_reports_give_equal_pages():
    shuffled = {"Original": results(6, 300)[::-1], "<b>ours</b>": results(8, 100)[::-1]}
    report = build_report(shuffled, candidate="<b>ours</b>", provenance={"note": "<script>"})
    texts = dict(reversed(completions("x").items()))
    assert render_html(report, texts) == page(completions("x"))


def test_more_differences_than_a_page_holds_are_counted():
    many = {
        name: [
            Result(**{f: getattr(r, f) for f in Result.__slots__} | {"benchmark": "own"})
            for r in results(solved, 1, tasks=300, budgets=(8,))
        ]
        for name, solved in (("a", 300), ("b", 0))
    }
    words = "".join(Page(render_html(build_report(many, candidate="a"))).words)
    assert "100 more are in the JSON report" in words


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 100], [0, 20, 40, 60, 80, 100]),
        ([946, 3051], [500, 1000, 1500, 2000, 2500, 3000, 3500]),
        ([50], [50, 60]),
        ([0, 0], [0, 0.25]),
        ([25.0, 84.15], [20, 30, 40, 50, 60, 70, 80, 90]),
    ],
)
def test_ticks_are_round_and_hold_the_values(values, expected):
    found = ticks(values)
    assert found[0] <= min(values)
    assert found[-1] >= max(values)
    assert len(found) >= 2
    if len(set(values)) > 1:
        assert found == expected


def test_points_lie_inside_the_plot_and_higher_is_up():
    plot = make_plot("t", "x", "y", [("a", [(1, 10, ""), (5, 90, "")]), ("b", [(3, 50, "")])])
    (low, high), (middle,) = (line.points for line in plot.lines)
    assert plot.left <= low[0] < middle[0] < high[0] <= plot.right
    assert plot.top <= high[1] < middle[1] < low[1] <= plot.bottom
    assert plot.lines[0].colour != plot.lines[1].colour


def test_the_drawings_are_well_formed():
    text = page()
    drawings = text.split("<svg")[1:]
    for drawing in drawings:
        ElementTree.fromstring("<svg" + drawing.split("</svg>")[0] + "</svg>")
