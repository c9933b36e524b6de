"""Benchmarks to problems: HumanEval(+), LeetCodeDataset, LiveCodeBench, MBPP+, and any data in the
form of one of them, from files or from the hub.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from pydantic import ValidationError

from asap.errors import InvalidInput, NotFound
from asap.eval_config import benchmark_of
from asap.problems import Problem
from asap_runtime.benchmark_forms import Row, read_problem, task_id_of

__all__ = ["FILES", "HUB_NAMES", "BenchmarkFolder", "Loaded", "load_benchmark", "load_files"]

_LIVE_OWN = "test*.jsonl*"
"""LiveCodeBench's own files: `test.jsonl` is release 1, `test2.jsonl` what release 2 adds."""
FILES: dict[str, tuple[str, ...]] = {
    "humaneval": ("HumanEval.jsonl*",),
    "humaneval-plus": ("HumanEvalPlus-OriginFmt*.jsonl*", "HumanEvalPlus*.jsonl*"),
    "leetcode": ("LeetCodeDataset*test*.jsonl*",),
    "livecodebench-v1-v3": ("LiveCodeBench*.jsonl*", _LIVE_OWN),
    "livecodebench-v4-v5": ("LiveCodeBench*.jsonl*", _LIVE_OWN),
    "mbpp-plus": ("MbppPlus*.jsonl*",),
}
"""What a benchmark's files are called in a directory, the best first."""
HUB_NAMES = {
    "humaneval": "openai/openai_humaneval",
    "humaneval-plus": "evalplus/humanevalplus",
    "leetcode": "newfacade/LeetCodeDataset",
}
"""Data sets of the hub, to be named with a revision: `openai/openai_humaneval@<revision>`."""
_PINNED = {
    "1d49078ba3e2b196b9344535bef34a43021f038fad9561d6ee7c53450609a6a2": "HumanEval",
    "04228b8a570ff7c346c740b91f0c6a0b323f86a26e903db8477c6f2d10f38819": "HumanEval+ v0.1.10",
    "42526ec0e7d5f3ee0b06d6ced98f8c8bae3d76519151bfb3d36f79010645bd7f": "HumanEval+ v0.1.10",
    "b54e762755248ca411b523c917fa9f93c07b5ff2966bf60b3917b853926a3dad": "MBPP+ v0.2.0",
    "9d7d787d412f86cb4744050c373d91d078435adfac0d4a34dee07effb8a11725": "LeetCodeDataset v0.3.1, "
    "168 of 228",
    "0145bea3a7af23671b50a6cb59c6c55a3461c53f9e48eff67d2cfdac88640327": "LiveCodeBench v1 to v6, "
    "public tests",
}
"""SHA-256 of the lines to the version of the data."""
_ENDINGS = (".jsonl", ".jsonl.gz")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_BLOCK = 2**20
_RELEASES = {
    "livecodebench-v1-v3": frozenset({"v1", "v2", "v3"}),
    "livecodebench-v4-v5": frozenset({"v4", "v5"}),
}
"""release_v3 (612 tasks) and what release_v5 (880) adds. Contest dates cannot tell them apart:
those of v4 begin before those of v1 end.
"""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A benchmark's problems, in the order of the file, and where they come from."""

    name: str
    problems: tuple[Problem, ...]
    source: str
    sha256: str
    """Of the lines of the files; of the records' canonical JSON for a data set of the hub."""
    version: str | None
    """None when the content is none that is known."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Task id to why it cannot be graded."""

    @property
    def whole(self) -> bool:
        """Whether all tasks of the benchmark are there."""
        return len(self.problems) == benchmark_of(self.name).tasks


def load_benchmark(name: str, source: str) -> Loaded:
    """The problems of benchmark `name` from a directory, a file (.jsonl, .jsonl.gz) or a data set
    of the hub at a revision (`owner/name@revision`, split `test`).

    Raises NotFound when nothing is there, InvalidInput for a record of no known form, for a task
    given twice, and for more tasks than the benchmark has.
    """
    if Path(source).exists():
        return load_files(name, Path(source))
    rows, sha256 = _from_hub(source)
    return _loaded(name, rows, source, sha256)


def load_files(name: str, source: Path, beat: Callable[[], None] = lambda: None) -> Loaded:
    """As `load_benchmark`, from a directory or a file alone. `beat` is called again and again: it
    may end the work by an exception.
    """
    rows, sha256 = _from_files(_files(name, source), beat)
    return _loaded(name, rows, str(source), sha256)


class BenchmarkFolder:
    """The benchmarks that a server offers: files in one folder, and nothing from elsewhere.

    A benchmark is a row of `BENCHMARKS`, or the name of a file in the folder, with or without its
    ending. Blocking.

    Args:
        folder: None: there are none.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = None if folder is None else folder.expanduser()

    def check(self, name: str) -> None:
        """Raise InvalidInput unless there is a file of that benchmark. Reads nothing."""
        self._source(name)

    def load(self, name: str, beat: Callable[[], None] = lambda: None) -> Loaded:
        """As `load_files`. Raises InvalidInput as `check` does."""
        return load_files(name, self._source(name), beat)

    def _source(self, name: str) -> Path:
        if self._folder is None:
            raise InvalidInput("this server has no benchmarks: ASAP_BENCHMARKS names no folder")
        if not _NAME.fullmatch(name):
            raise InvalidInput("a benchmark is a plain name: letters, digits, '.', '_' and '-'")
        file = self._folder / name
        if name.endswith(_ENDINGS) and file.is_file():
            return file
        try:
            _files(name, self._folder)
        except NotFound:
            raise InvalidInput(f"this server has no file of benchmark {name!r}") from None
        return self._folder


def _loaded(name: str, rows: Iterable[Row], source: str, sha256: str) -> Loaded:
    releases = _RELEASES.get(name)
    problems: dict[str, Problem] = {}
    skipped: dict[str, str] = {}
    for number, row in enumerate(rows, start=1):
        if releases is not None and row.get("release") not in releases:
            continue
        problem = _read(name, row, number)
        if isinstance(problem, str):
            skipped[task_id_of(row)] = problem
        elif problem.task_id in problems:
            raise InvalidInput(
                f"the data of {name!r} holds task {problem.task_id!r} twice", line=number
            )
        else:
            problems[problem.task_id] = problem
    if not problems:
        raise NotFound(f"the data of {name!r} holds no task of it")
    tasks = benchmark_of(name).tasks
    if tasks is not None and len(problems) > tasks:
        raise InvalidInput(f"the data holds {len(problems)} tasks; {name!r} has {tasks}")
    return Loaded(name, tuple(problems.values()), source, sha256, _PINNED.get(sha256), skipped)


def _read(name: str, row: Row, number: int) -> Problem | str:
    try:
        return read_problem(name, row)
    except InvalidInput as error:
        raise InvalidInput(f"record {number}: {error.detail}", line=number) from None
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise InvalidInput(f"record {number} is no problem: {reason}", line=number) from None
    except (KeyError, TypeError, ValueError, SyntaxError, AttributeError, IndexError) as error:
        reason = f"{type(error).__name__} in its fields"
        raise InvalidInput(f"record {number} is no problem: {reason}", line=number) from error


def _files(name: str, source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    for pattern in FILES.get(name, (f"{name}.jsonl*",)):
        if found := sorted(source.glob(pattern)):
            return found if pattern == _LIVE_OWN else found[:1]
    raise NotFound(f"{str(source)!r} holds no file of {name!r}")


def _from_files(paths: list[Path], beat: Callable[[], None]) -> tuple[Iterator[Row], str]:
    digest = hashlib.sha256()
    for path in paths:
        with _open(path) as stream:
            while block := stream.read(_BLOCK):
                digest.update(block)
                beat()
    return (row for path in paths for row in _rows(path, beat)), digest.hexdigest()


def _rows(path: Path, beat: Callable[[], None]) -> Iterator[Row]:
    own = re.match(r"test(\d*)\.jsonl", path.name)
    release = {"release": f"v{own[1] or 1}"} if own else {}
    with _open(path) as stream:
        for number, line in enumerate(stream, start=1):
            beat()
            # Not the strict reader of user data: MBPP+ has infinities among its inputs.
            try:
                row = json.loads(line)
            except ValueError as error:
                reason = f"{path.name}, line {number}: not JSON: {error}"
                raise InvalidInput(reason, line=number) from None
            if not isinstance(row, dict):
                raise InvalidInput(f"{path.name}, line {number}: not a JSON object", line=number)
            yield {**release, **row}


def _open(path: Path) -> BinaryIO | gzip.GzipFile:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def _from_hub(source: str) -> tuple[Iterable[Row], str]:
    name, _, revision = source.partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise NotFound(f"there is no file or directory {source!r}")
    if not revision:
        raise InvalidInput(
            f"name the revision of data set {name!r}, as in '{name}@<revision>': what it holds may "
            "change",
            code="unpinned-data-set",
        )
    try:
        import datasets
    except ImportError as error:
        raise NotFound(f"reading {name!r} needs the extra 'hub' (package datasets)") from error
    try:
        rows: list[Row] = list(datasets.load_dataset(name, split="test", revision=revision))
    except Exception as error:  # the library raises its own, the hub client's and network errors
        reason = str(error).strip().splitlines()[0]
        raise NotFound(f"data set {source!r} cannot be loaded: {reason}") from error
    digest = hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode())
    return rows, digest.hexdigest()
