"""Regime: what every training method inherits. A method says which loss on which tokens; the rest is here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.distributed.tensor import DTensor
from torchmetrics import Metric
from transformers import PreTrainedTokenizerBase

from lit_reason.core.config import OptimConfig
from lit_reason.core.optim import Rate, build_optimizer
from lit_reason.core.schedules import build_schedule
from lit_reason.core.world_size import fit_progress
from lit_reason.data.packing import Pack
from lit_reason.data.prompts import EvalPrompt
from lit_reason.errors import UserError, did_you_mean
from lit_reason.kernels.head_loss import HeadOut
from lit_reason.metrics.segments import SegmentMeter
from lit_reason.models.config import ModelConfig
from lit_reason.models.language_model import LanguageModel
from lit_reason.models.loading import load_tokenizer
from lit_reason.rollout.config import SamplingConfig
from lit_reason.rollout.sampler import sample
from lit_reason.strategies import fsdp2  # noqa: F401  # makes `trainer.strategy: fsdp2` known
from lit_reason.strategies.clipping import clip_norm
from lit_reason.strategies.sharding import shard


class Regime(LightningModule):
    """Base of all training regimes: builds the model, optimizer and schedule, and normalises exactly.

    A subclass implements `training_step`. Batches are `Pack`s unless its data module and it agree on something else.

    Args:
        lm: the model.
        optim: optimizer and schedule.
        sampling: how `predict` and verified generation sample.

    Attributes:
        lm: the model, once Lightning has called `configure_model`.
        learns: the training figure by which one sees that the method learns, and which way it goes then.
        collects: of a method that changes no weight and has no optimizer, the name of the file in the run folder that
            its fit makes; None of one that trains.
    """

    lm: LanguageModel
    learns: ClassVar[tuple[str, Literal["falls", "rises"]]] = ("train/loss", "falls")
    collects: ClassVar[str | None] = None

    def __init__(
        self,
        lm: ModelConfig,
        optim: OptimConfig = OptimConfig(),  # noqa: B008 (frozen)
        sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__()
        self.lm_config, self.optim_config, self.sampling = lm, optim, sampling
        self.train_meter, self.val_meter = SegmentMeter(), SegmentMeter()
        self._logged: dict[tuple[str, int], set[str]] = {}  # by prefix and meter

    @property
    def _data(self) -> Any:
        return getattr(self.trainer, "datamodule", None)

    # ---- model ----

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that belongs to the model."""
        return load_tokenizer(self.lm_config)

    def configure_model(self) -> None:
        """Build the model once, where Lightning wants it built (it may call this several times).

        Raises:
            UserError: the model cannot be had, or is made for shorter rows than the data module lets through.
        """
        if not hasattr(self, "lm"):
            self.lm = LanguageModel.load(self.lm_config)
            limit, longest = self.lm.max_length, getattr(self._data, "max_length", 0)
            if limit is not None and longest > limit:
                raise UserError(
                    f"data.max_length is {longest}, but the model is made for {limit} tokens: lower it, or raise the "
                    "model's limit with lm.overrides (max_position_embeddings, and rope_theta with it)"
                )
            self.spread(self.lm)

    def spread(self, lm: LanguageModel) -> None:
        """Lay a model's weights over the processes, where the strategy shards them.

        Args:
            lm: the model, whole.
        """
        if self.device_mesh is not None:
            shard(lm, self.device_mesh)

    def own_rates(self) -> Mapping[nn.Parameter, Rate]:
        """Parameters that have another learning rate than `optim` says; none by default."""
        return {}

    def configure_optimizers(self) -> Any:
        """The recipe's optimizer, and its schedule stepped once an optimizer step."""
        optimizer = build_optimizer(self, self.optim_config, self.own_rates())
        schedule = build_schedule(optimizer, int(self.trainer.estimated_stepping_batches), self.optim_config)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step", "name": "lr"},
        }

    # ---- loss ----

    def score(self, pack: Pack) -> HeadOut:
        """Weighted negative log-likelihood of the trained tokens, without logits of `[tokens, vocabulary]`.

        Args:
            pack: T tokens, S of them trained.

        Returns:
            The weighted sum, and log-probability, entropy and argmax hit of each of the S tokens.
        """
        hidden = self.lm.hidden(pack.ids, pack.positions, pack.cu_seqlens)
        return self.lm.head(hidden[pack.index], pack.targets, pack.target_weight)

    def normalise(self, loss_sum: torch.Tensor, pack: Pack) -> torch.Tensor:
        """The micro-batch's part of the step's loss, such that k micro-batches on n ranks equal one batch.

        Lightning divides by the number of accumulated micro-batches and averages gradients over ranks; both are
        undone here, and the sum is divided by the loss weight of the whole step (`Pack.norm`).
        """
        return loss_sum * (self.micro_batches / pack.norm)

    @property
    def micro_batches(self) -> int:
        """Micro-batches of an optimizer step, over all ranks."""
        ranks = (self.trainer.distributed_sampler_kwargs or {}).get("num_replicas", 1)
        return self.trainer.accumulate_grad_batches * ranks

    def record(self, meter: SegmentMeter, out: HeadOut, pack: Pack) -> None:
        """Add a scored pack to a meter."""
        meter.update(out.logp_S, out.entropy_S, out.hit_S, pack.target_weight, pack.target_segment, pack.target_decile)

    def log_meter(self, meter: Metric, prefix: str) -> None:
        """Log what a meter gathered since the last time, and reset it; nothing where a regime records nothing."""
        found = meter.compute() if meter.update_called else {}
        figures = {f"{prefix}/{name}": value for name, value in found.items()}
        meter.reset()
        before = self._logged.setdefault((prefix, id(meter)), set())
        results: Any = self.trainer._results  # Lightning would log a figure again that this time has no value
        for key in [key for key, value in results.items() if value.meta.name in before - figures.keys()]:
            del results[key]
        before.update(figures)
        for name, value in figures.items():
            self.log(name, value, prog_bar=name == f"{prefix}/loss", batch_size=1)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Log the training figures at the steps at which the trainer writes its logs.

        Here and not at the end of the batch: a checkpoint is saved there, and the step's figures belong before it.
        """
        every, step = getattr(self.trainer, "log_every_n_steps", 0), self.trainer.global_step + 1
        if every and step % every == 0:
            self.log_meter(self.train_meter, "train")

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Step, and let go of the gradients: Lightning would hold them through the next forward pass, to its peak."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        optimizer.zero_grad()

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the trainer is told; a norm over sharded gradients is taken mesh by mesh."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        by_norm = gradient_clip_val is not None and gradient_clip_val > 0 and gradient_clip_algorithm in (None, "norm")
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        if by_norm and not scaled and any(isinstance(p.grad, DTensor) for p in parameters):
            clip_norm(parameters, float(gradient_clip_val or 0))
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    # ---- checkpoints ----

    @property  # type: ignore[misc]
    def strict_loading(self) -> bool:
        """Adapter checkpoints hold the trained weights alone; `on_load_checkpoint` checks them instead."""
        return self.lm_config.adapter is None

    def _saved_names(self) -> dict[str, torch.Size]:
        if self.lm_config.adapter is None:
            return {name: value.shape for name, value in self.state_dict().items() if hasattr(value, "shape")}
        return {name: p.shape for name, p in self.named_parameters() if p.requires_grad}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """With an adapter, leave the frozen base out: the recipe names where it comes from."""
        if self.lm_config.adapter is not None:
            keep = self._saved_names()
            checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in keep}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another recipe before anything is changed, and fit it to the number of processes."""
        if "state_dict" in checkpoint:  # a strategy that reads shards itself has checked and read them
            self.check_weights({k: v.shape for k, v in checkpoint["state_dict"].items() if hasattr(v, "shape")})
        ranks = (self.trainer.distributed_sampler_kwargs or {}).get("num_replicas", 1)
        fit_progress(checkpoint, ranks)

    def check_weights(self, found: Mapping[str, Sequence[int]]) -> None:
        """Compare what a checkpoint holds with what this model saves.

        Args:
            found: shapes by name.

        Raises:
            UserError: names or shapes of the weights differ from this recipe's model.
        """
        expected = self._saved_names()
        for name in sorted(expected.keys() ^ found.keys()):
            here, other = ("has", "lacks") if name in expected else ("lacks", "has")
            raise UserError(
                f"the checkpoint does not fit this recipe: the model {here} {name}, the checkpoint {other} it"
                f"{did_you_mean(name, found if name in expected else expected)}"
            )
        for name, shape in expected.items():
            if tuple(shape) != tuple(found[name]):
                raise UserError(
                    f"the checkpoint does not fit this recipe: {name} is {tuple(found[name])} in the checkpoint, "
                    f"{tuple(shape)} in the model"
                )

    # ---- evaluation ----

    def validation_step(self, batch: Pack, batch_idx: int) -> None:
        """Score held-out rows as training would."""
        self.record(self.val_meter, self.score(batch), batch)

    def on_validation_epoch_end(self) -> None:
        """Log the held-out figures."""
        self.log_meter(self.val_meter, "val")

    def test_step(self, batch: Pack, batch_idx: int) -> None:
        """Score test rows as training would."""
        self.record(self.val_meter, self.score(batch), batch)

    def on_test_epoch_end(self) -> None:
        """Log the test figures."""
        self.log_meter(self.val_meter, "test")

    def predict_step(self, batch: list[EvalPrompt], batch_idx: int) -> list[dict[str, Any]]:
        """Answer prompts: one record a completion, as written to `predictions.jsonl`."""
        completions = sample(
            self.lm,
            self.tokenizer,
            [prompt.ids for prompt in batch],
            self.sampling,
            stop_ids=self._data.stop_ids,
            progress=False,
        )
        return [
            {
                "row_id": batch[c.prompt_index].row_id,
                "prompt": batch[c.prompt_index].text,
                "sample": c.sample_index,
                "completion": c.text,
                "ended": c.closed_eos,
                "answer": batch[c.prompt_index].answer,
            }
            for c in completions
        ]
