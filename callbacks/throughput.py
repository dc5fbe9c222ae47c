"""Throughput: tokens a second, model FLOP utilisation, peak memory, and what the whole run cost.

Symbols: T tokens, S trained tokens, L layers, D attention width (heads x head size), N parameters, V
vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lit_reason.core.ranks import from_all_ranks
from lit_reason.errors import UserError


@dataclass
class Totals:
    """What training has cost since its first step, over all processes and resumes.

    Attributes:
        steps: optimizer steps.
        tokens: tokens that went through the model.
        trained_tokens: tokens the loss was taken on.
        seconds: time in training: steps and the loading between them, without validation, checkpoints and
            set-up.
        flops: floating-point operations by `ModelFlops`; 0 when they cannot be counted.
    """

    steps: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0
    flops: float = 0.0


@dataclass(frozen=True)
class ModelFlops:
    """Floating-point operations of one training step, forward and backward, without recomputation.

    A multiplication by a matrix of n weights costs 2 n a token forward, 2 n for the gradient of its input and
    2 n for the gradient of its weights. The last third falls away where the weights are frozen (LoRA): 4 n
    instead of 6 n. Attention has no weights: 12 L D per pair of positions, half of it under the causal mask,
    document by document. Sliding windows and gradient checkpointing are not taken into account.

    Attributes:
        per_token: operations a token in the weights of the layers (6 N, or 4 N where frozen).
        per_pair: operations a pair of positions, causal (12 L D / 2).
        per_trained: operations a trained token in the head (6 V D_model, or 4 V D_model when frozen).
    """

    per_token: float
    per_pair: float
    per_trained: float

    def step(self, lengths: Sequence[int], trained: int) -> float:
        """Operations of one pack.

        Args:
            lengths: tokens of each document in it.
            trained: rows that go through the head.
        """
        pairs = sum(n * n for n in lengths)
        return self.per_token * sum(lengths) + self.per_pair * pairs + self.per_trained * trained


class Throughput(Callback):
    """Logs speed and memory by window of `log_every_n_steps` optimizer steps, and running totals.

    Logged, each over all processes: `perf/tokens_per_s`, `perf/trained_tokens_per_s`, `perf/step_s` (seconds
    an optimizer step), `perf/mfu` (share of the matrix-multiplication rate that was *measured* on this device
    when training started, in the model's own precision; not of a datasheet's), `perf/peak_memory_gb` (10^9
    bytes, the highest of all processes), `perf/total_tokens`, `perf/total_trained_tokens` and
    `perf/total_seconds`.

    Peak memory is on CUDA the most that torch had allocated for tensors on the device; elsewhere the largest
    resident size of the whole process since it started, libraries and data included. The two do not compare.

    Counts are plain integers known from shapes, so nothing waits for the device between two windows.
    `perf/mfu` is absent for mixture-of-experts models, whose work a token the parameter count does not tell.
    """

    def __init__(self) -> None:
        self._base = Totals()  # of all processes, before this start
        self._own = Totals()  # of this process, since this start
        self._window = Totals()  # copy of `_own` when the window began
        self._mark: float | None = None  # the clock runs since then; None while it stands
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
            flops=sum(r.flops for r in ranks) / self._copies,
        )

    # ---- clock ---------------------------------------------------------------------------------------------

    def _pause(self, pl_module: LightningModule) -> None:
        """Stop the clock before something that is not training."""
        if self._mark is None:
            return
        if pl_module.device.type == "cuda":  # work that was only queued belongs to training
            torch.cuda.synchronize(pl_module.device)
        self._own.seconds += time.perf_counter() - self._mark
        self._mark = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation does not count as training time."""
        self._pause(pl_module)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Nor does writing a checkpoint."""
        self._pause(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nor does what other callbacks do at the end of an epoch."""
        self._pause(pl_module)

    # ---- training ------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
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

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Let the clock run."""
        if self._mark is None:
            self._mark = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the pack; at the end of a window, log."""
        if not hasattr(batch, "lengths") or not hasattr(batch, "index"):
            raise UserError(
                f"Throughput counts packs (lit_reason.data.packing.Pack), not {type(batch).__name__} batches"
            )
        now, own = time.perf_counter(), self._own
        own.seconds += now - (self._mark or now)
        self._mark = now
        trained = batch.index.numel()
        own.tokens += batch.ids.numel()
        own.trained_tokens += trained
        if self._flops is not None:
            own.flops += self._flops.step(batch.lengths, trained)
        if trainer.global_step == self._step:
            return  # a micro-batch within an optimizer step
        self._step = trainer.global_step
        own.steps += 1
        if trainer.log_every_n_steps and trainer._logger_connector.should_update_logs:
            # Lightning writes these to the loggers right after this hook, in the same row as the training loss.
            pl_module.log_dict(
                self._close_window(trainer, pl_module), on_step=True, on_epoch=False, batch_size=1
            )

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
            now = time.perf_counter()
            self._own.seconds += now - self._mark
            self._mark = now
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
        }
        if self._flops is not None:
            metrics["perf/mfu"] = window.flops / seconds / (self._rate * trainer.world_size)
        return metrics


def _sum(a: Totals, b: Totals) -> Totals:
    return Totals(*(getattr(a, f.name) + getattr(b, f.name) for f in dataclasses.fields(Totals)))


def _difference(a: Totals, b: Totals) -> Totals:
    return Totals(*(getattr(a, f.name) - getattr(b, f.name) for f in dataclasses.fields(Totals)))


def peak_memory(device: torch.device) -> int:
    """Highest memory use so far in bytes: torch's allocations on a CUDA device, else the process's resident
    size.

    Args:
        device: where the model is.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts kibibytes, macOS bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def model_flops(model: Any) -> ModelFlops | None:
    """Count a causal language model's operations from its parameters and config.

    Args:
        model: a transformers model, plain or wrapped by peft; may be quantised.

    Returns:
        The cost of tokens, pairs and head rows; None for mixture-of-experts models.
    """
    config = model.config.get_text_config()
    if any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        return None
    head = model.get_output_embeddings()
    head = getattr(head, "base_layer", head)
    skip = {
        id(p)
        for m in model.modules()
        if isinstance(m, torch.nn.Embedding)
        for p in m.parameters(recurse=False)
    }
    skip |= {id(p) for p in head.parameters(recurse=False)}
    per_token = sum(_cost(p) for p in model.parameters() if id(p) not in skip)
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return ModelFlops(per_token, 12 * config.num_hidden_layers * width / 2, _cost(head.weight))


def _cost(parameter: torch.nn.Parameter) -> float:
    """Operations a token that one weight tensor causes, forward and backward."""
    quantised = getattr(parameter, "quant_state", None)  # 4-bit weights are packed: ask for the true shape
    size = math.prod(quantised.shape) if quantised is not None else parameter.numel()
    return (6 if parameter.requires_grad else 4) * size


def _compute_dtype(trainer: Trainer, pl_module: LightningModule) -> torch.dtype:
    """The precision in which the matrix products run."""
    precision = str(trainer.precision)
    if precision.startswith("bf16"):
        return torch.bfloat16
    if precision.startswith("16"):
        return torch.float16
    return pl_module.lm.hf.get_input_embeddings().weight.dtype  # never quantised


def matmul_rate(device: torch.device, dtype: torch.dtype, budget_s: float = 0.25) -> float:
    """The rate of square matrix products on this device, in floating-point operations a second.

    Products of growing size (256 to 8192) are timed until the budget is spent; the best rate counts. On a CPU
    the number holds for the threads torch may use now and for what else the machine is doing.

    Args:
        device: where to measure.
        dtype: precision of the factors.
        budget_s: time to spend, in seconds, beyond a short warm-up.
    """
    generator = torch.Generator(device).manual_seed(0)  # the run's own random state stays untouched

    def seconds(size: int) -> float:
        a, b = (torch.randn(size, size, device=device, dtype=dtype, generator=generator) for _ in range(2))
        best = math.inf
        for _ in range(3):
            _wait(device)
            start = time.perf_counter()
            torch.mm(a, b)
            _wait(device)
            best = min(best, time.perf_counter() - start)
        return best

    seconds(256)  # loads the library
    rate, size, start = 0.0, 256, time.perf_counter()
    while size <= 8192:
        last = seconds(size)
        rate = max(rate, 2 * size**3 / last)
        size *= 2
        # The next size costs 8 times as much for each of three products, and about as much again to set up.
        if time.perf_counter() - start + 8 * 4 * last > budget_s:
            break
    return rate


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
