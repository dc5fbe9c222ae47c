"""Conversation to TokenRow: the chat template writes the text, character offsets say what each token is.

For each trained assistant turn k, `prompt_k` is the template's generation prompt over the turns before it and
`full_k` the template's text up to and with it. `full_k` must begin with `prompt_k`, and what follows is
trained up to the end token. When the text of every trained turn is a beginning of the last one's text, one
row serves them all; when the template rewrites earlier turns (thinking models drop old thoughts) each
trained turn becomes a row.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from lit_reason.data.condensation.markers import MARKERS
from lit_reason.data.config import RenderConfig
from lit_reason.data.conversation import Conversation, Message
from lit_reason.data.rendering.chat_template import ChatTemplate, TemplateMismatch, reasoning_parts
from lit_reason.data.rendering.segment_weights import segment_weights
from lit_reason.data.rendering.stop_tokens import choose_pad_id, known_stop_ids
from lit_reason.data.rendering.template_traits import TemplateTraits
from lit_reason.data.rendering.text_encoder import Encoded, TextEncoder
from lit_reason.data.rendering.turn_layout import Piece, TurnLayout, lay_out
from lit_reason.data.token_row import DECILE_NONE, Segment, TokenRow
from lit_reason.errors import EmptyMask, RowError, UserError

RENDER_VERSION = 1  # part of `fingerprint`: raise when the same conversation would give other rows


@dataclass(frozen=True)
class _Turn:
    """A trained turn inside a text: prompt up to `start`, text up to `end`, end token up to `stop`."""

    start: int
    end: int
    stop: int
    layout: TurnLayout


@dataclass(frozen=True)
class _Draft:
    """The text of one row and its trained turns."""

    text: str
    turns: tuple[_Turn, ...]
    opening_ids: tuple[int, ...] = ()


class Renderer:
    """Turns conversations into token rows with loss weights and segments.

    Args:
        tokenizer: a fast tokenizer.
        config: mode, trained turns, weights.
        template_kwargs: variables for the chat template, such as `enable_thinking`.
        generation_eos: `eos_token_id` of the model's generation config.

    Attributes:
        mode: `chat` or `plain`, as resolved for rows that are no plain documents.
        stop_ids: ids that end a turn: the tokenizer's, the generation config's, and the template's own.
        pad_id: a padding id that ends no turn where the tokenizer has one (`choose_pad_id`).
        traits: what the chat template does; None in plain mode.
        encoder: text to token ids.

    Raises:
        UserError: a weight has an unknown name or is not a finite number >= 0; the tokenizer has no chat
        template
            although the mode asks for one, or no end token although rows need it.
    """

    def __init__(
        self,
        tokenizer: Any,
        config: RenderConfig,
        *,
        template_kwargs: Mapping[str, Any] | None = None,
        generation_eos: int | Sequence[int] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self._template_kwargs = dict(template_kwargs or {})
        self._weights = segment_weights(config.weights)
        if config.seam_tokens < 0 or not 0 <= config.mask_seam <= config.seam_tokens:
            raise UserError(
                f"render.mask_seam is {config.mask_seam} and render.seam_tokens {config.seam_tokens}: "
                "0 <= mask_seam <= seam_tokens is needed"
            )
        self.encoder = TextEncoder(tokenizer)
        has_template = bool(tokenizer.chat_template)
        if config.mode == "chat" and not has_template:
            raise _no_template()
        self.mode = "chat" if has_template and config.mode != "plain" else "plain"
        known = known_stop_ids(tokenizer, generation_eos)
        self._template = ChatTemplate(tokenizer, template_kwargs, known) if self.mode == "chat" else None
        self.traits: TemplateTraits | None = self._template.traits if self._template else None
        observed = (self.traits.end_id, self.traits.tool_end_id) if self.traits else ()
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys(i for i in (*known, *observed) if i is not None))
        self._stop_texts = tuple(str(tokenizer.convert_ids_to_tokens(i)) for i in self.stop_ids)
        if not self.stop_ids:
            raise UserError(
                "the tokenizer has no end-of-sequence token and its chat template writes none, so a student "
                "would never learn to stop: set eos_token in tokenizer_config.json, or give a template that "
                "ends turns"
            )
        self.pad_id = choose_pad_id(tokenizer, self.stop_ids)
        self._opening_ids = _default_opening(tokenizer, self._stop_texts[0])

    def rows(self, conversation: Conversation) -> list[TokenRow]:
        """Token rows of a conversation.

        Args:
            conversation: with `Message.trained` set, and `Message.trace` where a trace was segmented.

        Returns:
            One row, or one per trained turn (`row_id#1`, `row_id#2`, ...) when one text cannot serve them
            all.

        Raises:
            RowError: the conversation cannot be rendered, nothing in it is trained, or its text writes out an end
                token. `TemplateMismatch` when the chat template is to blame.
            UserError: it needs a chat template, the tokenizer has none, and `mode` is `auto`.
        """
        trained = [i for i, m in enumerate(conversation.messages) if m.trained]
        if self.config.train_on == "last":
            trained = trained[-1:]
        if not trained:
            raise EmptyMask("no trained turn in this conversation")
        if any(m.role == "text" for m in conversation.messages):
            drafts = [self._document(conversation)]
        else:
            self._need_template()
            shaped = self._template.messages(conversation.messages) if self._template else []
            drafts = [self._draft(conversation, k, shaped) for k in trained]
        if len(drafts) > 1 and _one_serves_all(drafts):
            shared = replace(drafts[-1], turns=tuple(d.turns[0] for d in drafts))
            encoded, agree = self.encoder.encode_at(shared.text, [t.start for t in shared.turns])
            if agree:
                return [self._row(shared, encoded, conversation.row_id)]
        name = f"{conversation.row_id}#{{}}" if len(drafts) > 1 else conversation.row_id
        return [self._row(draft, self._encode(draft), name.format(n)) for n, draft in enumerate(drafts, 1)]

    def prompt(self, conversation: Conversation) -> list[int]:
        """Ids to generate from: everything before the last assistant turn, with the generation prompt.

        Args:
            conversation: ends with an assistant turn (which is left out) or with a turn to be answered.

        Raises:
            RowError: the conversation cannot be rendered.
        """
        messages = conversation.messages
        return self.prompt_before(conversation, len(messages) - (messages[-1].role == "assistant"))

    def prompt_before(self, conversation: Conversation, turn: int) -> list[int]:
        """Ids to generate turn number `turn` from.

        Args:
            conversation: the turns.
            turn: how many turns stand before it.
        """
        before = replace(conversation, messages=conversation.messages[:turn])
        document = any(m.role == "text" for m in conversation.messages)
        if not document:
            self._need_template()
        if document or self._template is None:
            text, opening = "".join(self._plain_text(m) for m in before.messages), self._opening_ids
        else:
            text, opening = self._chat_prompt(before), ()
        return [*opening, *self.encoder.encode(text).ids.tolist()]

    def _need_template(self) -> None:
        if self._template is None and self.config.mode == "auto":
            raise _no_template()

    def written(self, conversation: Conversation, turn: int) -> tuple[str, str]:
        """What the chat template makes of a turn, unchecked.

        Args:
            conversation: the turns.
            turn: number of an assistant turn.

        Returns:
            The generation prompt before it, and the text up to its end; two empty texts in plain mode.

        Raises:
            RowError: the template refuses the conversation.
        """
        if self._template is None:
            return "", ""
        shaped = self._template.messages(conversation.messages)
        prompt = self._template.render(shaped[:turn], conversation.tools, prompt=True)
        return prompt, self._template.render(shaped[: turn + 1], conversation.tools)

    def fingerprint(self) -> str:
        """Hash of everything that decides rows: tokenizer, template, settings and the version of this
        code.
        """
        parts = (
            RENDER_VERSION,
            self.tokenizer.backend_tokenizer.to_str(),
            sorted(self.tokenizer.special_tokens_map.items()),
            self._template.source if self._template else None,
            self._template_kwargs,
            asdict(self.config),
            self.stop_ids,
        )
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    # --- text ---

    def _chat_prompt(self, before: Conversation) -> str:
        assert self._template is not None
        return self._template.render(self._template.messages(before.messages), before.tools, prompt=True)

    def _plain_text(self, message: Message) -> str:
        """A turn as it stands in plain mode; a trace in a field of its own is written between think
        markers.
        """
        if message.tool_calls:
            raise RowError("render.mode=plain cannot write tool calls: their form belongs to a chat template")
        parts = reasoning_parts(message, *MARKERS[0]) if message.role == "assistant" else None
        if parts is None:
            return message.content
        return parts.prefix + parts.opening + parts.body + parts.closing + parts.rest

    def _draft(self, conversation: Conversation, k: int, shaped: list[dict[str, Any]]) -> _Draft:
        """The text up to the end of trained turn `k`, with that turn laid out."""
        message = conversation.messages[k]
        self._refuse_written_end(message)
        if self._template is None:
            prompt = "".join(self._plain_text(m) for m in conversation.messages[:k])
            span = self._plain_text(message)
            layout = lay_out(message, span, "", MARKERS[0])
            return self._closed(message, prompt, span, layout, self._stop_texts[0], self._opening_ids)
        traits = self._template.traits
        prompt = self._template.render(shaped[:k], conversation.tools, prompt=True)
        if message.truncated or (self.config.turn_text == "verbatim" and not message.tool_calls):
            span = self._template.verbatim(message, prompt)
            layout = lay_out(message, span, prompt, traits.pair)
            return self._closed(message, prompt, span, layout, traits.end_text or self._stop_texts[0])
        full = self._template.render(shaped[: k + 1], conversation.tools)
        if not full.startswith(prompt):
            raise _broken_prefix(prompt, full)
        end, stop = self._end_of(full, len(prompt))
        layout = lay_out(message, full[len(prompt) : end], prompt, traits.pair)
        return _Draft(full[:stop], (_Turn(len(prompt), end, stop, layout),))

    def _refuse_written_end(self, message: Message) -> None:
        """An end token written out in a trained text would teach the model to stop there."""
        for text in (message.content, message.reasoning or ""):
            for stop in self._stop_texts:
                at = text.find(stop)
                if at >= 0:
                    near = text[max(0, at - 30) : at + len(stop) + 10]
                    raise RowError(
                        f"the trained text writes out the end token {stop}: near {near!r}; training on it "
                        "would teach the model to stop there, so remove it from the record"
                    )

    def _closed(
        self,
        message: Message,
        prompt: str,
        span: str,
        layout: TurnLayout,
        end_text: str,
        opening: tuple[int, ...] = (),
    ) -> _Draft:
        end = len(prompt) + len(span)
        text = prompt + span + ("" if message.truncated else end_text)
        return _Draft(text, (_Turn(len(prompt), end, len(text), layout),), opening)

    def _document(self, conversation: Conversation) -> _Draft:
        if len(conversation.messages) != 1:
            raise RowError("a plain document cannot stand in one conversation with other turns")
        message = conversation.messages[0]
        layout = TurnLayout((Piece(0, Segment.TEXT),), (), 0)
        return self._closed(message, "", message.content, layout, self._stop_texts[0], self._opening_ids)

    def _end_of(self, full: str, start: int) -> tuple[int, int]:
        """Where the end token of the last turn of a text begins and ends: the first one after the content."""
        stop, begin, rest = -1, -1, len(full)
        while True:
            rest = start + len(full[start:rest].rstrip())
            found = next((t for t in self._stop_texts if full.endswith(t, start, rest)), None)
            if found is None:
                break
            begin, stop = rest - len(found), rest
            rest = begin
        if stop < 0:
            raise TemplateMismatch(
                f"the chat template ends turns with no end token: {', '.join(self._stop_texts)} expected, but "
                f"it ends {full[max(start, len(full) - 40) :]!r}; set render.turn_text=verbatim to append one"
            )
        return begin, stop

    # --- tokens ---

    def _encode(self, draft: _Draft) -> Encoded:
        return self.encoder.encode_at(draft.text, [draft.turns[0].start])[0]

    def _row(self, draft: _Draft, encoded: Encoded, row_id: str) -> TokenRow:
        starts, segments, deciles = [0], [int(Segment.PROMPT)], [DECILE_NONE]
        for turn in draft.turns:
            for piece in turn.layout.pieces:
                starts.append(turn.start + piece.start)
                segments.append(int(piece.segment))
                deciles.append(piece.decile)
            starts += [turn.end, turn.stop]
            segments += [int(Segment.END), int(Segment.PROMPT)]
            deciles += [DECILE_NONE, DECILE_NONE]
        which = np.searchsorted(np.array(starts), encoded.start, side="right") - 1
        segment = np.array(segments, dtype=np.uint8)[which]
        decile = np.array(deciles, dtype=np.int8)[which]
        seam_masked = self._mark_seams(draft, encoded, segment)
        self._check_ends(draft, encoded, segment)
        weight = self._weights[segment]
        weight[seam_masked] = 0.0
        head = len(draft.opening_ids)
        ids = np.concatenate([np.array(draft.opening_ids, dtype=np.int64), encoded.ids]).astype(np.int32)
        weight = np.concatenate([np.zeros(head, np.float32), weight])
        if len(weight):
            weight[0] = 0.0  # nothing stands before it to predict it from
        if not weight.any():
            raise EmptyMask("no token of this row is trained: empty text, or all segments have weight 0")
        segment = np.concatenate([np.full(head, int(Segment.PROMPT), np.uint8), segment])
        decile = np.concatenate([np.full(head, DECILE_NONE, np.int8), decile])
        return TokenRow(ids, weight, segment, decile, row_id)

    def _mark_seams(self, draft: _Draft, encoded: Encoded, segment: np.ndarray) -> np.ndarray:
        """Relabel the first tokens after each cut, in place; returns the indices that are not trained."""
        masked: list[int] = []
        for turn in draft.turns:
            last = int(np.searchsorted(encoded.start, turn.start + turn.layout.body_end))
            for seam in turn.layout.seams:
                at = turn.start + seam
                first = int(np.searchsorted(encoded.start, at))
                if first and encoded.end[first - 1] > at:
                    first -= 1
                segment[first : min(first + self.config.seam_tokens, last)] = int(Segment.SEAM)
                masked += range(first, min(first + self.config.mask_seam, last))
        return np.array(masked, dtype=np.int64)

    def _check_ends(self, draft: _Draft, encoded: Encoded, segment: np.ndarray) -> None:
        """Each closed turn has one end token, whole, and no end token stands inside a trained text."""
        stops = np.logical_or.reduce([encoded.ids == i for i in self.stop_ids])
        ends = segment == Segment.END
        expected = sum(turn.stop > turn.end for turn in draft.turns)
        if int(ends.sum()) != expected or not stops[ends].all():
            raise TemplateMismatch(
                f"the template's end marker is no token of this tokenizer: {int((ends & stops).sum())} of "
                f"{expected} found; add it as a special token, or choose another template"
            )
        if (stops & ~ends & (segment != Segment.PROMPT)).any():
            raise RowError("a trained text holds an end token before its end")


def _one_serves_all(drafts: Sequence[_Draft]) -> bool:
    last = drafts[-1].text
    return all(d.turns[0].stop > d.turns[0].end and last.startswith(d.text) for d in drafts[:-1])


def _default_opening(tokenizer: Any, known: str) -> tuple[int, ...]:
    """Ids the tokenizer puts before a text on its own (a beginning-of-sequence token), for plain mode."""
    bare = tokenizer(known, add_special_tokens=False)["input_ids"]
    dressed = tokenizer(known, add_special_tokens=True)["input_ids"]
    at = next((i for i in range(len(dressed)) if dressed[i : i + len(bare)] == bare), 0)
    return tuple(dressed[:at])


def _broken_prefix(prompt: str, full: str) -> TemplateMismatch:
    at = next((i for i, (a, b) in enumerate(zip(prompt, full, strict=False)) if a != b), min(len(prompt), len(full)))
    return TemplateMismatch(
        "the chat template does not begin a turn with its generation prompt: the prompt goes on "
        f"{prompt[at : at + 40]!r} where the turn has {full[at : at + 40]!r}; such templates mostly drop the "
        "thoughts; set render.turn_text=verbatim"
    )


def _no_template() -> UserError:
    return UserError(
        "the tokenizer has no chat template: give one with lm.chat_template FILE, "
        "or set render.mode=plain to join prompt and completion as they are"
    )
