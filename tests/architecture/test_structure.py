"""Rules of the tree that no linter knows: sizes, public names, a test file for each module."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent.parent
PACKAGES = {
    "core/asap": "tests/core",
    "core/asap_runtime": "tests/runtime",
    "gateway/asap_gateway": "tests/gateway",
    "gateway/asap_gateway/live": "tests/gateway/live",
    "services/anchor/asap_anchor": "tests/services/anchor",
    "services/surprisal/asap_surprisal": "tests/services/surprisal",
    "services/trainer/asap_trainer": "tests/services/trainer",
    "services/evaluator/asap_evaluator": "tests/services/evaluator",
    "cli/asap_cli": "tests/cli",
}
MODULES = [path for package in PACKAGES for path in sorted((REPOSITORY / package).glob("*.py"))]
# Tested through the module that calls them; a file of their own would repeat its tests.
THROUGH = {
    "errors": "test_problems",
    "ports": "test_coarse",
    "batching": "test_scorer", "forward": "test_scorer", "loading": "test_loading",
    "model_files": "test_loading", "sequence": "test_scorer", "tokenization": "test_scorer",
    "engines": "test_prune", "input": "test_prune", "options": "test_prune",
    "progress": "test_prune", "report": "test_prune", "main": "test_prune",
    "host": "test_stage", "finisher": "test_stage", "brokers": "test_queue",
    "views": "test_ledger", "takings": "test_ingest",
    "service": "test_jobs", "events": "test_jobs", "body_limit": "test_jobs",
    "multipart": "test_upload", "json_body": "test_upload", "operations": "test_app",
    "preparation": "test_scorer",
    "description": "test_examples",
    "roles": "test_serve",
    "isolation": "test_process", "plots": "test_report_html",
    "report_markdown": "test_report", "paper_tables": "test_tables",
    "benchmark_forms": "test_benchmarks", "exchange": "test_proxy",
    "evaluation_schemas": "test_schemas", "logs": "test_telemetry",
    "background_jobs": "test_training",
    "completions": "test_evaluate", "eval_commands": "test_evaluate",
    "eval_compare": "test_evaluate", "eval_folder": "test_evaluate",
    "eval_reports": "test_evaluate", "eval_steps": "test_evaluate",
    "deploy_command": "test_deploy", "serving_manifest": "test_deploy",
    "model_fetch": "test_models", "models_client": "test_models",
    "server_client": "test_client", "server_commands": "test_jobs",
}  # fmt: skip


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_modules_stay_small(path):
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_every_module_has_its_test_file(path):
    if path.stem in ("__init__", "__main__"):
        return
    folder = PACKAGES[str(path.parent.relative_to(REPOSITORY))]
    name = THROUGH.get(path.stem, f"test_{path.stem}")
    assert list((REPOSITORY / "tests").rglob(f"{name}.py")), f"{folder}/{name}.py is missing"


def test_names_say_an_idea():
    banned = {"utils", "common", "helpers", "misc", "base", "manager"}
    assert not [path for path in MODULES if path.stem in banned]


@pytest.mark.parametrize("module", ["asap"])
def test_the_public_list_is_sorted_and_importable(module):
    public = importlib.import_module(module)
    order = sorted(public.__all__, key=lambda name: (not name.isupper(), name[0].islower(), name))
    assert order == public.__all__
    assert all(hasattr(public, name) for name in public.__all__)


def test_the_readme_names_every_top_folder():
    readme = (REPOSITORY / "README.md").read_text()
    for folder in ("core", "gateway", "services", "cli", "tests", "benchmarks", "examples"):
        assert re.search(rf"^{folder}/", readme, re.MULTILINE), folder
