"""Records in the forms of the public data, made here; what they hold is ours."""

from __future__ import annotations

import base64
import gzip
import json
import pickle
import zlib

import pytest

from asap.errors import InvalidInput, NotFound
from asap.eval_config import BENCHMARKS
from asap.extraction import build_program
from asap_runtime.benchmarks import BenchmarkFolder, load_benchmark, load_files

PROMPT = 'import math\nfrom typing import List\n\n\ndef root(x: List[int]):\n    """ sqrt """\n'
HUMAN = {
    "task_id": "HumanEval/0",
    "prompt": PROMPT,
    "entry_point": "root",
    "canonical_solution": "    return [math.sqrt(v) for v in x]\n",
    "test": "def check(candidate):\n    assert candidate([4]) == [2.0]\n",
}
NATIVE = HUMAN | {"contract": "", "base_input": [[[4, 9]]], "plus_input": [[[]]], "atol": 0}
MBPP = {
    "task_id": "Mbpp/2",
    "prompt": '"""\nThe shared elements.\n"""\n',
    "entry_point": "similar_elements",
    "canonical_solution": "\ndef similar_elements(a, b):\n    return tuple(set(a) & set(b))\n",
    "base_input": [[[3, 4], [4, 5]]],
    "plus_input": {},
    "atol": 0,
    "contract": "",
    "assertion": "assert set(similar_elements((3, 4), (4, 5))) == set((4,))",
}
LEET = {
    "task_id": "two-sum",
    "problem_description": "Add {both}.",
    "starter_code": "class Solution:\n    def add(self, a: int, b: int) -> int:\n        ",
    "prompt": "from typing import *\n\ninf = float('inf')\n",
    "completion": "class Solution:\n    def add(self, a, b):\n        return a + b\n",
    "entry_point": "Solution().add",
    "test": "def check(candidate):\n    assert candidate(a = 1, b = 2) == 3\n",
    "response": "SECRET",
}
LIVE = {
    "question_id": "abc001_a",
    "question_content": "Print the sum.",
    "starter_code": "",
    "public_test_cases": [{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}],
    "release": "v1",
}
LIVE_CALL = LIVE | {
    "question_id": "2001",
    "starter_code": LEET["starter_code"],
    "public_test_cases": json.dumps(
        [{"input": '[1, "a"]\n2', "output": "[3]", "testtype": "functional"}]
    ),
    "release": "v3",
}
START = "You will be given a competitive programming problem.\n"


def write(folder, name, *rows):
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (folder / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    return str(folder)


def runs(problem):
    """Whether the reference passes the problem's own tests, all in this process: both are ours."""
    space = {}
    exec(build_program(problem, problem.reference), space)
    function = eval(problem.entry_point, space)
    exec(problem.test, space)
    space["check"](function)
    return function


def only(name, source):
    (problem,) = load_benchmark(name, source).problems
    return problem


def test_humaneval_asks_as_the_authors_do(tmp_path):
    problem = only("humaneval", write(tmp_path, "HumanEval.jsonl.gz", HUMAN))
    assert problem.prompt == (
        START + "Please continue to complete the function. You are not allowed to modify the given "
        "code and do the completion only. Please return all completed function in a code block. "
        f"Here is the given code to do completion:\n```python\n{PROMPT}\n```"
    )
    assert problem.imports == ("import math", "from typing import List")
    assert (problem.kind, problem.time_limit_s) == ("asserts", 3)
    runs(problem)


def test_humaneval_plus_in_both_forms_asks_the_same_question(tmp_path):
    write(tmp_path, "HumanEvalPlus.jsonl.gz", NATIVE)
    native = only("humaneval-plus", str(tmp_path))
    write(tmp_path, "HumanEvalPlus-OriginFmt.jsonl.gz", HUMAN)
    original = only("humaneval-plus", str(tmp_path))
    assert native.prompt == original.prompt
    assert (native.time_limit_s, original.time_limit_s) == (6, 3)
    assert original.test == HUMAN["test"]
    runs(native)


def test_mbpp_plus_compares_with_the_reference(tmp_path):
    problem = only("mbpp-plus", write(tmp_path, "MbppPlus.jsonl", MBPP))
    assert "The shared elements." in problem.prompt
    runs(problem)


def test_leetcode_asks_as_the_authors_do_and_hides_the_answer(tmp_path):
    problem = only("leetcode", write(tmp_path, "LeetCodeDataset-v0.3.1-test.jsonl", LEET))
    assert problem.prompt == (
        START + "Add {both}.\n\nYou will use the following starter code to write the solution to "
        "the problem and enclose your code within delimiters.\n```python\n"
        f"{LEET['starter_code']}\n```"
    )
    assert problem.prelude == LEET["prompt"]
    assert "SECRET" not in problem.model_dump_json()
    assert runs(problem)(2, 3) == 5


def test_livecodebench_asks_as_its_own_runner_does(tmp_path):
    source = write(tmp_path, "LiveCodeBench.jsonl", LIVE, LIVE_CALL, LIVE | {"release": "v4"})
    stdin, call = load_benchmark("livecodebench-v1-v3", source).problems
    question = (
        "You will be given a question (problem specification) and will generate a correct Python "
        "program that matches the specification and passes all tests.\n\n"
        "Question: Print the sum.\n\n"
    )
    assert stdin.prompt.startswith(question + "Read the inputs from stdin solve the problem and")
    assert stdin.prompt.endswith("writes output to STDOUT.\n```python\n# YOUR CODE HERE\n```")
    assert call.prompt.startswith(question + "You will use the following starter code to write")
    assert [(case.input, case.output) for case in stdin.streams] == [("1 2\n", "3\n")]
    assert [(case.args, case.expected) for case in call.calls] == [(([1, "a"], 2), [3])]
    assert (stdin.entry_point, call.entry_point) == (None, "Solution().add")
    assert stdin.time_limit_s == 6
    exec(compile(call.prelude + "\n" + LEET["completion"], "program", "exec"), {})


def test_livecodebenchs_releases_are_told_apart(tmp_path):
    rows = [LIVE | {"question_id": f"q{n}", "release": f"v{n}"} for n in range(1, 7)]
    source = write(tmp_path, "LiveCodeBench.jsonl", *rows)
    for name, tasks in (("v1-v3", ["q1", "q2", "q3"]), ("v4-v5", ["q4", "q5"])):
        loaded = load_benchmark(f"livecodebench-{name}", source)
        assert [problem.task_id for problem in loaded.problems] == tasks
        assert not loaded.whole


def test_livecodebenchs_own_files_name_their_release(tmp_path):
    own = {key: value for key, value in LIVE.items() if key != "release"}
    hidden = [{"input": "5 5\n", "output": "10\n", "testtype": "stdin"}]
    packed = base64.b64encode(zlib.compress(pickle.dumps(json.dumps(hidden)))).decode()
    write(tmp_path, "test.jsonl", own | {"private_test_cases": packed})
    write(tmp_path, "test4.jsonl", own | {"question_id": "late", "private_test_cases": ""})
    early, late = (only(f"livecodebench-{name}", str(tmp_path)) for name in ("v1-v3", "v4-v5"))
    assert (early.task_id, late.task_id) == ("abc001_a", "late")
    assert [case.output for case in early.streams] == ["3\n", "10\n"]


def test_private_tests_that_would_run_code_are_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (print, ("ran",))

    packed = base64.b64encode(zlib.compress(pickle.dumps(Bomb()))).decode()
    source = write(tmp_path, "LiveCodeBench.jsonl", LIVE | {"private_test_cases": packed})
    with pytest.raises(InvalidInput, match=r"record 1: the private tests ask for builtins\.print"):
        load_benchmark("livecodebench-v1-v3", source)


def test_a_task_without_tests_is_skipped_and_said(tmp_path):
    bare = LIVE | {"question_id": "bare", "public_test_cases": []}
    loaded = load_benchmark(
        "livecodebench-v1-v3", write(tmp_path, "LiveCodeBench.jsonl", LIVE, bare)
    )
    assert loaded.skipped == {"bare": "no tests"}
    assert len(loaded.problems) == 1


def test_the_hash_is_of_the_lines_packed_or_not(tmp_path):
    (tmp_path / "a").mkdir()
    plain = load_benchmark("humaneval", write(tmp_path, "HumanEval.jsonl", HUMAN))
    packed = load_benchmark("humaneval", write(tmp_path / "a", "HumanEval.jsonl.gz", HUMAN))
    assert plain.sha256 == packed.sha256
    assert plain.version is None
    assert plain.problems == packed.problems


def test_the_callers_own_data_in_a_known_form(tmp_path):
    loaded = load_benchmark("mine", write(tmp_path, "mine.jsonl", HUMAN, HUMAN | {"task_id": "b"}))
    assert [(p.benchmark, p.task_id) for p in loaded.problems] == [
        ("mine", "HumanEval/0"),
        ("mine", "b"),
    ]
    assert load_benchmark("mine", str(tmp_path / "mine.jsonl")).problems == loaded.problems


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([HUMAN, HUMAN], "holds task 'HumanEval/0' twice"),
        ([{"question": "?"}], "record 1: the record has no known form"),
        (
            [HUMAN | {"test": ""}],
            "record 1 is no problem: Value error, a problem of kind 'asserts'",
        ),
        ([HUMAN | {"prompt": None}], "record 1 is no problem: AttributeError|TypeError"),
        ([HUMAN | {"task_id": f"{n}"} for n in range(165)], "holds 165 tasks; 'humaneval' has 164"),
        ([[1]], "line 1: not a JSON object"),
    ],
)
def test_what_is_no_benchmark_is_refused(tmp_path, rows, message):
    with pytest.raises(InvalidInput, match=message):
        load_benchmark("humaneval", write(tmp_path, "HumanEval.jsonl", *rows))


def test_a_whole_benchmark_is_known_as_such(tmp_path):
    rows = [HUMAN | {"task_id": str(n)} for n in range(BENCHMARKS["humaneval"].tasks)]
    assert load_benchmark("humaneval", write(tmp_path, "HumanEval.jsonl", *rows)).whole


def test_nothing_there_is_not_found(tmp_path):
    (tmp_path / "HumanEval.jsonl").write_text("")
    for source in (str(tmp_path), str(tmp_path / "none"), "/no/such/folder"):
        with pytest.raises(NotFound):
            load_benchmark("humaneval", source)
    with pytest.raises(NotFound, match="no file of 'leetcode'"):
        load_benchmark("leetcode", str(tmp_path))


def test_a_data_set_of_the_hub_needs_its_revision():
    with pytest.raises(InvalidInput, match="name the revision") as raised:
        load_benchmark("humaneval", "openai/openai_humaneval")
    assert raised.value.problem_code == "unpinned-data-set"


def test_a_data_set_of_the_hub_is_read_through_its_client(tmp_path, monkeypatch):
    """The client reads a directory like a data set of the hub, apart from the download."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets = pytest.importorskip("datasets")
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").mkdir()
    write(tmp_path / "owner" / "name", "test.jsonl", HUMAN)
    assert datasets.load_dataset("owner/name", split="test").num_rows == 1
    loaded = load_benchmark("humaneval", "owner/name@main")
    assert loaded.problems[0].test == HUMAN["test"]
    assert (loaded.source, loaded.version) == ("owner/name@main", None)


def test_a_folder_offers_its_files_by_plain_names(tmp_path):
    write(tmp_path, "HumanEval.jsonl.gz", HUMAN)
    write(tmp_path, "mine.jsonl", HUMAN | {"task_id": "m"})
    folder = BenchmarkFolder(tmp_path)
    for name, benchmark, task in (
        ("humaneval", "humaneval", "HumanEval/0"),
        ("mine", "mine", "m"),
        ("mine.jsonl", "mine.jsonl", "m"),
        ("HumanEval.jsonl.gz", "HumanEval.jsonl.gz", "HumanEval/0"),
    ):
        folder.check(name)
        loaded = folder.load(name)
        [problem] = loaded.problems
        assert (loaded.name, problem.benchmark, problem.task_id) == (name, benchmark, task)


@pytest.mark.parametrize(
    "name",
    [
        "leetcode",
        "gone",
        "../mine",
        "/mine",
        "..",
        "",
        "*",
        "min?",
        "m[i]ne",
        "a/mine",
        "owner/x@v",
    ],
)
def test_a_folder_offers_nothing_else(tmp_path, name):
    (tmp_path / "in").mkdir()
    write(tmp_path, "mine.jsonl", HUMAN)
    write(tmp_path / "in", "other.jsonl", HUMAN)
    for folder in (tmp_path / "in", tmp_path / "none", None):
        for refused in (BenchmarkFolder(folder).check, BenchmarkFolder(folder).load):
            with pytest.raises(InvalidInput) as raised:
                refused(name)
            assert str(tmp_path) not in raised.value.detail


def test_loading_can_be_ended(tmp_path):
    class Enough(Exception):
        pass

    def beat():
        nonlocal left
        left -= 1
        if not left:
            raise Enough

    rows = [HUMAN | {"task_id": str(n)} for n in range(100)]
    write(tmp_path, "mine.jsonl", *rows)
    left = 1000
    load_files("mine", tmp_path, beat)
    assert left == 1000 - 101, "for each line, and each MiB that is hashed"
    left = 50
    with pytest.raises(Enough):
        load_files("mine", tmp_path, beat)
