"""`asap eval run` and `asap eval grade`: an evaluation on this machine, without a server.

The items are those of a server, and so are the two stages that they go through. What they come to
is appended to the folder's file at each step: the same command goes on where a killed one stopped.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from asap.errors import InvalidInput
from asap.eval_config import EvalConfig
from asap.eval_items import EvalItem
from asap_cli.completions import Completions
from asap_cli.eval_folder import EvalFolder, is_done, read_report, task_of, write_reports
from asap_cli.eval_reports import page_of, report_of
from asap_cli.eval_steps import Steps
from asap_cli.eval_views import report_table
from asap_cli.model_fetch import ENDINGS, manifest_of
from asap_cli.roles import AllSettings
from asap_cli.server_commands import DATA_ERROR, print_table, say
from asap_evaluator.stage import GenerateStage, GradeStage
from asap_runtime.benchmarks import BenchmarkFolder
from asap_runtime.blobs import open_blobs
from asap_runtime.evaluations import evaluation_items
from asap_runtime.host import open_database
from asap_runtime.intake import StoredEvaluation
from asap_runtime.logs import configure_logs
from asap_runtime.models import ModelRegistry, parse_reference
from asap_runtime.problems import INTERRUPTED
from asap_runtime.settings import load_settings
from asap_runtime.takings import Taking

__all__ = ["EvalOptions", "run_eval", "run_grade"]

TENANT = "local"


@dataclass(frozen=True, slots=True)
class EvalOptions:
    """One command."""

    model: str
    """Hub name, directory or `name@version`; of existing completions any name."""
    config: EvalConfig
    out: Path
    data: Path | None = None
    """Folder with the benchmarks' files; default: that of the settings."""
    base_url: str | None = None
    served_model: str | None = None
    samples: Path | None = None
    """Completions that are there already; else the model is asked."""


def run_eval(options: EvalOptions) -> int:
    """Ask the model, grade, and write the reports. Returns the exit code."""
    settings = _settings(options)
    source, label, identity = _model(settings, options.model)
    with EvalFolder(options.out) as folder:
        items = _items(settings, options, source, identity, folder)
        generate = GenerateStage(settings, blobs=open_blobs(settings))
        grade = GradeStage(settings, blobs=folder.blobs)
        engine = options.base_url or f"vLLM {_version('vllm')}"
        steps = Steps(folder, (generate, grade))
        return _finished(folder, items, label, steps, grade, {"engine": engine})


def run_grade(options: EvalOptions) -> int:
    """Grade completions that are there already, and write the reports. Returns the exit code."""
    assert options.samples is not None, "the command asks for it"
    settings = _settings(options)
    completions = Completions.read(options.samples)
    with EvalFolder(options.out) as folder:
        source = StoredEvaluation(options.model, None, None)
        items = _items(settings, options, source, completions.sha256, folder)
        filled = [item for item in map(completions.fill, items) if item.samples]
        if beside := completions.beside(items):
            say(
                f"left out: {len(beside):,} tasks of {completions.name!r} that are not among those "
                f"asked for, such as {beside[0]!r}"
            )
        grade = GradeStage(settings, blobs=folder.blobs)
        return _finished(folder, filled, options.model, Steps(folder, (grade,)), grade, {})


def _settings(options: EvalOptions) -> AllSettings:
    given: dict[str, Any] = {}
    if options.base_url is not None:
        given = {
            "base_url": options.base_url,
            "served_model": options.served_model or options.model,
        }
    if Path(options.model).expanduser().is_dir():
        given["models"] = Path(options.model).expanduser().resolve()
    settings = load_settings(AllSettings, evaluator=given) if given else load_settings(AllSettings)
    configure_logs(settings.telemetry.model_copy(update={"log_level": "warning"}))
    return settings


def _model(settings: AllSettings, model: str) -> tuple[StoredEvaluation, str, str]:
    """What the items name, what the report calls it, and what tells it from its namesakes."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        files = sorted(path for path in folder.iterdir() if path.name.endswith(ENDINGS))
        sha256 = hashlib.sha256(manifest_of(folder, files)).hexdigest()
        return StoredEvaluation(str(folder.resolve()), None, None), folder.resolve().name, sha256
    reference = parse_reference(model)
    if reference is None:
        return StoredEvaluation(model, None, None), model, model
    database = open_database(settings)
    try:
        found = ModelRegistry(database).get(TENANT, *reference)
    finally:
        database.close()
    source = StoredEvaluation(found.reference, found.prefix, found.manifest_sha256)
    return source, found.reference, found.manifest_sha256


def _version(package: str) -> str:
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return "of unknown version"


def _items(
    settings: AllSettings,
    options: EvalOptions,
    source: StoredEvaluation,
    identity: str,
    folder: EvalFolder,
) -> list[EvalItem]:
    """All tasks of the run as they stand. Raises InvalidInput when the folder is another run's."""
    facts = [options.config.hash(), source.model, identity]
    run_id = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
    known = {task_of(item): item for item in folder.items()}
    if any(item.id != run_id for item in known.values()):
        raise InvalidInput(
            f"{str(folder.path)!r} holds another evaluation: of another model, or with another "
            "configuration; name another folder"
        )
    taking = Taking(
        job_id=run_id,
        tenant=TENANT,
        config=options.config.model_dump(mode="json"),
        priority=0,
        source=source,
        lease=0,
        line=0,
        items=0,
        bad=0,
    )
    first = next(iter(known.values()), None)
    benchmarks = BenchmarkFolder(options.data or settings.benchmarks)
    asked = evaluation_items(
        benchmarks,
        folder.blobs,
        taking,
        source,
        None if first is None else first.model_dump_json().encode(),
        lambda: None,
    )
    items = [EvalItem.model_validate_json(new.payload or b"") for new in asked]
    return [known.get(task_of(item), item) for item in items]


def _finished(
    folder: EvalFolder,
    items: Sequence[EvalItem],
    label: str,
    steps: Steps,
    grade: GradeStage,
    facts: dict[str, JsonValue],
) -> int:
    """Take the steps that are missing, and tell of it; also of what is done when it was stopped.
    The exit code.
    """
    written, stopped = read_report(folder.path), False
    todo = [item for item in items if not is_done(item, asked=len(steps.stages) > 1)]
    if written is not None and not todo:
        print_table(report_table(written))
        say(f"all {len(items):,} questions were done before; the reports are in {folder.path}")
        return 0
    say(f"{len(items):,} questions, {len(items) - len(todo):,} of them done before")
    try:
        asyncio.run(steps.follow(todo, grade, facts))
    except (KeyboardInterrupt, asyncio.CancelledError):
        stopped = True
    finally:
        done = list(folder.items())
        if done:
            report = report_of(done, label, facts=facts)
            write_reports(folder.path, report, page_of(report, {}))
    if done:
        print_table(report_table(report))
    for code, sentences in steps.problems.items():
        say(f"{len(sentences):,} × {code}, first of {sentences[0]}")
    if stopped:
        say("stopped; the same command goes on from here")
        return INTERRUPTED
    say(f"items.jsonl, report.json, report.md and report.html are in {folder.path}")
    return DATA_ERROR if steps.problems else 0
