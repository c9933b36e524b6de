"""The training process with FSDP2 on CPUs, started by torchrun in tests.

accelerate grants FSDP to accelerators alone and takes DDP on CPUs; torch's own `fully_shard` runs
on both. And each checkpoint is in the store before training goes on: on a slow disk the next one
would overtake it.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from asap_trainer.checkpoints import Checkpoints
from asap_trainer.train import main

plain_init, plain_store = AcceleratorState.__init__, Checkpoints.store


def init(self: Any, *args: Any, **kwargs: Any) -> None:
    plain_init(self, *args, **kwargs)
    plugin = kwargs.get("fsdp_plugin")
    if plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        if self._mixed_precision != "no":
            plugin.set_mixed_precision(self._mixed_precision)


def store(self: Checkpoints, step: int, folder: Path, figures: dict[str, Any]) -> None:
    plain_store(self, step, folder, figures)
    while folder.exists():
        time.sleep(0.01)


AcceleratorState.__init__ = init
Checkpoints.store = store  # type: ignore[method-assign]

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
