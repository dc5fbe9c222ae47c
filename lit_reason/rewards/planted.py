"""A planted reward: every token, and every pair of neighbours, is worth a number drawn once. For tests and studies."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_reason.errors import UserError
from lit_reason.rewards.sequence_reward import SequenceReward


class PlantedReward(SequenceReward):
    """Sum of the tokens' worths, and of those of pairs of neighbours, over all seen tokens behind `skip`.

    Args:
        vocabulary: number of token ids.
        pairs: standard deviation of the worths of pairs, against 1 of those of tokens; 0 makes the reward additive.
        skip: tokens at the start that are worth nothing, such as the prompt.
        seed: of the worths.
    """

    def __init__(self, vocabulary: int, pairs: float = 0.0, skip: int = 0, seed: int = 0) -> None:
        if vocabulary < 1:
            raise UserError(f"PlantedReward.vocabulary is {vocabulary}; it must be at least 1")
        generator = torch.Generator().manual_seed(seed)
        self.token_V = torch.randn(vocabulary, generator=generator, dtype=torch.float64)
        self.pair_VV = torch.zeros((1, 1), dtype=torch.float64)
        if pairs:
            self.pair_VV = pairs * torch.randn((vocabulary, vocabulary), generator=generator, dtype=torch.float64)
        self.pairs = pairs
        self.skip, self.version = skip, f"planted {vocabulary} {pairs} {skip} {seed}"

    def __call__(self, ids_NL: Tensor, seen_NL: Tensor) -> Tensor:
        """Add up what is seen."""
        ids_NL, seen_NL = ids_NL[:, self.skip :], seen_NL[:, self.skip :]
        if len(ids_NL) and ids_NL.numel() and int(ids_NL.max()) >= len(self.token_V):
            raise UserError(f"PlantedReward.vocabulary is {len(self.token_V)}; a response holds {int(ids_NL.max())}")
        tokens_N = (self.token_V[ids_NL] * seen_NL).sum(1)
        if not self.pairs:
            return tokens_N
        both = seen_NL[:, :-1] & seen_NL[:, 1:]
        return tokens_N + (self.pair_VV[ids_NL[:, :-1], ids_NL[:, 1:]] * both).sum(1)
