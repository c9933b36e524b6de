"""How replies of stage 1 are judged: Algorithm 1 against word alignment and against `select`.

Recorded replies of a large model, faithful and flawed, and random edits of every trace; rates of
first acceptance, of false acceptance, and the length of the replies. Needs the test data
(ASAP_TEST_DATA).

    python benchmarks/stage1.py
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Callable, Sequence

from report import data_folder, read_gzip, show, traces

from asap.alignment import match_by_alignment
from asap.gestalt import match_in_order
from asap.prompts import clean_reply, parse_selection
from asap.steps import join_steps, split_steps

Judge = Callable[[Sequence[str], str], bool]
HARMLESS = ("starts with", "wraps", "merges")


def algorithm1(*, autojunk: bool) -> Judge:
    """The paper's verdict, with difflib's heuristic on (as in the authors' scripts) or off."""

    def judge(source: Sequence[str], reply: str) -> bool:
        steps = split_steps(clean_reply(reply), "paper")
        return match_in_order(source, steps, tau=0.6, autojunk=autojunk).valid

    return judge


def alignment(source: Sequence[str], reply: str) -> bool:
    """Our verdict."""
    return match_by_alignment(source, clean_reply(reply)).valid


JUDGES: dict[str, Judge] = {
    "Algorithm 1, autojunk on": algorithm1(autojunk=True),
    "Algorithm 1, autojunk off": algorithm1(autojunk=False),
    "word alignment (default)": alignment,
}


def recorded() -> None:
    """16 recorded replies to each prompt."""
    folder = data_folder()
    assert folder is not None
    sources = {trace["id"]: trace["cot"] for trace in traces()}
    replies = read_gzip(folder / "llm_replies.jsonl.gz")
    harmless = [r for r in replies if r["flaw"].startswith(HARMLESS)]
    harmful = [r for r in replies if not r["flaw"].startswith(HARMLESS)]
    rows = []
    for name, judge in JUDGES.items():

        def accepted(rows, field, judge=judge, name=name):
            split = "safe" if "default" in name else "paper"
            return sum(judge(split_steps(sources[r["id"]], split), r[field]) for r in rows)

        rows.append(
            (
                f"rewrite: {name}",
                f"{accepted(replies, 'rewrite')} of {len(replies)}",
                f"{accepted(harmless, 'flawed_rewrite')} of {len(harmless)}",
                f"{accepted(harmful, 'flawed_rewrite')} of {len(harmful)}",
                sum(len(r["rewrite"]) for r in replies),
            )
        )
    selected = [parse_selection(r["select"], len(split_steps(sources[r["id"]]))) for r in replies]
    rows.append(
        (
            "select: valid by construction",
            f"{sum(s is not None for s in selected)} of {len(replies)}",
            "-",
            "-",
            sum(len(r["select"]) for r in replies),
        )
    )
    show(
        "Recorded replies, first attempt",
        ("judge", "faithful accepted", "harmless flaw", "harmful flaw (0 wanted)", "characters"),
        rows,
    )


def random_edits() -> None:
    """Faithful cuts and unfaithful edits of every trace in the data."""
    rng = random.Random(1)
    all_traces = traces("cot_code") + traces("cot_math")
    vocabulary = [word for trace in all_traces[:80] for word in trace["cot"].split()]
    tried: dict[str, int] = {}
    accepted: dict[tuple[str, str], int] = {}
    for trace in all_traces:
        source = split_steps(trace["cot"])
        faithful = [cut(step, rng) for step in source if rng.random() < 0.45]
        long = [i for i, step in enumerate(faithful) if len(re.findall(r"\w+", step)) >= 20]
        if len(long) < 2:
            continue
        for kind, reply in edits(faithful, long, vocabulary, rng).items():
            tried[kind] = tried.get(kind, 0) + 1
            for name, judge in JUDGES.items():
                verdict = judge(source, join_steps(reply))
                accepted[kind, name] = accepted.get((kind, name), 0) + verdict
    show(
        "Random edits of every trace, share accepted",
        ("edit", "replies", *JUDGES),
        [
            (kind, count, *(f"{accepted[kind, name] / count:.1%}" for name in JUDGES))
            for kind, count in tried.items()
        ],
    )


def edits(
    faithful: list[str], long: list[int], vocabulary: list[str], rng: random.Random
) -> dict[str, list[str]]:
    """One faithful reply and its unfaithful variants."""
    first, second = sorted(rng.sample(long, 2))
    reordered = list(faithful)
    reordered[first], reordered[second] = faithful[second], faithful[first]
    invented = list(faithful)
    invented.insert(first, " ".join(rng.choice(vocabulary) for _ in range(25)))
    return {
        "faithful: sentences cut": faithful,
        "3 in 10 words replaced": [
            " ".join(rng.choice(vocabulary) if rng.random() < 0.3 else w for w in step.split(" "))
            for step in faithful
        ],
        "two paragraphs swapped": reordered,
        "one paragraph invented": invented,
        "stops inside a sentence": [join_steps(faithful)[:-12].rstrip(" .\n)`:*$!?") + " th"],
    }


def cut(step: str, rng: random.Random) -> str:
    """What models do: drop a sentence inside a paragraph, change the first capital."""
    sentences = re.split(r"(?<=[.?!]) ", step)
    if len(sentences) > 2 and rng.random() < 0.5:
        sentences.pop(rng.randrange(len(sentences)))
    step = " ".join(sentences)
    return step[0].swapcase() + step[1:] if rng.random() < 0.1 else step


if __name__ == "__main__":
    if data_folder() is None:
        sys.exit("set ASAP_TEST_DATA to the folder that holds llm_replies.jsonl.gz")
    recorded()
    random_edits()
