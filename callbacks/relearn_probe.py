"""RelearnProbe: how fast does what was forgotten come back when the model sees some of it again?"""

from __future__ import annotations

from itertools import cycle
from statistics import fmean
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_reason.core.probe import need_scores, need_whole_weights, report, weights_put_back
from lit_reason.data.unlearning.datamodule import packs_of
from lit_reason.data.unlearning.pairs import RoleRows
from lit_reason.data.unlearning.rows import Role, document_of
from lit_reason.errors import UserError


class RelearnProbe(Callback):
    """After training, trains on every second document to forget, and reports what that brings back of the others.

    Rows of one document share what their ids begin with; a row of any other kind is a document of its own. The others
    are never trained on here, so what comes back was only hidden. Logs `probe/relearn_loss_before`, `_after`
    (mean loss of those rows), `_memory_before` and `_after` (mean of their forget scores, token by token), and writes
    `relearn.json`. The weights are put back.

    Args:
        steps: optimizer steps of plain training.
        lr: learning rate of AdamW.
    """

    def __init__(self, steps: int = 20, lr: float = 1e-4) -> None:
        if steps < 1:
            raise UserError(f"RelearnProbe.steps is {steps}; it must be at least 1")
        self.steps, self.lr = steps, lr

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find out before training that the probe cannot run.

        Raises:
            UserError: nothing to measure by, weights in shards, or a single document.
        """
        need_scores(pl_module, "RelearnProbe")
        need_whole_weights(pl_module, "RelearnProbe")
        if not halves(trainer.datamodule.store)[1]:  # type: ignore[attr-defined]
            raise UserError("RelearnProbe needs at least two documents to forget: one to show, one to ask for")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run the probe."""
        module: Any = pl_module
        store = trainer.datamodule.store  # type: ignore[attr-defined]
        shown, others = halves(store)
        with weights_put_back(pl_module):
            before = memory(module, others)
            self._relearn(module, store, shown)
            after = memory(module, others)
        pairs = (("loss", 0), ("memory", 1))
        moments = (("before", before), ("after", after))
        report(trainer, "relearn", {f"{name}_{when}": found[i] for name, i in pairs for when, found in moments})

    def _relearn(self, module: Any, store: RoleRows, shown: list[int]) -> None:
        trained = [p for p in module.lm.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.lr, weight_decay=0.0)
        packs = [pack.to(module.device) for _, pack in packs_of(store, shown, tokens=2048)]
        with torch.enable_grad():
            for _, pack in zip(range(self.steps), cycle(packs), strict=False):
                (module.score(pack).loss_sum / pack.norm).backward()
                optimizer.step()
                optimizer.zero_grad()


def halves(store: RoleRows) -> tuple[list[int], list[int]]:
    """Numbers of the rows of every second document to forget, and of those of the others.

    Args:
        store: the rows.
    """
    of = {int(i): document_of(store.rows[i].row_id) for i in store.numbers(Role.FORGET)}
    shown = set(list(dict.fromkeys(of.values()))[::2])
    return [i for i, name in of.items() if name in shown], [i for i, name in of.items() if name not in shown]


def memory(module: Any, numbers: list[int]) -> tuple[float, float]:
    """What a module remembers of some rows to forget: their mean loss, and the mean of their forget scores.

    Args:
        module: an unlearning regime.
        numbers: of the rows.
    """
    scores, losses = module.rescore(numbers=numbers)
    return losses["forget_loss"], fmean(scores.scores.values()) if scores.scores else 0.0
