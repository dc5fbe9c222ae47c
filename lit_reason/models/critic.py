"""A critic: what a state is worth, as one number a token, on the policy's own trunk or on one of its own.

Shape letters: T packed tokens, D width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from lit_reason.errors import UserError
from lit_reason.models.config import ModelConfig
from lit_reason.models.language_model import LanguageModel


class Critic(nn.Module):
    """A linear value on hidden states, 0 everywhere before training.

    Args:
        width: size of the hidden states.
        trunk: a model of the critic's own, whose output layer is left alone; None reads the policy's hidden states.
    """

    def __init__(self, width: int, trunk: LanguageModel | None = None) -> None:
        super().__init__()
        self.value = nn.Linear(width, 1)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)
        self.trunk = trunk
        if trunk is not None and trunk.head.layer.weight is not trunk.base.get_input_embeddings().weight:  # type: ignore[union-attr]
            trunk.head.layer.requires_grad_(False)

    @classmethod
    def beside(cls, lm: LanguageModel, config: ModelConfig, *, separate: bool) -> Critic:
        """A critic for a policy.

        Args:
            lm: the policy.
            config: where the policy came from; a separate trunk comes from there too, all of its weights trained.
            separate: with a trunk of its own.
        """
        width = lm.head.weight.shape[1]
        own = LanguageModel.load(dataclasses.replace(config, adapter=None)) if separate else None
        return cls(width, own).to(lm.device)

    @torch.no_grad()
    def begin_as(self, trunk: LanguageModel, weight: Tensor, bias: float) -> None:
        """Take the weights of another model with a number on its hidden states, such as a reward.

        Args:
            trunk: of the same architecture as this critic's own, laid over processes alike.
            weight: `[1, D]`.
            bias: added to it.

        Raises:
            UserError: the two trunks differ in shape.
        """
        assert self.trunk is not None, "a shared trunk is the policy's"
        own, other = (dict(model.named_parameters()) for model in (self.trunk, trunk))
        if {n: p.shape for n, p in own.items()} != {n: p.shape for n, p in other.items()}:
            raise UserError("a critic cannot begin as a model of another shape than the policy's")
        for name, parameter in own.items():
            parameter.copy_(other[name])
        self.value.weight.copy_(weight)
        self.value.bias.fill_(bias)

    def shard(self, mesh: Any) -> None:
        """Spread the value layer over processes; a trunk of its own is spread like any model.

        Args:
            mesh: data-parallel mesh.
        """
        fully_shard(self.value, mesh=mesh)

    def forward(self, hidden_TD: Tensor, ids_T: Tensor, positions_T: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Value of the state behind each token.

        Args:
            hidden_TD: the policy's last hidden states, read where there is no trunk.
            ids_T: tokens, as for `LanguageModel.hidden`.
            positions_T: their positions.
            cu_seqlens: boundaries of documents.

        Returns:
            `float32 [T]`.
        """
        if self.trunk is not None:
            hidden_TD = self.trunk.hidden(ids_T, positions_T, cu_seqlens)
        return self.value(hidden_TD.to(torch.float32))[:, 0]
