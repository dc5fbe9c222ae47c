"""Supervised fine-tuning on reasoning traces, full or condensed (EPiC, arXiv 2506.04205).

EPiC is a change of the data, made by `data.condense`: loss and model are those of plain fine-tuning.
"""

from __future__ import annotations

import torch

from lit_reason.core.regime import Regime
from lit_reason.data.packing import Pack


class SFTRegime(Regime):
    """Minimise the weighted negative log-likelihood of the trained tokens.

    With loss weight `w_t` of token `t` and the sum over the whole optimizer step, on all ranks:
    `loss = sum_t w_t * -log p(t | before) / sum_t w_t`.

    Args:
        lm: the model.
        optim: optimizer and schedule.
        sampling: how `predict` and verified generation sample.
    """

    def training_step(self, batch: Pack, batch_idx: int) -> torch.Tensor:
        """Score one pack and return its part of the step's loss."""
        out = self.score(batch)
        self.record(self.train_meter, out, batch)
        return self.normalise(out.loss_sum, batch)
