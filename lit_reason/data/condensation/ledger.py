"""The ledger: what condensation did to the rows, in counts that can be added up and printed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

CHANGED = ("condensed", "truncated")
PARTS = ("prompt", "trace", "solution")


@dataclass
class TurnRecord:
    """What happened to one trained turn.

    Attributes:
        outcome: `condensed`, `truncated`, or the reason why not.
        thoughts: thoughts before and after; (0, 0) without a trace.
        tokens: trace tokens before and after.
        solution: tokens of the rest of the turn, its markers among them, before and after.
        by_tokens: thoughts were chosen by token budget because one held more than half of the tokens.
    """

    outcome: str
    thoughts: tuple[int, int] = (0, 0)
    tokens: tuple[int, int] = (0, 0)
    solution: tuple[int, int] = (0, 0)
    by_tokens: bool = False


@dataclass
class Ledger:
    """Counts over all rows seen.

    Token counts are sums over thoughts and texts counted one by one; the chat template's own tokens are not
    in them.

    Attributes:
        rows: rows by outcome: `condensed`, `truncated`, `unchanged: reason`, `dropped: reason`.
        turns: trained turns by outcome, in rows that were kept; plus earlier turns whose thinking was
            stripped.
        thoughts: `before` and `after`, over all traces of kept rows.
        tokens_before: tokens of kept rows by part: `prompt`, `trace`, `solution` (with the markers).
        tokens_after: the same after condensation.
        condensed: over condensed turns alone: `turns`, `thoughts_before`, `thoughts_after`, `tokens_before`,
            `tokens_after`, `by_tokens`.
        answers: what the check of the final answer found, see `summary`.
        fit: rows condensed further to fit a length, and rows for which that was impossible.
    """

    rows: Counter[str] = field(default_factory=Counter)
    turns: Counter[str] = field(default_factory=Counter)
    thoughts: Counter[str] = field(default_factory=Counter)
    tokens_before: Counter[str] = field(default_factory=Counter)
    tokens_after: Counter[str] = field(default_factory=Counter)
    condensed: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    fit: Counter[str] = field(default_factory=Counter)

    def dropped(self, reason: str) -> None:
        """Count a row that is left out."""
        self.rows[f"dropped: {reason}"] += 1

    def kept(self, prompt: tuple[int, int], turns: Iterable[TurnRecord]) -> None:
        """Count a row that stays.

        Args:
            prompt: tokens of its turns that are not trained, before and after.
            turns: one record a trained turn, in order.
        """
        outcome = "no trained turn"
        for turn in turns:
            outcome = turn.outcome if outcome not in CHANGED else outcome
            self._turn(turn)
        self.rows[outcome if outcome in CHANGED else f"unchanged: {outcome}"] += 1
        self.tokens_before["prompt"] += prompt[0]
        self.tokens_after["prompt"] += prompt[1]

    def _turn(self, turn: TurnRecord) -> None:
        self.turns[turn.outcome] += 1
        self.thoughts.update(before=turn.thoughts[0], after=turn.thoughts[1])
        self.tokens_before.update(trace=turn.tokens[0], solution=turn.solution[0])
        self.tokens_after.update(trace=turn.tokens[1], solution=turn.solution[1])
        self.thoughts["traces"] += turn.thoughts[0] > 0
        if turn.outcome in CHANGED:
            self.condensed.update(
                turns=1,
                thoughts_before=turn.thoughts[0],
                thoughts_after=turn.thoughts[1],
                tokens_before=turn.tokens[0],
                tokens_after=turn.tokens[1],
                by_tokens=int(turn.by_tokens),
            )

    def merge(self, other: Ledger) -> Ledger:
        """Add another ledger's counts to this one, in place.

        Args:
            other: from another worker or file.

        Returns:
            This ledger.
        """
        for each in fields(self):
            getattr(self, each.name).update(getattr(other, each.name))
        return self

    @property
    def predicted_time_saved(self) -> float:
        """Share of training time saved, `1 - tokens after / tokens before` over the kept rows.

        Prompt and solution count, as they pass through the model too. Attention grows faster than linearly
        with length, so long traces save more than this says; padding without packing eats some of it.
        """
        before = sum(self.tokens_before.values())
        return 1 - sum(self.tokens_after.values()) / before if before else 0.0

    def to_dict(self) -> dict[str, Any]:
        """All counts and the figures derived from them, ready for JSON."""
        counts = {each.name: dict(sorted(getattr(self, each.name).items())) for each in fields(self)}
        return {
            **counts,
            "mean_thoughts": _ratio(self.thoughts["before"], self.thoughts["traces"]),
            "mean_tokens_per_thought": _ratio(self.tokens_before["trace"], self.thoughts["before"]),
            "thought_ratio": _ratio(self.condensed["thoughts_after"], self.condensed["thoughts_before"]),
            "token_ratio": _ratio(self.condensed["tokens_after"], self.condensed["tokens_before"]),
            "predicted_time_saved": round(self.predicted_time_saved, 4),
        }

    def summary(self, unit: str = "tokens") -> str:
        """The ledger as a person reads it.

        Args:
            unit: what was counted, for the table's title.
        """
        derived = self.to_dict()
        lines = [f"rows  {sum(self.rows.values()):,}"]
        lines += [f"  {count:>9,}  {outcome}" for outcome, count in self.rows.most_common()]
        if sum(self.turns.values()) > sum(n for o, n in self.rows.items() if not o.startswith("dropped")):
            lines.append(f"trained turns  {sum(self.turns.values()):,}")
            lines += [f"  {count:>9,}  {outcome}" for outcome, count in self.turns.most_common()]
        lines.append(f"thoughts  {self.thoughts['before']:,} -> {self.thoughts['after']:,}")
        if self.thoughts["traces"]:
            mean, each = derived["mean_thoughts"], derived["mean_tokens_per_thought"]
            lines.append(f"  {mean:.1f} a trace in {self.thoughts['traces']:,} traces, {each:.1f} {unit} a thought")
        if self.condensed["turns"]:
            thought, token = derived["thought_ratio"], derived["token_ratio"]
            lines.append(f"  in condensed traces kept: {thought:.1%} of thoughts, {token:.1%} of {unit}")
            if self.condensed["by_tokens"]:
                count = self.condensed["by_tokens"]
                lines.append(f"  {count:,} chosen by {unit}, as one thought held over half of the trace")
        lines.append(f"{unit:<14}{'before':>14}{'after':>14}{'kept':>9}")
        for part in (*PARTS, "all"):
            before = self.tokens_before[part] if part != "all" else sum(self.tokens_before.values())
            after = self.tokens_after[part] if part != "all" else sum(self.tokens_after.values())
            share = f"{after / before:.1%}" if before else "-"
            lines.append(f"  {part:<12}{before:>14,}{after:>14,}{share:>9}")
        lines.append(f"predicted time saved  {self.predicted_time_saved:.1%}  (1 - after / before over all {unit})")
        if self.answers:
            lines.append("answers  " + ", ".join(f"{n:,} {what}" for what, n in self.answers.most_common()))
        if self.fit:
            lines.append("fit to length  " + ", ".join(f"{n:,} {what}" for what, n in self.fit.most_common()))
        return "\n".join(lines)


def _ratio(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None
