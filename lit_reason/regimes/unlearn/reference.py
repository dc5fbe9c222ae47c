"""The model before training, held in one of three ways"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Literal

import torch

from lit_reason.data.unlearning.datamodule import packs_of
from lit_reason.data.unlearning.pairs import RoleRows
from lit_reason.data.unlearning.rows import Role
from lit_reason.errors import UserError
from lit_reason.losses.preference import sequence_sums
from lit_reason.models.config import ModelConfig
from lit_reason.models.language_model import LanguageModel
from lit_reason.regimes.unlearn.losses import UnlearningLoss

ReferenceMode = Literal["auto", "copy", "adapter_off", "cached"]


class Reference:
    """Where the model before training comes from.

    Args:
        mode: see `UnlearnRegime.reference`.
        loss: what asks for it.
        lm: settings of the model.

    Raises:
        UserError: the mode cannot give what the loss needs, or would give another model.
    """

    def __init__(self, mode: ReferenceMode, loss: UnlearningLoss, lm: ModelConfig) -> None:
        fresh = lm.adapter is not None and lm.adapter.folder is None and not lm.adapter.train_rest
        if mode == "cached" and loss.needs == "model":
            name = type(loss).__name__
            raise UserError(
                f"model.reference is cached, which keeps one number a row, and {name} needs more: take copy"
            )
        if mode == "adapter_off" and not fresh:
            raise UserError(
                "model.reference is adapter_off: the model without its adapter is the one before training only where "
                "lm.adapter is new (no folder, no train_rest); take copy"
            )
        self.copy = mode == "copy" or not fresh
        self.cached = mode == "cached" and loss.needs == "sums"

    def of(self, lm: LanguageModel) -> AbstractContextManager[LanguageModel]:
        """The model before training, for as long as the context lasts.

        Args:
            lm: the model now.
        """
        return lm.as_reference(copy=self.copy)

    @staticmethod
    @torch.no_grad()
    def sums(lm: LanguageModel, store: RoleRows, tokens: int) -> dict[str, float]:
        """Summed log-probability of each row to forget, and of its refusal, under the present weights.

        Args:
            lm: the model, before training.
            store: the rows.
            tokens: tokens of a pack.

        Returns:
            By `RoleRows.key`.
        """
        found: dict[str, float] = {}
        training = lm.training
        lm.eval()
        for numbers, pack in packs_of(store, store.numbers(Role.FORGET, Role.REFUSAL).tolist(), tokens):
            moved = pack.to(lm.device)
            hidden = lm.hidden(moved.ids, moved.positions, moved.cu_seqlens)
            logp = lm.head(hidden[moved.index], moved.targets).logp_S
            sums = sequence_sums(logp, moved.sequence, len(moved.roles)).tolist()
            found.update(zip([store.key(i) for i in numbers], sums, strict=True))
        lm.train(training)
        return found
