"""What a backend does with rows and recipe, from inside: `training_probe.py BACKEND MODEL DATA`.

Prints JSON. In a process of its own, because Unsloth changes the libraries it is imported before.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from asap.errors import Misconfigured
from asap.train_config import TrainConfig
from asap_trainer.backends import find_device, load_model, prepare_imports
from asap_trainer.encoding import prepare
from asap_trainer.progress import Reporter
from training_runs import TINY


def train(config: TrainConfig, base: Path, data: Path) -> tuple[Any, Any, list[dict[str, Any]]]:
    """A run without a blob store: its loop, its figures, and what the model was fed."""
    from asap_trainer.loop import Loop

    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare([data], config, base, Path(folder, "tokens"))
        device = find_device(config)
        model = load_model(config, base, device)
        fed: list[dict[str, Any]] = []
        forward = model.forward

        def seen(*args: Any, **inputs: Any) -> Any:
            if model.training:
                names = ("input_ids", "labels", "attention_mask", "position_ids")
                fed.append({n: inputs[n].tolist() for n in names if inputs.get(n) is not None})
            return forward(*args, **inputs)

        model.forward = seen
        reporter = Reporter(None)
        loop = Loop(
            config=config,
            device=device,
            train=prepared.train,
            held_out=prepared.held_out,
            peak=config.peak_learning_rate("qwen2"),
            reporter=reporter,
            store=lambda *_: None,
            stop=threading.Event(),
            folder=Path(folder, "run"),
        )
        loop.run(model, [int(count) for count in prepared.train.tokens], None)
    return loop, reporter, fed


def main(backend: str, base: Path, data: Path) -> dict[str, Any]:
    def config(**changes: Any) -> TrainConfig:
        fixed = {"backend": backend, "save_every": 1000, "held_out_share": 0.25}
        return TrainConfig.model_validate({**TINY, **fixed, **changes})

    with tempfile.TemporaryDirectory() as folder:
        prepare_imports(config(), Path(folder))
    loop, reporter, fed = train(config(), base, data)
    found: dict[str, Any] = {
        "trainer": type(loop.trainer).__mro__[2].__module__,
        "rows": reporter.rows,
        "held_out": [loop.figures.held_out_before, loop.figures.held_out_after],
        "fed": fed[:2],
    }
    _, reporter, fed = train(config(batch_size=3, accumulation=4, max_steps=1), base, data)
    found["batched"] = {"rows": reporter.rows, "fed": fed[0]}
    # One step over all of the data, however many rows it is in.
    _, reporter, fed = train(config(max_steps=1, accumulation=100), base, data)
    found["apart"] = {"rows": reporter.rows, "passes": len(fed)}
    whole = {"max_steps": 1, "accumulation": 100, "packing": True}
    _, reporter, fed = train(config(**whole), base, data)
    found["packed"] = {"rows": reporter.rows, "passes": len(fed), "fed": fed[0]}
    _, reporter, _ = train(config(max_steps=2, precision="bfloat16"), base, data)
    found["bfloat16"] = reporter.rows
    _, reporter, _ = train(config(max_steps=2, gradient_checkpointing=True), base, data)
    found["checkpointed"] = reporter.rows
    import transformers.masking_utils

    transformers.masking_utils.find_packed_sequence_indices = lambda *_: None
    try:
        train(config(**whole), base, data)
    except Misconfigured as error:
        found["leak"] = error.detail
    return found


if __name__ == "__main__":
    out = sys.stdout
    with redirect_stdout(sys.stderr):
        answer = main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
    out.write(json.dumps(answer))
