"""What a reward of whole responses is: from token ids to one number, and what else it can say about the tokens.

Shape letters: N responses, L tokens of prompt and response, T tokens of a response.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lit_reason.errors import UserError


class SequenceReward(ABC):
    """A reward of token ids. It reads masked copies of a response, too.

    Attributes:
        version: changes whenever the reward does; attributions of an earlier version are forgotten.
    """

    version: str = ""

    @abstractmethod
    def __call__(self, ids_NL: Tensor, seen_NL: Tensor) -> Tensor:
        """Score responses.

        Args:
            ids_NL: prompt and response of each.
            seen_NL: False for padding and for masked tokens.

        Returns:
            `float [N]`.
        """

    def load(self) -> None:  # noqa: B027 (most rewards need nothing)
        """Read what the reward needs, once before training."""

    def for_task(self, task: Mapping[str, Any], start: int) -> SequenceReward:
        """The reward of answers to one task; itself where the tokens say all.

        Args:
            task: row of the training data.
            start: where the answer begins.
        """
        return self

    def prefixes(self, ids_L: Tensor, start: int) -> Tensor | None:
        """Reward after each token of a response, where one pass gives them all.

        Args:
            ids_L: prompt and response.
            start: where the response begins.

        Returns:
            `float [T + 1]`, from that of the empty response on; None: they have to be scored one by one.
        """
        return None

    def attention(self, ids_L: Tensor, start: int) -> Tensor:
        """Attention of the last token to each token of the response.

        Args:
            ids_L: prompt and response.
            start: where the response begins.

        Returns:
            `float [T]`, not negative.

        Raises:
            UserError: this reward pays none.
        """
        raise UserError(f"explainer 'attention' needs a reward model that attends; {type(self).__name__} does not")
