"""Answers of the policy to the demonstrations' prompts, and what pairs look like to a model.

Shape letters: N pairs, T packed tokens, S answer tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lit_reason.data.packing import Pack, pack_rows
from lit_reason.data.pair_buffer import Pair
from lit_reason.data.token_row import DECILE_NONE, Segment, TokenRow
from lit_reason.losses.preference import sequence_sums
from lit_reason.models.language_model import LanguageModel
from lit_reason.regimes.irl.demonstrations import Demonstration
from lit_reason.rollout.engine import Engine, Turn
from lit_reason.rollout.trajectory import NOT_SAMPLED, Trajectory


class AnswerPlayer:
    """Plays dialogues of one turn: a prompt in tokens, and the model's answer.

    Args:
        engine: samples.
        group: answers to each prompt.
        answer_tokens: most tokens of an answer.
        total_tokens: most tokens of prompt and answer.
        batch: sequences sampled at once.
    """

    def __init__(self, engine: Engine, *, group: int, answer_tokens: int, total_tokens: int, batch: int) -> None:
        self.engine, self.group, self.batch = engine, group, max(1, batch // group)
        self.answer_tokens, self.total_tokens = answer_tokens, total_tokens

    def play(
        self, tasks: Sequence[Mapping[str, Any]], policy_version: int = 0, seed: int = 0, *, progress: bool = False
    ) -> list[Trajectory]:
        """Answer every prompt.

        Args:
            tasks: `ids` of the prompts, each with a `row_id` on which its random streams depend.
            policy_version: policy updates made so far.
            seed: not used: an environment that draws nothing needs none.
            progress: not used: answers are short.

        Returns:
            Rollouts without rewards, group after group.
        """
        found: list[Trajectory] = []
        for first in range(0, len(tasks), self.batch):
            chosen = tasks[first : first + self.batch]
            self.engine.open([task["ids"] for task in chosen], [str(task["row_id"]) for task in chosen])
            self.engine.fork(self.group)
            rows = [(p, g) for p in range(len(chosen)) for g in range(self.group)]
            room = [max(self.total_tokens - len(chosen[p]["ids"]), 0) for p, _ in rows]
            turns = self.engine.step([min(self.answer_tokens, n) for n in room])
            for (p, g), turn in zip(rows, turns, strict=True):
                found.append(_rollout(first + p, g, chosen[p], turn, policy_version))
        return found


def _rollout(prompt: int, rollout: int, task: Mapping[str, Any], turn: Turn, version: int) -> Trajectory:
    asked = list(task["ids"])
    return Trajectory(
        prompt=prompt,
        rollout=rollout,
        ids=asked + turn.ids,
        turn_id=[NOT_SAMPLED] * len(asked) + [0] * len(turn.ids),
        logprob=[0.0] * len(asked) + turn.logprobs,
        turn_terms=[{}],
        outcome_terms={},
        stops=[turn.stop],
        finished=turn.stop == "end",
        policy_version=version,
        row_id=str(task["row_id"]),
        facts={"errors": 0, "cut_observations": 0},
    )


def pay(rollouts: Sequence[Trajectory], scores: Sequence[float], no_end: float | None) -> list[Trajectory]:
    """Rollouts with their scores as rewards.

    Args:
        rollouts: of one turn each.
        scores: one each.
        no_end: paid in place of its score for an answer that never ended; None pays the score.
    """
    paid = [s if t.finished or no_end is None else no_end for s, t in zip(scores, rollouts, strict=True)]
    return [replace(t, outcome_terms={"learned": p}) for t, p in zip(rollouts, paid, strict=True)]


def make_pair(
    row: int, shown: Demonstration, rollout: Trajectory, stop_ids: Collection[int], unfinished: Literal["cut", "drop"]
) -> Pair | None:
    """A demonstration against an answer to its prompt.

    Where one of the two was cut off, the other loses its end token too, and the demonstration what is longer: else the
    end token alone would tell them apart.

    Args:
        row: number of the demonstration.
        shown: the demonstration.
        rollout: the policy's answer.
        stop_ids: end tokens.
        unfinished: `drop` gives no pair for an answer that was cut off.

    Returns:
        The pair; None where there is none, or nothing is left of an answer.
    """
    chosen, rejected = shown.answer, np.asarray(rollout.ids[len(shown.prompt) :], dtype=np.int32)
    ends = [len(a) > 0 and int(a[-1]) in stop_ids for a in (chosen, rejected)]
    if not all(ends):
        if unfinished == "drop":
            return None
        chosen, rejected = (a[: len(a) - end] for a, end in zip((chosen, rejected), ends, strict=True))
        chosen = chosen[: len(rejected)] if not ends[1] else chosen
    if not len(chosen) or not len(rejected):
        return None
    return Pair(row, rollout.rollout, shown.prompt, chosen, rejected)


def pair_pack(pairs: Iterable[Pair], norm: float = 1.0) -> Pack:
    """Both texts of each pair, the demonstrated one first; the tokens of answers are the trained ones.

    Args:
        pairs: at least one.
        norm: divisor of the loss.
    """
    rows = [text_row(p.prompt, answer) for p in pairs for answer in (p.chosen, p.rejected)]
    return pack_rows(rows, norm)


def text_row(prompt: np.ndarray, answer: np.ndarray) -> TokenRow:
    """A prompt and an answer as a row.

    Args:
        prompt: tokens; at least one.
        answer: tokens.
    """
    spoken = np.repeat([False, True], [len(prompt), len(answer)])
    return TokenRow(
        ids=np.concatenate([prompt, answer]).astype(np.int32),
        weight=spoken.astype(np.float32),
        segment=np.where(spoken, Segment.SOLUTION, Segment.PROMPT).astype(np.uint8),
        decile=np.full(len(spoken), DECILE_NONE, dtype=np.int8),
        row_id="",
    )


def answer_logps(lm: LanguageModel, pack: Pack, temperature: float = 1.0) -> Tensor:
    """Log-probability of each answer given its prompt, `float32 [texts]`, with gradient.

    Args:
        lm: the model.
        pack: prompts and answers; the answers' tokens are the trained ones.
        temperature: divisor of the logits.
    """
    hidden_TD = lm.hidden(pack.ids, pack.positions, pack.cu_seqlens)
    logp_S = lm.head.token_logprobs(hidden_TD[pack.index], pack.targets, temperature=temperature).logp_S
    text_S = torch.searchsorted(pack.cu_seqlens.to(pack.index.device, torch.long), pack.index, right=True) - 1
    return sequence_sums(logp_S.float(), text_S, len(pack.lengths))
