"""Pretraining: the likelihood of plain text, every token of it."""

from __future__ import annotations

import dataclasses
from functools import cached_property

import torch
from torchmetrics import Metric
from transformers import PreTrainedTokenizerBase

from lit_reason.core.config import OptimConfig
from lit_reason.core.regime import Regime
from lit_reason.data.packing import Pack
from lit_reason.errors import UserError
from lit_reason.kernels.head_loss import HeadOut
from lit_reason.metrics.perplexity import PerplexityMeter
from lit_reason.metrics.segments import SegmentMeter
from lit_reason.models.config import ModelConfig
from lit_reason.models.loading import load_tokenizer
from lit_reason.rollout.config import SamplingConfig


class PretrainRegime(Regime):
    """Minimise the mean negative log-likelihood of all tokens of the optimizer step, on all ranks.

    A model from `lm.config` without `lm.tokenizer` gets the tokenizer that the data module trains on the text. Which
    parameters are trained and how (full-rank, low-rank, projected gradients) is said by `lm` and `optim`.

    Args:
        lm: the model.
        optim: optimizer and schedule.
        sampling: how text is sampled from the model.
        legacy_eval_divisor: log `val/perplexity_legacy` too, with the evaluation error of the low-rank literature
            (its batch means divided by n + 1), for comparison with published figures alone.
    """

    def __init__(
        self,
        lm: ModelConfig,
        optim: OptimConfig = OptimConfig(lr=1e-3, warmup=0.1),  # noqa: B008 (frozen)
        sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 (frozen)
        legacy_eval_divisor: bool = False,
    ) -> None:
        super().__init__(lm, optim, sampling)
        self.perplexity = PerplexityMeter(legacy_eval_divisor)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that the recipe names, else the one trained on the training text.

        Raises:
            UserError: neither is to be had.
        """
        if self.lm_config.path or self.lm_config.tokenizer:
            return load_tokenizer(self.lm_config)
        if not hasattr(self._data, "trained_tokenizer"):
            raise UserError("lm.tokenizer is missing, and only TextData can train one: name a tokenizer")
        return self._data.trained_tokenizer()

    def configure_model(self) -> None:
        """Build the model; one from `lm.config` takes its start, end and padding tokens from the tokenizer.

        Raises:
            UserError: as in `Regime`, or the model's vocabulary is smaller than the tokenizer's.
        """
        fields = self.lm_config.config
        if fields is not None and not hasattr(self, "lm"):
            ends = {name: getattr(self.tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
            self.lm_config = dataclasses.replace(self.lm_config, config={**ends, **fields})
        super().configure_model()
        size, needed = self.lm.head.weight.shape[0], len(self.tokenizer)
        if size < needed:
            raise UserError(f"the model has a vocabulary of {size:,} (vocab_size), the tokenizer one of {needed:,}")

    def training_step(self, batch: Pack, batch_idx: int) -> torch.Tensor:
        """Score one pack and return its part of the step's loss."""
        out = self.score(batch)
        self.record(self.train_meter, out, batch)
        return self.normalise(out.loss_sum, batch)

    def record(self, meter: SegmentMeter, out: HeadOut, pack: Pack) -> None:
        """Add a scored pack to a meter, a held-out one to the perplexity too."""
        super().record(meter, out, pack)
        if meter is self.val_meter:
            self.perplexity.update(out.logp_S, pack.text_bytes)

    def log_meter(self, meter: Metric, prefix: str) -> None:
        """Log what a meter gathered, and beside held-out figures the perplexity."""
        if meter is self.val_meter:
            super().log_meter(self.perplexity, prefix)
        super().log_meter(meter, prefix)
