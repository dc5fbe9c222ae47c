"""Throughput: tokens a second, model FLOP utilisation, peak memory, and what the whole run cost."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lit_reason.callbacks.verified_generation import VerifiedGeneration
from lit_reason.core.ranks import from_all_ranks
from lit_reason.errors import UserError
from lit_reason.metrics.flops import ModelFlops, matmul_rate, model_flops, peak_memory


@dataclass
class Totals:
    """What training has cost since its first step, over all processes and resumes.

    Attributes:
        steps: optimizer steps.
        tokens: tokens that went through the model.
        trained_tokens: tokens the loss was taken on.
        seconds: time in training: steps and the loading between them, without validation, generation,
            checkpoints and set-up.
        cpu_seconds: what the processor worked in that time, over all threads of all processes. On a machine that
            other jobs share it says more than `seconds`.
        flops: floating-point operations by `ModelFlops`; 0 when they cannot be counted.
    """

    steps: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0
    flops: float = 0.0
    cpu_seconds: float = 0.0


class Throughput(Callback):
    """Logs speed and memory by window of `log_every_n_steps` optimizer steps, and running totals.

    Logged, each over all processes: `perf/tokens_per_s`, `perf/trained_tokens_per_s`, `perf/step_s` (seconds
    an optimizer step), `perf/mfu` (share of the matrix-multiplication rate that was *measured* on this device
    when training started, in the model's own precision; not of a datasheet's), `perf/peak_memory_gb` (10^9
    bytes, the highest of all processes), `perf/total_tokens`, `perf/total_trained_tokens`,
    `perf/total_seconds` and `perf/total_cpu_seconds`.

    Peak memory is on CUDA the most that torch had allocated for tensors on the device; elsewhere the largest
    resident size of the whole process since it started, libraries and data included. The two do not compare.

    Counts are plain integers known from shapes, so nothing waits for the device between two windows.
    `perf/mfu` is absent for mixture-of-experts models, whose work a token the parameter count does not tell.
    """

    def __init__(self) -> None:
        self._base = Totals()  # of all processes, before this start
        self._own = Totals()  # of this process, since this start
        self._window = Totals()  # copy of `_own` when the window began
        self._mark: tuple[float, float] | None = None  # the clocks run since then; None while they stand
        self._step = 0
        self._flops: ModelFlops | None = None
        self._rate = 0.0
        self._copies = 1.0

    # ---- state ---------------------------------------------------------------------------------------------

    @property
    def totals(self) -> Totals:
        """Totals over all processes (all of them must ask together)."""
        return _sum(self._base, self._over_ranks(self._own))

    def state_dict(self) -> dict[str, Any]:
        """The totals so far, as plain numbers."""
        return dataclasses.asdict(self.totals)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting from a checkpoint.

        Args:
            state_dict: what `state_dict` returned.
        """
        self._base, self._own, self._window = Totals(**state_dict), Totals(), Totals()

    def _over_ranks(self, own: Totals) -> Totals:
        ranks = from_all_ranks(own)
        # Under tensor parallelism several processes count the same tokens.
        return Totals(
            steps=own.steps,
            tokens=round(sum(r.tokens for r in ranks) / self._copies),
            trained_tokens=round(sum(r.trained_tokens for r in ranks) / self._copies),
            seconds=max(r.seconds for r in ranks),
            cpu_seconds=sum(r.cpu_seconds for r in ranks),
            flops=sum(r.flops for r in ranks) / self._copies,
        )

    # ---- clock ---------------------------------------------------------------------------------------------

    def _pause(self, pl_module: LightningModule) -> None:
        """Stop the clock before something that is not training."""
        if self._mark is None:
            return
        if pl_module.device.type == "cuda":  # work that was only queued belongs to training
            torch.cuda.synchronize(pl_module.device)
        self._read_clocks()
        self._mark = None

    def _read_clocks(self) -> None:
        """Add what went by since the mark, and move the mark here."""
        now = time.perf_counter(), time.process_time()
        if self._mark is not None:
            self._own.seconds += now[0] - self._mark[0]
            self._own.cpu_seconds += now[1] - self._mark[1]
        self._mark = now

    def _skip_generation(self, trainer: Trainer, step: int, result: Any) -> None:
        """Generation between two steps does not count either: set the clock forward by what it took."""
        if self._mark is not None:
            took = [c.history[-1] for c in _generators(trainer) if c.last is result]
            seconds, cpu = (sum(entry[name] for entry in took) for name in ("seconds", "cpu_seconds"))
            self._mark = self._mark[0] + seconds, self._mark[1] + cpu

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hear of every verified generation."""
        for callback in _generators(trainer):
            if self._skip_generation not in callback.listeners:
                callback.listeners.append(self._skip_generation)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation does not count as training time."""
        self._pause(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Nor does writing a checkpoint."""
        self._pause(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nor does what other callbacks do at the end of an epoch."""
        self._pause(pl_module)

    # ---- training ------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Count the model's operations and measure what the device can do (less than a second)."""
        self._step = trainer.global_step
        replicas = getattr(trainer.strategy, "distributed_sampler_kwargs", {}).get("num_replicas", 1)
        self._copies = trainer.world_size / replicas
        self._flops = model_flops(pl_module.lm.hf)
        if self._flops is not None:
            dtype = _compute_dtype(trainer, pl_module)
            self._rate = matmul_rate(pl_module.device, dtype)
            name = str(dtype).removeprefix("torch.")
            rank_zero_info(
                f"Measured matmul rate: {self._rate / 1e12:.3g} TFLOP/s in {name} (perf/mfu is a share of it)"
            )
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Let the clock run."""
        if self._mark is None:
            self._read_clocks()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the pack; at the end of a window, log."""
        if not hasattr(batch, "lengths") or not hasattr(batch, "index"):
            raise UserError(
                f"Throughput counts packs (lit_reason.data.packing.Pack), not {type(batch).__name__} batches"
            )
        self._read_clocks()
        own = self._own
        trained = batch.index.numel()
        own.tokens += batch.ids.numel()
        own.trained_tokens += trained
        if self._flops is not None:
            own.flops += self._flops.step(batch.lengths, trained)
        if trainer.global_step == self._step:
            return  # a micro-batch within an optimizer step
        self._step = trainer.global_step
        own.steps += 1
        if trainer._logger_connector.should_update_logs:
            # Lightning hands these to the loggers right after this hook, in the training loss's own row.
            pl_module.log_dict(self._close_window(trainer, pl_module), on_step=True, on_epoch=False, batch_size=1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what came after the last full window."""
        self._pause(pl_module)
        if self._own.steps > self._window.steps:
            metrics = self._close_window(trainer, pl_module)
            step = max(trainer.fit_loop.epoch_loop._batches_that_stepped - 1, 0)
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=step)
                logger.save()

    def _close_window(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        if self._mark is not None and pl_module.device.type == "cuda":  # logging waits anyway
            torch.cuda.synchronize(pl_module.device)
            self._read_clocks()
        window = self._over_ranks(_difference(self._own, self._window))
        self._window = dataclasses.replace(self._own)
        totals = self.totals
        seconds = max(window.seconds, 1e-9)
        metrics = {
            "perf/tokens_per_s": window.tokens / seconds,
            "perf/trained_tokens_per_s": window.trained_tokens / seconds,
            "perf/step_s": window.seconds / window.steps,
            "perf/peak_memory_gb": max(from_all_ranks(peak_memory(pl_module.device))) / 1e9,
            "perf/total_tokens": float(totals.tokens),
            "perf/total_trained_tokens": float(totals.trained_tokens),
            "perf/total_seconds": totals.seconds,
            "perf/total_cpu_seconds": totals.cpu_seconds,
        }
        if self._flops is not None:
            metrics["perf/mfu"] = window.flops / seconds / (self._rate * trainer.world_size)
        return metrics


def _generators(trainer: Any) -> list[VerifiedGeneration]:
    return [c for c in trainer.callbacks if isinstance(c, VerifiedGeneration)]


def _sum(a: Totals, b: Totals) -> Totals:
    return Totals(*(getattr(a, f.name) + getattr(b, f.name) for f in dataclasses.fields(Totals)))


def _difference(a: Totals, b: Totals) -> Totals:
    return Totals(*(getattr(a, f.name) - getattr(b, f.name) for f in dataclasses.fields(Totals)))


def _compute_dtype(trainer: Trainer, pl_module: Any) -> torch.dtype:
    """The precision in which the matrix products run."""
    precision = str(trainer.precision)
    if precision.startswith("bf16"):
        return torch.bfloat16
    if precision.startswith("16"):
        return torch.float16
    return pl_module.lm.hf.get_input_embeddings().weight.dtype  # never quantised
