"""How many tokens one batch may hold: what is free on the device over what a token needs.

Pure arithmetic on a model's config, but for the question to the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = ["Budget", "free_bytes", "plan_budget", "token_bytes"]

_MOST_TOKENS = {"cpu": 4096, "cuda": 32768}
"""A batch beyond these is no faster by the token, it only makes its callers wait."""
_LEAST_TOKENS = 256
_HEAD_BYTES = 2 * 256 * 4
"""For each entry of the vocabulary: two float32 buffers of HEAD_ROWS rows."""
_UNKNOWN_SYSTEM = 4 * 2**30
_FOR_ACTIVATIONS, _FOR_STATES = 0.5, 0.25
"""Shares of the free memory; the rest is for other users of the device."""


@dataclass(frozen=True, slots=True)
class Budget:
    """In tokens."""

    batch: int = 8192
    """Of one forward pass."""
    kept: int = 0
    """Whose keys and values stay between the rounds of iterative pruning."""
    longest: int = 8192
    """Of a single sequence, which may be longer than a batch that is quick."""


def token_bytes(config: Any, itemsize: int) -> tuple[int, int]:
    """Bytes that one token needs at the height of a pass, and those of its keys and values.

    Height: residual and normed states, a float32 copy of one of them, and either queries, keys,
    values with their rotated copies or the feed-forward's gate, its activation and both products.
    """
    heads, width = config.num_attention_heads, config.hidden_size
    head_dim = getattr(config, "head_dim", None) or width // heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    attention = 3 * (heads + 2 * shared) * head_dim
    feed_forward = 4 * config.intermediate_size
    height = itemsize * (3 * width + max(attention, feed_forward)) + 8 * width
    return height, 2 * itemsize * config.num_hidden_layers * shared * head_dim


def plan_budget(config: Any, itemsize: int, device: str, free: int) -> Budget:
    """The budget for a model with `config` on a device with `free` bytes beyond its weights."""
    height, states = token_bytes(config, itemsize)
    left = free - config.vocab_size * _HEAD_BYTES
    longest = max(_LEAST_TOKENS, int(left * _FOR_ACTIVATIONS / height))
    kept = max(0, int(left * _FOR_STATES / states))
    return Budget(min(longest, _MOST_TOKENS[device]), kept, longest)


def free_bytes(device: torch.device) -> int:
    """Memory that the device could give now: of the GPU, or of machine and control group
    (4 GiB where the system does not say).
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux
        return _UNKNOWN_SYSTEM
    machine = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024
    return min(machine, _left_in_group(Path("/sys/fs/cgroup"), machine))


def _left_in_group(group: Path, unlimited: int) -> int:
    """Bytes that the control group may still take. Cached files count as taken, weights that were
    just read among them, but the system drops those that nobody maps.
    """
    try:
        limit = int((group / "memory.max").read_text())
        taken = int((group / "memory.current").read_text())
        lines = (group / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):  # no such file, or "max"
        return unlimited
    stat = {name: int(number) for name, number in (line.split() for line in lines)}
    cached = stat.get("active_file", 0) + stat.get("inactive_file", 0) - stat.get("file_mapped", 0)
    return max(0, limit - taken + max(0, cached))
