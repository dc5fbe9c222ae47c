"""What an environment says, as tokens that continue a dialogue. The chat so far is never rendered again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lit_reason.data.rendering.chat_template import ChatTemplate
from lit_reason.data.rendering.text_encoder import TextEncoder
from lit_reason.errors import RowError, UserError

_QUESTION, _TURN, _OBSERVATION = "Question?", "An answer 4711.", "An observation 1234."


class ObservationEncoder:
    """Tokens that the chat template puts around an observation, found once by rendering a probe.

    Between two turns of the model stand: the end of the first (unless the model sampled an end token itself), the
    observation as a message, and the prompt of the next. Only these are tokenised; what the model wrote stays the ids
    it sampled.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        stop_ids: tokens known to end a turn; the template's own end token is added.
        role: role of the message that carries an observation.
        template_kwargs: variables for the template, such as `enable_thinking`.

    Attributes:
        stop_ids: all tokens that end a turn.

    Raises:
        UserError: the template is not append-only: it rewrites the chat so far when a message is added, or does not
            write the message. Ids sampled earlier would no longer be those that the model is trained to continue.
    """

    def __init__(
        self, tokenizer: Any, stop_ids: Sequence[int], role: str = "user", template_kwargs: dict[str, Any] | None = None
    ) -> None:
        self.template = ChatTemplate(tokenizer, template_kwargs, stop_ids)
        known = (*stop_ids, self.template.traits.end_id)
        self.stop_ids = tuple(dict.fromkeys(i for i in known if i is not None))
        self._encoder, self._backend = TextEncoder(tokenizer), tokenizer.backend_tokenizer
        chat = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _TURN}]
        said = {"role": role, "content": _OBSERVATION}
        try:
            before = self.template.render(chat)
            after = self.template.render([*chat, said], prompt=True)
        except RowError as error:
            raise UserError(f"the chat template takes no message of role '{role}' behind an answer: {error}") from error
        end = before.rfind(_TURN) + len(_TURN)
        if before.rfind(_TURN) < 0 or not after.startswith(before[:end]) or after.count(_OBSERVATION) != 1:
            raise UserError(
                "the chat template is not append-only: it writes the chat so far differently once a message is added, "
                "or drops the message, so a multi-turn rollout would be trained on other tokens than it sampled; set "
                "lm.chat_template to one that only appends"
            )
        head, tail = after[end:].split(_OBSERVATION)
        self._head, self._tail = self._ids(head), self._ids(tail)

    def prompt_ids(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Tokens of the messages that open a dialogue, the prompt of the first turn included.

        Args:
            messages: role and content of each.
        """
        return self._ids(self.template.render(messages, prompt=True))

    def ids(self, observation: str, *, ended: bool, room: int) -> list[int]:
        """Tokens between two turns.

        Special tokens written out in the observation become ordinary text: what an environment says cannot end a turn
        or open another.

        Args:
            observation: what the environment says.
            ended: the model's turn ended in an end token, which it sampled itself.
            room: most tokens to return; an observation that needs more loses its middle.

        Returns:
            At most `room` tokens, or none at all where not even an empty observation fits.
        """
        head = self._head[1:] if ended and self._head and self._head[0] in self.stop_ids else self._head
        left = room - len(head) - len(self._tail)
        if left < 0:
            return []
        text = self._plain(observation)
        if len(text) > left:
            text = [*text[: left - left // 2], *text[len(text) - left // 2 :]]
        return [*head, *text, *self._tail]

    def _ids(self, text: str) -> list[int]:
        return self._encoder.encode(text).ids.tolist()

    def _plain(self, text: str) -> list[int]:
        self._backend.encode_special_tokens = True
        try:
            return self._encoder.encode_piece(text).ids.tolist()
        finally:
            self._backend.encode_special_tokens = False
