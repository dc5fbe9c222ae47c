"""Unlearning losses, by the names of the literature. A loss is a function of one micro-batch (`Step`).

`f` is a row to forget, `r` one to retain, `CE` the mean loss of tokens, `KL` that between the model before training and
now. All of them may keep the retain rows by a term of their own.

| class | loss | source |
|---|---|---|
| `GA` | -CE(f) | arXiv 2210.01504 |
| `GD` | -gamma CE(f) + alpha CE(r) | arXiv 2203.12817, 2401.06121 |
| `KL` | -CE(f) + alpha KL(r) | arXiv 2401.06121 |
| `NPO` | -(2 / beta) log sigmoid(-beta log-ratio(f)) | arXiv 2404.05868 |
| `SimNPO` | -(2 / beta) log sigmoid(-beta mean log-probability(f) - margin) | arXiv 2410.07163 |
| `IdkDPO` | NPO with a refusal that is preferred to f | arXiv 2401.06121 |
| `RMU` | squared distance of a layer's state from a random direction, and on r from what it was | arXiv 2403.03218 |
| `RetainOnly` | CE(r) | the model that never saw f: from before memorising, the gold standard |
| `Memorize` | CE of both sets | makes a model that has something to forget |
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_reason.data.unlearning.rows import Role
from lit_reason.errors import UserError
from lit_reason.losses.preference import check_beta, npo_loss, pair_loss, simnpo_loss
from lit_reason.regimes.unlearn.step import Step

Retain = Literal["none", "nll", "kl"]
Need = Literal["nothing", "sums", "model"]


class UnlearningLoss(ABC):
    """Base of all: a forget term, and a retain term chosen by name.

    Args:
        retain: `nll` keeps the likelihood of the retain rows, `kl` their distributions before training, `none` nothing.
        alpha: weight of the retain term.
        gamma: weight of the forget term.

    Attributes:
        anchor: rows that an epoch is a pass over.
        refuse: whether every forget row comes with a refusal.
    """

    anchor: ClassVar[tuple[Role, ...]] = (Role.FORGET,)
    refuse: ClassVar[bool] = False

    def __init__(self, retain: Retain = "none", alpha: float = 1.0, gamma: float = 1.0) -> None:
        if alpha < 0 or gamma < 0:
            raise UserError(f"loss.alpha is {alpha} and loss.gamma {gamma}; weights are not negative")
        self.retain, self.alpha, self.gamma = retain, alpha, gamma

    @property
    def partner(self) -> tuple[Role, ...]:
        """Rows that accompany the anchor."""
        return () if self.retain == "none" else (Role.RETAIN,)

    @property
    def needs(self) -> Need:
        """What the loss asks of the model before training: summed log-probabilities of rows, or all of it."""
        return "model" if self.retain == "kl" else "nothing"

    @property
    def trains_to(self) -> int | None:
        """The last layer that the loss depends on; None where that is the head."""
        return None

    @abstractmethod
    def forget(self, step: Step) -> Tensor:
        """The forget term.

        Args:
            step: the micro-batch.
        """

    def __call__(self, step: Step) -> Tensor:
        """The loss: this micro-batch's part of that of the whole optimizer step.

        Args:
            step: the micro-batch.
        """
        loss = self.gamma * self.forget(step)
        if self.retain == "nll":
            loss = loss + self.alpha * step.mean_nll(Role.RETAIN)
        elif self.retain == "kl":
            loss = loss + self.alpha * step.mean_divergence(Role.RETAIN)
        return loss


class GA(UnlearningLoss):
    """Gradient ascent on the rows to forget. It has no lower bound: give it a ceiling, or clip and stop in time.

    Args:
        retain: as in `UnlearningLoss`.
        alpha: weight of the retain term.
        gamma: weight of the forget term.
        ceiling: a token whose loss has reached this many nats is left alone; null for no ceiling.
    """

    def __init__(
        self, retain: Retain = "none", alpha: float = 1.0, gamma: float = 1.0, ceiling: float | None = None
    ) -> None:
        super().__init__(retain, alpha, gamma)
        if ceiling is not None:
            check_beta("loss.ceiling", ceiling)
        self.ceiling = ceiling

    def forget(self, step: Step) -> Tensor:
        """Minus the mean loss; under a ceiling, the mean distance of each token's loss from it, none below 0."""
        if self.ceiling is None:
            return -step.mean_nll(Role.FORGET)
        return step.mean_over_tokens(F.relu(self.ceiling + step.stats.logp_S), Role.FORGET)


class GD(GA):
    """Gradient difference: ascent on the rows to forget, descent on those to retain.

    Args:
        retain: as in `UnlearningLoss`.
        alpha: weight of the retain term.
        gamma: weight of the forget term.
        ceiling: as in `GA`.
    """

    def __init__(
        self, retain: Retain = "nll", alpha: float = 1.0, gamma: float = 1.0, ceiling: float | None = None
    ) -> None:
        super().__init__(retain, alpha, gamma, ceiling)


class KL(GA):
    """KL minimisation: ascent on the rows to forget, and the distributions of before on those to retain.

    Args:
        retain: as in `UnlearningLoss`.
        alpha: weight of the retain term.
        gamma: weight of the forget term.
        ceiling: as in `GA`.
    """

    def __init__(
        self, retain: Retain = "kl", alpha: float = 1.0, gamma: float = 1.0, ceiling: float | None = None
    ) -> None:
        super().__init__(retain, alpha, gamma, ceiling)


class NPO(UnlearningLoss):
    """Negative preference optimization: ascent that ends where a row has become unlikely. Sums over a row's tokens.

    Args:
        retain: as in `UnlearningLoss`.
        alpha: weight of the retain term.
        gamma: weight of the forget term.
        beta: inverse temperature.
    """

    def __init__(self, retain: Retain = "nll", alpha: float = 1.0, gamma: float = 1.0, beta: float = 0.1) -> None:
        super().__init__(retain, alpha, gamma)
        check_beta("loss.beta", beta)
        self.beta = beta

    @property
    def needs(self) -> Need:
        """All of the model for a KL term, else sums."""
        return "model" if self.retain == "kl" else "sums"

    def forget(self, step: Step) -> Tensor:
        """Mean over rows."""
        return step.mean_over_rows(npo_loss(step.log_ratios(Role.FORGET), beta=self.beta), Role.FORGET)


class SimNPO(UnlearningLoss):
    """NPO without a reference, on the mean log-probability of a row's tokens.

    Args:
        retain: as in `UnlearningLoss`.
        alpha: weight of the retain term.
        gamma: weight of the forget term.
        beta: inverse temperature.
        margin: how much further the row is pushed; what open-unlearning calls delta, times beta.
    """

    def __init__(
        self,
        retain: Retain = "nll",
        alpha: float = 1.0,
        gamma: float = 0.125,
        beta: float = 4.5,
        margin: float = 0.0,
    ) -> None:
        super().__init__(retain, alpha, gamma)
        check_beta("loss.beta", beta)
        self.beta, self.margin = beta, margin

    def forget(self, step: Step) -> Tensor:
        """Mean over rows."""
        losses = simnpo_loss(step.logp_means(Role.FORGET), beta=self.beta, margin=self.margin)
        return step.mean_over_rows(losses, Role.FORGET)


class IdkDPO(NPO):
    """DPO with a refusal preferred to the row to forget, scaled like NPO: `-(2 / beta) log sigmoid(...)`.

    Args:
        retain: as in `UnlearningLoss`.
        alpha: weight of the retain term.
        gamma: weight of the forget term.
        beta: inverse temperature.
    """

    refuse = True

    def forget(self, step: Step) -> Tensor:
        """Mean over rows."""
        chosen, rejected = step.log_ratios(Role.REFUSAL), step.log_ratios(Role.FORGET)
        return step.mean_over_rows(2 / self.beta * pair_loss(chosen, rejected, beta=self.beta), Role.FORGET)


class RMU(UnlearningLoss):
    """Representation misdirection: on forget rows a layer's state is driven to a random direction, on others held.

    Both terms are means over tokens and width. Train few layers up to the one that is read (`model.layers`); without
    that setting these are the layer and the two below it, as in the paper.

    Args:
        layer: whose state is read, from 0.
        coefficient: length of the wanted state.
        alpha: weight of the retain term.
        gamma: weight of the forget term.
        seed: of the random direction.
    """

    def __init__(
        self, layer: int = 7, coefficient: float = 20.0, alpha: float = 1.0, gamma: float = 1.0, seed: int = 0
    ) -> None:
        super().__init__("nll", alpha, gamma)
        self.layer, self.coefficient, self.seed = layer, coefficient, seed

    @property
    def needs(self) -> Need:
        """Its states."""
        return "model"

    @property
    def trains_to(self) -> int | None:
        """The layer whose state is read."""
        return self.layer

    def forget(self, step: Step) -> Tensor:
        """Squared distance from the random direction."""
        states = step.layer_states(self.layer, Role.FORGET)
        drawn = torch.rand(states.shape[-1], generator=torch.Generator().manual_seed(self.seed))
        wanted = self.coefficient * F.normalize(drawn, dim=0).to(states)
        return self._mean_square(states - wanted, step, Role.FORGET)

    def __call__(self, step: Step) -> Tensor:
        """Both terms."""
        now = step.layer_states(self.layer, Role.RETAIN)
        held = self._mean_square(now - step.layer_states(self.layer, Role.RETAIN, before=True), step, Role.RETAIN)
        return self.gamma * self.forget(step) + self.alpha * held

    @staticmethod
    def _mean_square(difference: Tensor, step: Step, role: Role) -> Tensor:
        return difference.square().mean(-1).sum() / step.pack.step_tokens.get(role, 1.0)


class RetainOnly(UnlearningLoss):
    """Plain training on the retain rows, for a model that has not seen the others."""

    anchor = (Role.RETAIN,)

    def __init__(self) -> None:
        super().__init__("none")

    def forget(self, step: Step) -> Tensor:
        """No row is there to be forgotten: the mean loss of the retain rows."""
        return step.mean_nll(Role.RETAIN)


class Memorize(UnlearningLoss):
    """Plain training on both sets, to make a model that has something to forget."""

    anchor = (Role.FORGET, Role.RETAIN)

    def __init__(self) -> None:
        super().__init__("none")

    def forget(self, step: Step) -> Tensor:
        """The mean loss of all tokens of both sets."""
        tokens = step.pack.step_tokens
        total = max(sum(tokens.values()), 1.0)
        return sum((step.mean_nll(role) * (n / total) for role, n in tokens.items()), step.stats.logp_S.sum() * 0)
