"""The trainer stage: launches a run, looks at it from time to time, registers what comes of it.

A run of hours is many short calls of `process`; between them nothing of it is in this process.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Sequence
from typing import Any

from pydantic import JsonValue, ValidationError

from asap.errors import AsapError, CapacityError, TrainingFailed
from asap.runs import Launch, TrainProgress, TrainResult, TrainRun
from asap_runtime.blobs import BlobStore
from asap_runtime.logs import get_logger
from asap_runtime.models import ModelRegistry, parse_reference
from asap_runtime.run_files import RunFiles
from asap_runtime.spending import spend
from asap_runtime.stage import Done, Wait
from asap_runtime.telemetry import (
    TRAIN_ETA_SECONDS,
    TRAIN_GRAD_NORM,
    TRAIN_LEARNING_RATE,
    TRAIN_LOSS,
    TRAIN_MEMORY_BYTES,
    TRAIN_MFU,
    TRAIN_STEPS,
    TRAIN_TOKENS_PER_S,
)
from asap_trainer.kubernetes_jobs import KubernetesLauncher
from asap_trainer.launcher import Launcher, Status, run_id_of
from asap_trainer.local import LocalLauncher
from asap_trainer.settings import TrainerSettings, check_base

__all__ = ["TrainStage"]

LOOKS = 16
"""Runs that are looked at at the same time; each is a few short calls."""
RETRY_S = 15.0
_VANISHED = "vanished"
"""Key of `TrainRun.meta`: the attempt after one whose process or Job nobody knew any more."""
_DETAILS = {
    "deadline": "the run took longer than trainer.max_hours allows",
    "out-of-memory": "the training process was killed for want of memory: take a smaller "
    "batch_size or max_seq_length, or give it more",
    "refused": "the training process refused the run",
    "crashed": "the training process ended with an error",
    "vanished": "what worked on the run has vanished twice",
    "interrupted-too-often": "the run was interrupted more often than trainer.max_launches allows",
    "no-result": "the training process ended well and left no result",
}
_GAUGES = (
    TRAIN_ETA_SECONDS,
    TRAIN_GRAD_NORM,
    TRAIN_LEARNING_RATE,
    TRAIN_LOSS,
    TRAIN_MEMORY_BYTES,
    TRAIN_MFU,
    TRAIN_TOKENS_PER_S,
)


class TrainStage:
    """Runs on one launcher, files in one blob store, models in one registry."""

    name = "trainer"
    concurrency = LOOKS

    def __init__(
        self, settings: TrainerSettings, *, blobs: BlobStore, registry: ModelRegistry
    ) -> None:
        self._settings, self._blobs, self._registry = settings.trainer, blobs, registry
        on_cluster = settings.trainer.launcher == "kubernetes"
        self._launcher: Launcher = (
            KubernetesLauncher(settings) if on_cluster else LocalLauncher(settings)
        )
        self._shown: dict[str, str] = {}
        self._log = get_logger()

    async def start(self) -> None:
        """Nothing is needed; `ready` says whether runs can be launched."""

    async def stop(self) -> None:
        """Runs go on: the next worker finds them."""

    async def ready(self) -> None:
        """Raise CapacityError unless the launcher can be used now."""
        await self._launcher.check()

    async def launched(self) -> Sequence[str]:
        """The ids of the runs that something works on."""
        return sorted({run_id_of(launch) for launch in await self._launcher.launched()})

    async def cancel(self, job_id: str, /) -> None:
        """End the work on a run; what it has written stays."""
        for launch in await self._launcher.launched():
            if run_id_of(launch) == job_id:
                await self._launcher.stop(launch)
        self._hide(job_id)

    async def process(self, run: TrainRun, /) -> Done[TrainRun] | Wait[TrainRun]:
        """Launch the run, or look how it stands.

        Raises TrainingFailed when it came to a bad end, InvalidInput for a base that must not be
        used. Trouble of cluster and blob store fails no run that is under way: it is looked at
        again later.
        """
        if run.launch is None:
            return await self._launch(run, 0)
        try:
            return await self._follow(run, run.launch)
        except AsapError as error:
            if not error.retryable:
                self._hide(run.id)
                raise
            self._log.warning("run.not_reached", run=run.id, code=error.problem_code)
            return Wait(run, _retry_after(error))

    async def _launch(self, run: TrainRun, attempt: int) -> Wait[TrainRun]:
        run = await asyncio.to_thread(self._with_base, run)
        files = RunFiles(self._blobs, run.prefix)
        await asyncio.to_thread(files.write, "spec.json", run.model_dump_json().encode())
        try:
            launch = await self._launcher.launch(run, attempt)
        except CapacityError as error:
            if error.problem_code != "quota-refused":
                raise
            self._log.info("run.waits", run=run.id, code=error.problem_code)
            return Wait(run, _retry_after(error))
        self._log.info("run.launched", run=run.id, launch=launch.name, attempt=attempt)
        return Wait(run.grown(launch=launch), self._settings.period_s)

    def _with_base(self, run: TrainRun) -> TrainRun:
        """The run with the place of its base model's files, where that is one of the registry."""
        check_base(run.base, self._settings.models)
        reference = parse_reference(run.base)
        if reference is None:
            return run
        base = self._registry.get(run.tenant, *reference)
        place = {"base_prefix": base.prefix, "base_sha256": base.manifest_sha256}
        return run.grown(meta={**run.meta, **place})

    async def _follow(self, run: TrainRun, launch: Launch) -> Done[TrainRun] | Wait[TrainRun]:
        status = await self._launcher.look(launch)
        run = await asyncio.to_thread(self._with_progress, run)
        if status.phase in ("waiting", "running"):
            return Wait(run, self._settings.period_s)
        self._log.info(
            "run.ended", run=run.id, launch=launch.name, phase=status.phase, reason=status.reason
        )
        if status.phase == "failed":
            failure = await asyncio.to_thread(self._failure, run, status)
            if failure is not None:
                if await asyncio.to_thread(self._told_before, run, launch):
                    return await self._again(run, launch, status)
                raise failure
        # The result is written last: where it is, the run was through before its Job vanished.
        result = await asyncio.to_thread(self._result, run)
        if result is not None:
            return Done(await asyncio.to_thread(self._registered, run, result))
        if status.phase == "succeeded":
            raise _failed("no-result", status)
        return await self._again(run, launch, status)

    def _told_before(self, run: TrainRun, launch: Launch) -> bool:
        """Whether the item has failed for this launch already: then somebody retries it, and the
        payload of a failed item is the one from before. Remembers that it is told now.
        """
        files, name = RunFiles(self._blobs, run.prefix), "failed.json"
        told = files.read(name)
        files.write(name, json.dumps(launch.name).encode())
        return told is not None and json.loads(told) == launch.name

    async def _again(self, run: TrainRun, launch: Launch, status: Status) -> Wait[TrainRun]:
        """The next attempt, which goes on from the last checkpoint: what ended the one before was
        no fault of the run.
        """
        attempt = launch.attempt + 1
        if attempt >= self._settings.max_launches:
            raise _failed("interrupted-too-often", status)
        if status.phase == "gone":
            if _VANISHED in run.meta:
                raise _failed("vanished", status)
            run = run.grown(meta={**run.meta, _VANISHED: attempt})
        return await self._launch(run, attempt)

    def _with_progress(self, run: TrainRun) -> TrainRun:
        """The run with what its process wrote last; its price and its figures are told."""
        written = RunFiles(self._blobs, run.prefix).read("progress.json")
        before = run.progress
        try:
            progress = None if written is None else TrainProgress.model_validate_json(written)
        except ValidationError:  # of another version, or none of ours
            progress = None
        if progress is None or progress == before:
            return run
        if before is not None:
            TRAIN_STEPS.inc(max(0, progress.step - before.step))
            self._charge(run, before, progress)
        self._show(run, progress)
        return run.grown(progress=progress)

    def _charge(self, run: TrainRun, before: TrainProgress, after: TrainProgress) -> None:
        """The devices' time since the figures before; a process that begins has used none."""
        price = self._settings.device_hour_usd
        if price is None or after.phase == "starting":
            return
        devices = max(1, run.config.gpus * run.config.nodes)
        hours = max(0.0, after.written_at - before.written_at) / 3600
        spend(hours * devices * price)

    def _show(self, run: TrainRun, progress: TrainProgress) -> None:
        self._shown[run.id] = model = run.model
        unknown = float("nan")
        TRAIN_LOSS.labels(model).set(_or(progress.loss, unknown))
        TRAIN_LEARNING_RATE.labels(model).set(_or(progress.learning_rate, unknown))
        TRAIN_GRAD_NORM.labels(model).set(_or(progress.grad_norm, unknown))
        TRAIN_TOKENS_PER_S.labels(model).set(_or(progress.tokens_per_s, unknown))
        TRAIN_MFU.labels(model).set(_or(progress.mfu, unknown))
        TRAIN_MEMORY_BYTES.labels(model).set(_or(progress.peak_memory_bytes, unknown))
        TRAIN_ETA_SECONDS.labels(model).set(_or(progress.eta_s, unknown))

    def _hide(self, run_id: str) -> None:
        """Models come and go: the figures of an ended run are no label for ever."""
        if (model := self._shown.pop(run_id, None)) is not None:
            for gauge in _GAUGES:
                gauge.remove(model)

    def _result(self, run: TrainRun) -> TrainResult | None:
        written = RunFiles(self._blobs, run.prefix).read("result.json")
        return None if written is None else TrainResult.model_validate_json(written)

    def _registered(self, run: TrainRun, result: TrainResult) -> TrainRun:
        """The run with its result, once the model's files are known to be those of it."""
        manifest = RunFiles(self._blobs, run.prefix).read("model/manifest.json")
        found = None if manifest is None else hashlib.sha256(manifest).hexdigest()
        if found != result.model_sha256:
            raise TrainingFailed(
                "the model's files are not those that the run has made",
                code="checkpoint-invalid",
                reason="manifest",
            )
        figures: dict[str, JsonValue] = {"result": result.model_dump(mode="json")}
        version = self._registry.add(
            run.tenant,
            run.model,
            prefix=f"{run.prefix}/model",
            manifest_sha256=result.model_sha256,
            base=run.base,
            job_id=run.id,
            meta={**run.meta, **figures, "config": run.config.hash()},
        )
        self._hide(run.id)
        return run.grown(result=result, meta={**run.meta, "version": version.version})

    def _failure(self, run: TrainRun, status: Status) -> TrainingFailed | None:
        """What the training process says of its end, or else what its end says; None when it was
        no fault of the run.
        """
        written = RunFiles(self._blobs, run.prefix).read("problem.json")
        said: Any = None if written is None else json.loads(written)
        # Whoever was killed had no chance to say anything: what is there is of an earlier attempt.
        if status.reason not in ("refused", "crashed"):
            return _failed(status.reason or "crashed", status)
        if not isinstance(said, dict):
            # torchrun ends with 1 whatever its processes ended with, also when they were stopped.
            is_torchrun = run.config.gpus > 1 or run.config.nodes > 1
            return None if is_torchrun else _failed(status.reason, status)
        code = str(said.get("code", TrainingFailed.code))
        if code == "blob-unavailable":  # it was, and is there now
            return None
        return _failed(status.reason, status, str(said.get("detail", _DETAILS["crashed"])), code)


def _failed(
    reason: str, status: Status, detail: str | None = None, code: str | None = None
) -> TrainingFailed:
    return TrainingFailed(
        detail or _DETAILS[reason], code=code, reason=reason, log="\n".join(status.log)
    )


def _retry_after(error: AsapError) -> float:
    after = error.context.get("retry_after_s")
    return float(after) if isinstance(after, int | float) else RETRY_S


def _or(value: float | None, unknown: float) -> float:
    return unknown if value is None else value
