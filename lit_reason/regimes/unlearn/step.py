"""What an unlearning loss may ask of a micro-batch: log-probabilities, sums over rows, and the model before training.

Every mean divides by what the whole optimizer step holds, over all micro-batches and processes, so that the parts of
a step add up to it however it is split. Letters: T tokens of the pack, N its rows, S trained tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lit_reason.data.unlearning.pairs import RolePack
from lit_reason.data.unlearning.rows import Role
from lit_reason.errors import UserError
from lit_reason.losses.preference import sequence_sums
from lit_reason.models.language_model import LanguageModel

Reference = Callable[[], AbstractContextManager[LanguageModel]]


class Step:
    """One micro-batch as the losses see it. Whatever costs a forward pass is computed when it is asked for.

    Args:
        lm: the model.
        pack: the rows.
        reference: gives the model before training, for as long as a context lasts.
    """

    def __init__(self, lm: LanguageModel, pack: RolePack, reference: Reference) -> None:
        self.lm, self.pack, self._reference = lm, pack, reference
        self._taps: dict[int, Tensor] = {}

    # ---- the model ----

    @cached_property
    def hidden_TD(self) -> Tensor:
        """Last hidden states."""
        return self.lm.hidden(self.pack.ids, self.pack.positions, self.pack.cu_seqlens)

    @cached_property
    def stats(self) -> Any:
        """Log-probability (with gradient), entropy and hit of each trained token."""
        return self.lm.head.token_logprobs(self.hidden_TD[self.pack.index], self.pack.targets)

    def mean_nll(self, role: Role) -> Tensor:
        """This micro-batch's part of the mean loss of the tokens of a role."""
        return self.mean_over_tokens(-self.stats.logp_S, role)

    def mean_over_tokens(self, values_S: Tensor, role: Role) -> Tensor:
        """This micro-batch's part of a mean over the tokens of a role.

        Args:
            values_S: one number a trained token.
            role: whose tokens.
        """
        weights = self.pack.target_weight * (self.pack.role == role)
        return (values_S * weights).sum() / self.pack.step_tokens.get(role, 1.0)

    def mean_over_rows(self, values_N: Tensor, role: Role) -> Tensor:
        """This micro-batch's part of a mean over the rows of a role; rows that are stand-ins do not count.

        Args:
            values_N: one number for each row of the role.
            role: whose rows.
        """
        counts = self.pack.counts[self.pack.rows_of(role)]
        return (values_N * counts).sum() / self.pack.step_rows.get(role, 1)

    def logp_sums(self, role: Role) -> Tensor:
        """Summed log-probability of each row of a role."""
        return sequence_sums(self.stats.logp_S, self.pack.sequence, len(self.pack.roles))[self.pack.rows_of(role)]

    def logp_means(self, role: Role) -> Tensor:
        """Mean log-probability of the tokens of each row of a role."""
        ones = torch.ones_like(self.stats.logp_S)
        tokens = sequence_sums(ones, self.pack.sequence, len(self.pack.roles))[self.pack.rows_of(role)]
        return self.logp_sums(role) / tokens.clamp(min=1)

    # ---- the model before training ----

    def log_ratios(self, role: Role) -> Tensor:
        """By how much each row of a role is likelier than before training, in nats."""
        now = self.logp_sums(role)  # before the reference switches an adapter off
        return now - self.reference_sums(role)

    def reference_sums(self, role: Role) -> Tensor:
        """Summed log-probability of each row of a role before training."""
        if self.pack.reference is not None:
            return self.pack.reference[self.pack.rows_of(role)]
        return self._reference_sums(role)

    @torch.no_grad()
    def _reference_sums(self, role: Role) -> Tensor:
        with self._reference() as model:
            hidden, index, targets, sequence = self._of_role(model, role)
            logp = model.head(hidden[index], targets).logp_S
        return sequence_sums(logp, sequence, len(self.pack.roles))[self.pack.rows_of(role)]

    def mean_divergence(self, role: Role) -> Tensor:
        """This micro-batch's part of the mean KL(before training, now) at the trained tokens of a role.

        Masked to those tokens and divided by their number: padding does not exist here, and does not count.

        Args:
            role: whose tokens.
        """
        hidden_TD, chosen = self.hidden_TD, self.pack.role == role  # before the reference switches an adapter off
        weights = self.pack.target_weight[chosen] / self.pack.step_tokens.get(role, 1.0)
        with torch.no_grad(), self._reference() as model:
            hidden_ref, index, _, _ = self._of_role(model, role)
            head = None if model is self.lm else model.head
        rows = hidden_TD[self.pack.index[chosen]]
        return self.lm.head.divergence(rows, hidden_ref[index], weights, kind="fkl", reference=head).loss_sum

    def _of_role(self, model: LanguageModel, role: Role) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A model's hidden states over the rows of one role alone, with index, targets and sequence of its tokens."""
        rows, chosen = self.pack.rows_of(role), self.pack.role == role
        start, stop = sum(self.pack.lengths[: rows.start]), sum(self.pack.lengths[: rows.stop])
        cu_seqlens = self.pack.cu_seqlens[rows.start : rows.stop + 1] - start
        hidden = model.hidden(self.pack.ids[start:stop], self.pack.positions[start:stop], cu_seqlens)
        return hidden, self.pack.index[chosen] - start, self.pack.targets[chosen], self.pack.sequence[chosen]

    # ---- inner layers ----

    def layer_states(self, layer: int, role: Role, *, before: bool = False) -> Tensor:
        """What a decoder layer hands on at the trained tokens of a role, `[tokens, D]`.

        Args:
            layer: number of the layer, from 0.
            role: whose tokens.
            before: of the model before training, without gradient.
        """
        if before:
            with torch.no_grad(), self._reference() as model, Tap(model, layer) as tap:
                _, index, _, _ = self._of_role(model, role)
                return tap.states()[index]
        if layer not in self._taps:
            with Tap(self.lm, layer) as tap:
                self.lm.hidden(self.pack.ids, self.pack.positions, self.pack.cu_seqlens)
                self._taps[layer] = tap.states()
        return self._taps[layer][self.pack.index[self.pack.role == role]]


class Tap:
    """Catches what a decoder layer hands on, while the context lasts.

    Args:
        lm: the model.
        layer: number of the layer, from 0.

    Raises:
        UserError: the model has no such layer.
    """

    def __init__(self, lm: LanguageModel, layer: int) -> None:
        layers = lm.layers
        if not 0 <= layer < len(layers):
            raise UserError(f"loss.layer is {layer}; the model has layers 0 to {len(layers) - 1}")
        self._module = layers[layer]
        self._caught: list[Any] = []

    def __enter__(self) -> Tap:
        self._handle = self._module.register_forward_hook(lambda _, __, out: self._caught.append(out))
        return self

    def __exit__(self, *_: Any) -> None:
        self._handle.remove()

    def states(self) -> Tensor:
        """`[T, D]` of the last pass, in at least 32 bits."""
        out = self._caught[-1]
        states = out[0] if isinstance(out, tuple) else out
        return states.reshape(-1, states.shape[-1]).to(torch.promote_types(states.dtype, torch.float32))
