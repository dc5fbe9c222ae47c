"""Condensation: conversations in, conversations with shorter reasoning traces out, and a ledger.

EPiC (arXiv 2506.04205) keeps the first and the last thoughts of a trace. The paper's body could not be read:
rounding, segmentation and the decisions on edge cases are this project's own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

from lit_reason.data.condensation.answers import answer_in_trace
from lit_reason.data.condensation.condense_rules import check_config
from lit_reason.data.condensation.ledger import Ledger, TurnRecord
from lit_reason.data.condensation.likelihood import Scorer, load_scorer, prune_tokens
from lit_reason.data.condensation.markers import TraceText
from lit_reason.data.condensation.selection import (
    BY_THOUGHT,
    budget_count,
    edge_strategy,
    kept_count,
    last_first,
    least_kept,
    taking_order,
)
from lit_reason.data.condensation.teacher import Teacher, load_teacher
from lit_reason.data.condensation.thoughts import giant, segment, split_giant
from lit_reason.data.condensation.truncation import truncate
from lit_reason.data.condensation.turn_trace import (
    RowDropped,
    TurnPlan,
    find_trace,
    locate_trace,
    place_trace,
    subtrace,
    whole_trace,
    without_trace,
)
from lit_reason.data.config import CondenseConfig
from lit_reason.data.conversation import Conversation, Message, Trace
from lit_reason.errors import RowError, UserError

_FROM_TEXT = ("paragraph", "cue", "paragraph+cue")


class Condenser:
    """Shortens the reasoning traces of conversations. Equal rows give equal results, in any order.

    Args:
        config: strategy, ratio and rules.
        count_tokens: length of a text in tokens.
        scorer: likelihoods for `token`; default: the model that `config.scorer` names.
        teacher: rewrites for `regenerate`; default: the model that `config.teacher` names.

    Attributes:
        ledger: counts over all conversations seen.

    Raises:
        UserError: a setting out of range or unknown, or a strategy whose model is missing.
    """

    def __init__(
        self,
        config: CondenseConfig,
        count_tokens: Callable[[str], int],
        *,
        scorer: Scorer | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        self._pattern = check_config(config)
        self.config, self.count_tokens, self.ledger = config, count_tokens, Ledger()
        self._scorer, self._teacher = scorer, teacher
        if config.strategy == "token" and scorer is None:
            self._scorer = load_scorer(_model_of(config, "scorer"))
        if config.strategy == "regenerate" and teacher is None:
            self._teacher = load_teacher(_model_of(config, "teacher"))
        # Fitting to a length cuts at whole thoughts under every strategy.
        self._by = edge_strategy(config.strategy if config.strategy in BY_THOUGHT else "epic", config.rho)

    # ---- one conversation

    def __call__(self, conversation: Conversation) -> Conversation | None:
        """Condense each trained turn.

        `Message.trace` is set on each trained turn that has a trace, whatever the strategy. A turn followed
        by a tool result and a trace that is short stay as they are.

        Args:
            conversation: as from `to_conversation`.

        Returns:
            The condensed conversation; None when a rule drops the row, which the ledger counts.

        Raises:
            RowError: no trace where there must be one (`on_missing: raise`, `segmenter: presplit`).
        """
        messages: list[Message] = []
        records: list[TurnRecord] = []
        prompt = 0
        try:
            for index, message in enumerate(conversation.messages):
                if message.trained:
                    message, record = self._turn(conversation, index)
                    records.append(record)
                else:
                    message = self._earlier(message)
                    prompt += self._count(message)
                messages.append(message)
        except RowDropped as dropped:
            self.ledger.dropped(str(dropped))
            return None
        condensed = replace(conversation, messages=tuple(messages))
        if self.config.strategy == "truncate":
            return self._truncate(condensed, prompt, records)
        self.ledger.kept((prompt, prompt), records)
        return condensed

    def _turn(self, conversation: Conversation, index: int) -> tuple[Message, TurnRecord]:
        message = conversation.messages[index]
        parts = self._parts(message)
        if isinstance(parts, str):
            tokens = self._count(message)
            return replace(message, trace=None), TurnRecord(parts, solution=(tokens, tokens))
        later = any(m.trained for m in conversation.messages[index + 1 :])
        plan = self._plan(message, parts, None if later else conversation.answer)
        solution = self.count_tokens(parts.prefix + parts.opening + parts.closing + parts.rest)
        before = sum(plan.sizes)
        reason = self._reason_to_leave(conversation, index, plan)
        trace, by_tokens = (None, False) if reason else self._condensed(conversation, index, plan)
        if trace is None or trace == plan.trace:
            n = len(plan.trace.thoughts)
            reason = reason or ("no shorter trace keeps the answer" if trace is None else "every thought stays")
            record = TurnRecord(reason, (n, n), (before, before), (solution, solution))
            return replace(message, trace=plan.trace), record
        after = self._trace_tokens(plan, trace)
        counts = len(plan.trace.thoughts), len(trace.thoughts)
        record = TurnRecord("condensed", counts, (before, after), (solution, solution), by_tokens)
        return place_trace(message, parts, trace), record

    def _earlier(self, message: Message) -> Message:
        if self.config.history == "keep" or message.role != "assistant":
            return message
        stripped = without_trace(message)
        if stripped != message:
            self.ledger.turns["earlier turn, thinking stripped"] += 1
        return stripped

    def _parts(self, message: Message) -> TraceText | str:
        """Where the trace stands, or why there is none to condense."""
        parts = find_trace(message)
        if parts is None and message.role == "assistant" and message.content.strip():
            parts = self._missing(message)
        if parts is None:
            return "no trace"
        if parts.case == "open_only":
            if self.config.on_open == "drop":
                raise RowDropped("trace without a closing marker")
            return "trace without a closing marker"
        if parts.several:
            return "several traces in one turn"
        return parts if parts.body.strip() else "empty trace"

    def _missing(self, message: Message) -> TraceText | None:
        rule = self.config.on_missing
        if rule == "raise":
            raise RowError("no trace: an assistant turn has no think markers (on_missing: raise)")
        if rule == "drop":
            raise RowDropped("no trace")
        return whole_trace(message.content) if rule == "whole" else None

    # ---- the trace

    def _plan(self, message: Message, parts: TraceText, known: str | None) -> TurnPlan:
        thoughts, sizes = self._thoughts(message, parts)
        trace = Trace(tuple(thoughts), tuple(range(len(thoughts))), len(thoughts))
        return replace(self._answer_plan(parts, trace, known), sizes=tuple(sizes))

    def _answer_plan(self, parts: TraceText, trace: Trace, known: str | None) -> TurnPlan:
        answer, read, inside = answer_in_trace(trace.text, parts.rest, known)
        return TurnPlan(parts, trace, answer, read, self.config.protect_last if inside else 0)

    def _thoughts(self, message: Message, parts: TraceText) -> tuple[list[str], list[int]]:
        config = self.config
        if config.segmenter == "presplit":
            if parts.case != "field" or message.trace is None:
                raise RowError("no list of thoughts: segmenter presplit needs reasoning that is a list of texts")
            thoughts = [thought for thought in message.trace.thoughts if thought]
        else:
            thoughts = segment(parts.body, config.segmenter, min_chars=config.min_chars, pattern=self._pattern)
        sizes = [self.count_tokens(thought) for thought in thoughts]
        if config.segmenter in _FROM_TEXT and giant(sizes) is not None:
            thoughts = split_giant(thoughts, sizes, config.min_chars)
            sizes = [self.count_tokens(thought) for thought in thoughts]
        return thoughts, sizes

    def _reason_to_leave(self, conversation: Conversation, index: int, plan: TurnPlan) -> str | None:
        config = self.config
        if config.strategy in ("full", "truncate") or config.tau == 1:
            return f"strategy {config.strategy}" if config.tau < 1 else "tau is 1"
        if index + 1 < len(conversation.messages) and conversation.messages[index + 1].role == "tool":
            return "a tool result follows"
        if sum(plan.sizes) < config.min_tokens:
            return "trace shorter than min_tokens"
        if config.strategy in BY_THOUGHT and len(plan.sizes) <= least_kept(self._by, plan.protect):
            return "too few thoughts"
        return None

    def _condensed(self, conversation: Conversation, index: int, plan: TurnPlan) -> tuple[Trace | None, bool]:
        """The shorter trace, None to leave the turn; and whether one huge thought forced a token budget."""
        config = self.config
        rule, answers = config.on_answer_lost, self.ledger.answers
        if config.strategy == "token":
            return plan.keep_answer(self._pruned(conversation, index, plan), rule, answers), False
        if config.strategy == "regenerate":
            rewrite = self._rewritten(conversation, index, plan)
            if rewrite is None:
                return None, False
            return plan.keep_answer(lambda tail: rewrite, rule, answers, can_grow=False), False
        forced = config.budget == "thoughts" and giant(list(plan.sizes)) is not None
        order = self._order(plan, conversation.row_id)
        least = least_kept(self._by, plan.protect)
        if config.budget == "tokens" or forced:
            kept = budget_count(order, plan.sizes, config.tau, least)
        else:
            kept = kept_count(len(order), config.tau, least)
        return plan.keep_answer(self._selected(plan, order[:kept]), rule, answers), forced

    def _order(self, plan: TurnPlan, row_id: str) -> list[int]:
        """Positions in the plan's trace in the order of the strategy, which is defined on the full trace."""
        trace = plan.trace
        place = {origin: position for position, origin in enumerate(trace.origin)}
        config = self.config
        order = taking_order(trace.total, self._by, rho=config.rho, seed=config.seed, row_id=row_id)
        return last_first([place[origin] for origin in order if origin in place], plan.protect)

    def _selected(self, plan: TurnPlan, chosen: list[int]) -> Callable[[int], Trace]:
        total = len(plan.trace.thoughts)
        kept = set(chosen)
        return lambda tail: subtrace(plan.trace, sorted(kept | set(range(total - tail, total))), self.config.bridge)

    def _pruned(self, conversation: Conversation, index: int, plan: TurnPlan) -> Callable[[int], Trace]:
        before = [m.content for m in conversation.messages[:index]]
        assert self._scorer is not None
        spans = self._scorer("\n\n".join([*before, plan.parts.prefix + plan.parts.opening]), plan.trace.text)
        return lambda tail: prune_tokens(plan.trace, spans, self.config.tau, max(tail, plan.protect))

    def _rewritten(self, conversation: Conversation, index: int, plan: TurnPlan) -> Trace | None:
        """The teacher's trace, its thoughts numbered among themselves; None when empty or no shorter."""
        question = next((m.content for m in reversed(conversation.messages[:index]) if m.role == "user"), "")
        target = kept_count(sum(plan.sizes), self.config.tau)
        assert self._teacher is not None
        body = plan.trace.text
        text = self._teacher(question, body.strip(), target).strip()
        if not text or self.count_tokens(text) >= sum(plan.sizes):
            return None
        text = body[: len(body) - len(body.lstrip())] + text + body[len(body.rstrip()) :]
        how = self.config.segmenter if self.config.segmenter != "presplit" else "paragraph"
        thoughts = segment(text, how, min_chars=self.config.min_chars, pattern=self._pattern)
        return Trace(tuple(thoughts), tuple(range(len(thoughts))), len(thoughts))

    # ---- whole rows

    def _truncate(self, conversation: Conversation, prompt: int, records: list[TurnRecord]) -> Conversation | None:
        cut = truncate(conversation, self.config.tau, self.count_tokens)
        if cut is None:
            self.ledger.dropped("nothing trained before the cut")
            return None
        left = [m for m in cut.messages if m.trained]
        for at, record in enumerate(records):
            message = left[at] if at < len(left) else None
            if message is not None and not message.truncated:
                continue
            trace = message.trace if message else None
            after = self.count_tokens(trace.text) if trace else 0
            rest = max(self._count(message) - after, 0) if message else 0
            records[at] = TurnRecord(
                "truncated",
                (record.thoughts[0], len(trace.thoughts) if trace else 0),
                (record.tokens[0], after),
                (record.solution[0], rest),
            )
        self.ledger.kept((prompt, sum(self._count(m) for m in cut.messages if not m.trained)), records)
        return cut

    def fit(
        self, conversation: Conversation, limit: int, measure: Callable[[Conversation], int]
    ) -> Conversation | None:
        """Condense just enough to meet a length, instead of truncating.

        The strategy's own order of thoughts is used, EPiC's for strategies that do not select whole thoughts.
        All turns of a row keep the same share of their thoughts. `min_tokens` does not apply,
        `on_answer_lost` does.

        Args:
            conversation: as this condenser returned it.
            limit: the largest length allowed.
            measure: length of a conversation, for example its rendered tokens.

        Returns:
            The conversation itself where it fits, else the one with the largest share of thoughts that does;
            None when none fits.
        """
        if measure(conversation) <= limit:
            return conversation
        plans = self._fit_plans(conversation)
        shares = sorted({Fraction(k, n) for plan in plans.values() for k, n in self._counts(plan)})
        low, high, best = 0, len(shares), None
        while low < high:
            middle = (low + high) // 2
            shorter = self._at_share(conversation, plans, shares[middle])
            if shorter is not None and measure(shorter) <= limit:
                low, best = middle + 1, shorter
            else:
                high = middle
        self.ledger.fit["impossible" if best is None else "condensed further"] += 1
        if best is not None:
            self._note_fit(conversation, best)
        return best

    def _fit_plans(self, conversation: Conversation) -> dict[int, TurnPlan]:
        plans = {}
        messages = conversation.messages
        last = max((i for i, m in enumerate(messages) if m.trained), default=-1)
        for index, message in enumerate(messages):
            tool_follows = index + 1 < len(messages) and messages[index + 1].role == "tool"
            parts = locate_trace(message)
            if not message.trained or message.truncated or tool_follows or not parts or not message.trace:
                continue
            known = conversation.answer if index == last else None
            plans[index] = self._answer_plan(parts, message.trace, known)
        return plans

    def _counts(self, plan: TurnPlan) -> list[tuple[int, int]]:
        n = len(plan.trace.thoughts)
        return [(k, n) for k in range(least_kept(self._by, plan.protect), n)]

    def _at_share(self, conversation: Conversation, plans: dict[int, TurnPlan], share: Fraction) -> Conversation | None:
        messages = list(conversation.messages)
        for index, plan in plans.items():
            order = self._order(plan, conversation.row_id)
            kept = kept_count(len(order), share, least_kept(self._by, plan.protect))
            try:
                trace = plan.keep_answer(self._selected(plan, order[:kept]), self.config.on_answer_lost, Counter())
            except RowDropped:
                return None
            if trace is not None:
                messages[index] = place_trace(messages[index], plan.parts, trace)
        return replace(conversation, messages=tuple(messages))

    def _note_fit(self, before: Conversation, after: Conversation) -> None:
        for old, new in zip(before.messages, after.messages, strict=True):
            if old.trace and new.trace and old.trace is not new.trace:
                saved = self.count_tokens(old.trace.text) - self.count_tokens(new.trace.text)
                self.ledger.tokens_after["trace"] -= saved
                self.ledger.thoughts["after"] -= len(old.trace.thoughts) - len(new.trace.thoughts)

    def _count(self, message: Message) -> int:
        return self.count_tokens(message.content) + (self.count_tokens(message.reasoning) if message.reasoning else 0)

    def _trace_tokens(self, plan: TurnPlan, trace: Trace) -> int:
        if self.config.strategy in BY_THOUGHT and not self.config.bridge:
            return sum(plan.sizes[origin] for origin in trace.origin)
        return self.count_tokens(trace.text)


def _model_of(config: CondenseConfig, name: str) -> str:
    path = getattr(config, name)
    if path is None:
        raise UserError(f"condense: strategy '{config.strategy}' needs a model: set {name} to a model folder")
    return path
