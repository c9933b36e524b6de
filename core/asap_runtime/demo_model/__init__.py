"""The demo scorer: a very small model in the wheel, so that everything runs with no download."""

from __future__ import annotations

from pathlib import Path

__all__ = ["DEMO", "demo_directory"]

DEMO = "demo"
"""The model name that stands for this directory, in options and in provenance."""


def demo_directory() -> Path:
    """Where its config, tokenizer and weights are; a local directory like any other model's."""
    return Path(__file__).parent
