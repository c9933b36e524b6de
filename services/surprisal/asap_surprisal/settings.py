"""Settings of the surprisal role: which model scores, where, in batches of what size."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator

from asap_runtime.settings import Group, RuntimeSettings

__all__ = ["ScorerSettings", "SurprisalSettings"]

_LEAST_TOKENS = 16


class ScorerSettings(Group):
    """The scorer: a model in this process, or a vLLM server that is asked for the same scores."""

    backend: Literal["torch", "vllm"] = "torch"
    model: str = "demo"
    """Hub name, directory, or the shipped demo scorer; with vllm only its tokenizer is read."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "bfloat16", "float32", "fp8"] = "auto"
    """`auto`: bfloat16 on a GPU, else float32. `fp8`: weights of the layers in one byte each."""
    max_batch_tokens: int | Literal["auto"] = "auto"
    """Of one pass; twice as many may wait. `auto`: what speed asks for and free memory allows."""
    base_url: str | None = None
    """Of the vLLM server, with /v1."""
    served_model: str | None = None
    """What the vLLM server calls the model; default: `model`."""
    api_key: SecretStr | None = None
    """Of the vLLM server."""
    concurrency: int = Field(64, ge=1)
    """Records that wait for a batch at the same time; with vllm also its requests at once."""
    max_body_bytes: int = Field(8 * 2**20, ge=1024)
    """Largest body of POST /score."""
    max_requests: int = Field(64, ge=1)
    """Texts in one body of POST /score."""

    @field_validator("max_batch_tokens", mode="plain")
    @classmethod
    def _check_tokens(cls, value: object) -> int | Literal["auto"]:
        """One error for both types, under the setting's name."""
        if value == "auto":
            return "auto"
        if not str(value).isdecimal() or int(str(value)) < _LEAST_TOKENS:
            raise ValueError(f"expected `auto` or at least {_LEAST_TOKENS} tokens")
        return int(str(value))

    @model_validator(mode="after")
    def _check_backend(self) -> Self:
        """A setting of the other backend would change nothing, and somebody believes it does."""
        local = {
            "device": self.device != "auto",
            "precision": self.precision != "auto",
            "max_batch_tokens": self.max_batch_tokens != "auto",
        }
        remote = {
            name: getattr(self, name) is not None
            for name in ("base_url", "served_model", "api_key")
        }
        if self.backend == "vllm":
            if self.base_url is None:
                raise ValueError("backend vllm needs base_url, such as http://host:8000/v1")
            if self.model == "demo":
                raise ValueError("backend vllm needs model: the one that the server loaded")
        foreign = local if self.backend == "vllm" else remote
        if wrong := [name for name, is_set in foreign.items() if is_set]:
            raise ValueError(f"backend {self.backend} does not use {wrong[0]}; leave it out")
        return self


class SurprisalSettings(RuntimeSettings):
    """The surprisal role's settings."""

    surprisal: ScorerSettings = ScorerSettings()
