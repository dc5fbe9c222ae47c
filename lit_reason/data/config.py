"""What a recipe may say about the data. No torch import here: the command line reads this for its help."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Strategy = Literal["full", "epic", "head", "tail", "middle", "random", "token", "truncate", "regenerate"]
Segmenter = Literal["paragraph", "cue", "paragraph+cue", "regex", "presplit"]


@dataclass(frozen=True)
class CondenseConfig:
    """How reasoning traces are shortened (EPiC, arXiv 2506.04205, and its sibling strategies).

    Args:
        strategy: which thoughts stay: `full` all; `epic` both edges; `head`, `tail`, `middle`, `random` one part;
            `token` the least predictable tokens by a model's likelihood; `truncate` the first share of the whole
            sequence, answer lost; `regenerate` a teacher's shorter rewrite.
        tau: condensation ratio in (0, 1]: the share that is kept.
        rho: share of the kept thoughts taken from the end; 0.5 is EPiC. Used by `epic` alone.
        budget: what tau counts: `thoughts` (the paper's definition) or `tokens` (fair between strategies).
        segmenter: what a thought is: a paragraph, a stretch that starts with a cue word, both, a `regex`
            separator, or a list the row already holds (`presplit`).
        pattern: separator of the `regex` segmenter.
        min_chars: a fragment shorter than this joins the thought before it (paragraph segmenters).
        min_tokens: traces shorter than this many tokens stay as they are.
        protect_last: thoughts at the end that always stay when the answer stands only inside the trace.
        bridge: text put at each seam; empty joins the edges directly, as the paper does.
        on_missing: assistant turns without think markers: leave them (`passthrough`), `drop` the row, treat
            the `whole` text before the final answer as the trace, or `raise`.
        on_open: traces whose closing marker is missing were cut by the teacher's budget: `drop` or `passthrough`.
        on_answer_lost: what to do when the kept text no longer yields the row's answer: `extend_tail` keeps
            more of the end until it does, `keep_full` restores the trace, `drop` drops the row.
        history: thinking in earlier assistant turns that are not trained: `strip` or `keep`.
        scorer: model folder that gives the likelihoods of `token`.
        teacher: model folder that writes the rewrites of `regenerate`.
        seed: seed of `random`; the draw depends on (seed, row id) alone.
    """

    strategy: Strategy = "full"
    tau: float = 0.5
    rho: float = 0.5
    budget: Literal["thoughts", "tokens"] = "thoughts"
    segmenter: Segmenter = "paragraph"
    pattern: str | None = None
    min_chars: int = 16
    min_tokens: int = 256
    protect_last: int = 1
    bridge: str = ""
    on_missing: Literal["passthrough", "drop", "whole", "raise"] = "passthrough"
    on_open: Literal["drop", "passthrough"] = "drop"
    on_answer_lost: Literal["extend_tail", "keep_full", "drop"] = "extend_tail"
    history: Literal["strip", "keep"] = "keep"
    scorer: str | None = None
    teacher: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class RenderConfig:
    """How a conversation becomes tokens and which of them are trained.

    Args:
        mode: `chat` renders by the tokenizer's chat template; `plain` joins prompt and completion with nothing
            between them; `auto` is `plain` for plain text and `chat` for all else.
        turn_text: `template` lets the template write the assistant's turn; `verbatim` takes the prompt from the
            template and appends the assistant's text and end token as they are (for templates that drop thoughts).
        train_on: `assistant` every assistant turn, `last` only the last one.
        weights: loss weight by segment name (see `Segment`); what is not named has weight 1.
        seam_tokens: how many tokens after a cut count as the seam segment.
        mask_seam: how many of those are not trained; 0 is the paper's choice.
    """

    mode: Literal["auto", "chat", "plain"] = "auto"
    turn_text: Literal["template", "verbatim"] = "template"
    train_on: Literal["assistant", "last"] = "assistant"
    weights: dict[str, float] = field(default_factory=dict)
    seam_tokens: int = 16
    mask_seam: int = 0
