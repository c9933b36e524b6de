"""The training process with FSDP2 on CPUs, started by torchrun in tests.

accelerate grants FSDP to accelerators alone and takes DDP on CPUs; torch's own `fully_shard` runs
on both.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from asap_trainer.train import main

sys.path.insert(0, str(Path(__file__).parents[2]))
import stored_first  # noqa: F401

plain_init = AcceleratorState.__init__


def init(self: Any, *args: Any, **kwargs: Any) -> None:
    plain_init(self, *args, **kwargs)
    plugin = kwargs.get("fsdp_plugin")
    if plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        if self._mixed_precision != "no":
            plugin.set_mixed_precision(self._mixed_precision)


AcceleratorState.__init__ = init

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
