"""Perplexity and bits per byte, over all tokens and all ranks."""

from __future__ import annotations

import math

import torch
from torchmetrics import Metric


class PerplexityMeter(Metric):
    """Sums since the last reset, so that batches of any size and shape give one exact figure.

    Args:
        legacy_divisor: report `perplexity_legacy` too: batch means summed over n batches and divided by n + 1, as the
            evaluation loops of the low-rank literature do. It is too low by a factor of `exp(loss / (n + 1))`, and
            depends on the batch size. For comparison with published figures alone.
    """

    full_state_update = False
    nll: torch.Tensor
    tokens: torch.Tensor
    text_bytes: torch.Tensor
    batch_means: torch.Tensor
    batches: torch.Tensor

    def __init__(self, legacy_divisor: bool = False) -> None:
        super().__init__()
        self.legacy_divisor = legacy_divisor
        for name in ("nll", "tokens", "text_bytes", "batch_means", "batches"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, logp: torch.Tensor, text_bytes: int) -> None:
        """Add a batch.

        Args:
            logp: `[S]` log-probability of each predicted token, in nats.
            text_bytes: UTF-8 bytes of the text that these tokens stand for; 0 where nobody counted them.
        """
        if not logp.numel():
            return
        nll = -logp.detach().double().sum()
        self.nll += nll
        self.tokens += logp.numel()
        self.text_bytes += text_bytes
        self.batch_means += nll / logp.numel()
        self.batches += 1

    def compute(self) -> dict[str, torch.Tensor]:
        """`perplexity` = exp of the mean over tokens; `bits_per_byte`, which compares between tokenizers, where bytes
        were counted; `perplexity_legacy` where asked for. Empty before the first batch."""
        if not float(self.tokens):
            return {}
        out = {"perplexity": (self.nll / self.tokens).exp()}
        if float(self.text_bytes):
            out["bits_per_byte"] = self.nll / (math.log(2) * self.text_bytes)
        if self.legacy_divisor:
            out["perplexity_legacy"] = (self.batch_means / (self.batches + 1)).exp()
        return {name: value.float() for name, value in out.items()}
