"""The two ways to train, Unsloth and TRL alone, as one: a model and a trainer with the same recipe.

Both are given the same rows, the same schedule and the same optimiser, and both count the loss per
token over a whole step, accumulation and devices included. Unsloth must be imported before
transformers and TRL, so nothing here is imported before `prepare_imports`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asap.errors import CapacityError, Misconfigured
from asap.train_config import TrainConfig
from asap_trainer.batches import collate, collate_packed
from asap_trainer.metering import Work

if TYPE_CHECKING:
    import torch

__all__ = ["Device", "build_trainer", "find_device", "load_model", "prepare_imports"]

_BETAS, _EPSILON = (0.9, 0.999), 1e-8


@dataclass(frozen=True, slots=True)
class Device:
    """Where and in which numbers is trained."""

    torch_device: torch.device
    weights: torch.dtype
    autocast: bool
    """Whether matrix products run in bfloat16; weights of a CPU stay in float32."""
    processes: int

    @property
    def name(self) -> str:
        """For people: the GPU's name, or the CPU; with their number when there are several."""
        import torch

        one = "cpu"
        if self.torch_device.type == "cuda":
            one = torch.cuda.get_device_name(self.torch_device)
        return one if self.processes == 1 else f"{self.processes} x {one}"

    @property
    def products(self) -> torch.dtype:
        """The numbers of matrix products."""
        import torch

        return torch.bfloat16 if self.autocast else self.weights


def prepare_imports(config: TrainConfig, work_dir: Path) -> None:
    """Set what the libraries read when they are imported, and import them in the right order.

    Raises Misconfigured when the backend is not installed.
    """
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(work_dir / "compiled"))
    # Rows come packed or padded as they are to be.
    os.environ["UNSLOTH_DISABLE_AUTO_PADDING_FREE"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if config.gpus == 0:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        if config.backend == "unsloth":
            import unsloth  # noqa: F401
        import trl  # noqa: F401
    except ImportError as error:
        raise Misconfigured(
            f"backend {config.backend!r} is not installed here; install the extra 'trainer', and "
            "Unsloth as scripts/install.sh does, or take the other backend"
        ) from error


def find_device(config: TrainConfig) -> Device:
    """The device of this process. Raises Misconfigured when it is not the one of the config."""
    import torch

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    wide = config.precision == "bfloat16"
    if config.gpus == 0:
        # Weights in bfloat16 would lose the small updates, and a CPU has the room.
        fast = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        return Device(torch.device("cpu"), torch.float32, wide and fast, processes)
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.device_count() <= local:
        raise Misconfigured(
            f"the run asks for {config.gpus} GPUs, and torch sees {torch.cuda.device_count()}; "
            "set gpus to 0 to train on the CPU"
        )
    if wide and not torch.cuda.is_bf16_supported():
        raise Misconfigured("this GPU has no bfloat16; set precision to float32")
    weights = torch.bfloat16 if wide else torch.float32
    return Device(torch.device("cuda", local), weights, wide, processes)


def load_model(config: TrainConfig, directory: Path, device: Device) -> Any:
    """The base model with all of its weights to be trained. Raises Misconfigured, CapacityError."""
    import torch

    load = _load_unsloth if config.backend == "unsloth" else _load_plain
    try:
        missing = _missing_weights(directory)
        model = load(config, directory, device)
    except torch.OutOfMemoryError as error:
        raise CapacityError("the device is too small for the base model's weights") from error
    except Exception as error:  # many libraries, each with errors of its own
        raise Misconfigured(
            f"cannot load the base model: its config or weights are damaged, or backend "
            f"{config.backend!r} does not know its architecture ({type(error).__name__})"
        ) from error
    if missing:
        raise Misconfigured(
            f"the base model's weights are incomplete: {missing} tensors are missing, and would be "
            "random"
        )
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and longest < config.max_seq_length:
        raise Misconfigured(
            f"max_seq_length is {config.max_seq_length:,}, and the base model has positions for "
            f"{longest:,} tokens; set it lower"
        )
    for weight in model.parameters():
        weight.requires_grad_(True)
    return model


def _missing_weights(directory: Path) -> int:
    """Tensors that the files lack, which libraries fill with random numbers. Loads none."""
    import transformers

    library: Any = transformers  # its types do not know `output_loading_info`
    _, report = library.AutoModelForCausalLM.from_pretrained(
        directory,
        device_map="meta",
        trust_remote_code=False,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
    )
    return len(report["missing_keys"])


def _load_unsloth(config: TrainConfig, directory: Path, device: Device) -> Any:
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        str(directory),
        max_seq_length=config.max_seq_length,
        dtype=device.weights,
        load_in_4bit=False,
        full_finetuning=True,
        use_gradient_checkpointing=config.gradient_checkpointing,
        trust_remote_code=False,
        local_files_only=True,
    )
    return model


def _load_plain(config: TrainConfig, directory: Path, device: Device) -> Any:
    import transformers
    from transformers.utils.import_utils import is_flash_attn_2_available

    flash = is_flash_attn_2_available()
    on_gpu = device.torch_device.type == "cuda"
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=device.weights,
        attn_implementation="flash_attention_2" if flash and on_gpu else "sdpa",
        trust_remote_code=False,
        use_safetensors=True,
        local_files_only=True,
    )


def build_trainer(
    config: TrainConfig,
    model: Any,
    device: Device,
    rows: Any,
    *,
    steps: int,
    peak: float,
    folder: Path,
    work: Work,
    callbacks: Sequence[Any] = (),
) -> Any:
    """TRL's SFTTrainer with the recipe of the config.

    Args:
        config: the recipe.
        model: of `load_model`.
        device: it trains on.
        rows: of `dataset_of`.
        steps: of the whole run.
        peak: learning rate.
        folder: where checkpoints are written.
        work: counts each batch that is trained on.
        callbacks: of transformers.
    """
    from transformers import PrinterCallback
    from trl.trainer.sft_config import SFTConfig

    gathering = collate_packed if config.packing else collate
    arguments = SFTConfig(
        output_dir=str(folder),
        **_recipe(config, steps, peak),
        **_placement(config, model, device),
        logging_steps=config.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",  # the callbacks say when
        eval_strategy="no",
        # The rows are what the model is fed: nothing is templated, tokenised, masked or cut again.
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        max_length=None,
        packing=False,
    )
    trainer = _trainer_class(device, work)(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=gathering,
        processing_class=_tokenizer(model),
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _recipe(config: TrainConfig, steps: int, peak: float) -> dict[str, Any]:
    return {
        "num_train_epochs": config.epochs,
        "max_steps": steps,
        "per_device_train_batch_size": config.batch_size,
        "gradient_accumulation_steps": config.accumulation,
        "learning_rate": peak,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": config.min_lr_rate},
        "warmup_steps": math.ceil(config.warmup_ratio * steps),
        "optim": "adamw_torch_fused",
        "adam_beta1": _BETAS[0],
        "adam_beta2": _BETAS[1],
        "adam_epsilon": _EPSILON,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "seed": config.seed,
        "average_tokens_across_devices": True,
    }


def _placement(config: TrainConfig, model: Any, device: Device) -> dict[str, Any]:
    on_gpu = device.torch_device.type == "cuda"
    placed: dict[str, Any] = {
        "use_cpu": not on_gpu,
        "bf16": device.autocast,
        "dataloader_pin_memory": on_gpu,
        "gradient_checkpointing": config.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    }
    if device.processes > 1:
        placed["gradient_checkpointing"] = False  # FSDP has to place its own
        placed["ddp_find_unused_parameters"] = False  # accelerate has no FSDP for CPUs, but DDP
        placed["fsdp"] = True
        placed["fsdp_config"] = {
            "version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": sorted(model._no_split_modules),
            "state_dict_type": "FULL_STATE_DICT",
            "reshard_after_forward": True,
            "activation_checkpointing": config.gradient_checkpointing,
        }
    return placed


def _tokenizer(model: Any) -> Any:
    """For TRL, which insists on one. It encodes nothing."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model.name_or_path, local_files_only=True)


def _trainer_class(device: Device, work: Work) -> Any:
    import transformers
    import trl

    library: Any = trl  # Unsloth has put its own trainer in the place of the other
    theirs = library.SFTTrainer

    class CountingTrainer(theirs):  # type: ignore[misc, valid-type]
        """Counts what it trains on."""

        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            work.add(inputs)
            return super().training_step(model, inputs, *args, **kwargs)

    class UnfusedTrainer(CountingTrainer):
        """TRL's own loss runs on a GPU alone (Triton); the model's is the same number."""

        compute_loss: Callable[..., Any] = transformers.Trainer.compute_loss

    fused = device.torch_device.type == "cuda" or hasattr(theirs, "_unsloth_cpu")
    return CountingTrainer if fused else UnfusedTrainer
