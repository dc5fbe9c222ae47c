"""Rollouts: several dialogues at once between the model and its environments."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from tqdm.auto import tqdm

from lit_reason.envs.environment import Environment, Message
from lit_reason.errors import UserError
from lit_reason.rollout.config import DialogueConfig
from lit_reason.rollout.engine import Engine, Turn
from lit_reason.rollout.observations import ObservationEncoder
from lit_reason.rollout.trajectory import NOT_SAMPLED, Trajectory

R = TypeVar("R")


@dataclass
class _Dialogue:
    """A rollout on its way."""

    prompt: int
    rollout: int
    env: Environment
    opening: list[Message] | None
    failure: str
    ids: list[int] = field(default_factory=list)
    marks: list[tuple[int, Turn]] = field(default_factory=list)  # where each turn begins, and the turn
    terms: list[dict[str, float]] = field(default_factory=list)
    facts: dict[str, int] = field(default_factory=lambda: {"errors": 0, "cut_observations": 0})
    finished: bool = False  # by the environment's own rules
    over: bool = False


class Player:
    """Plays the tasks of a batch, a group of rollouts each.

    Args:
        engine: generates.
        observations: turns what environments say into tokens.
        make_env: makes the environment of one rollout.
        config: limits.
    """

    def __init__(
        self,
        engine: Engine,
        observations: ObservationEncoder,
        make_env: Callable[[], Environment],
        config: DialogueConfig,
    ) -> None:
        self.engine, self.observations, self.make_env, self.config = engine, observations, make_env, config

    def play(
        self, tasks: Sequence[Mapping[str, Any]], *, policy_version: int = 0, seed: int = 0, progress: bool = False
    ) -> list[Trajectory]:
        """Play every task `config.group` times.

        Args:
            tasks: rows of the training data.
            policy_version: number of policy updates so far, for the record.
            seed: of the environments' draws; the engine has its own.
            progress: show a progress bar over turns.

        Returns:
            `len(tasks) * group` rollouts, ordered by task and then by rollout, those included whose environment failed.

        Raises:
            UserError: a task cannot begin, its prompt leaves no room for an answer, or the environment failed in
                every rollout.
        """
        c, engine = self.config, self.engine
        dialogues = [self._begin(p, g, task, seed) for p, task in enumerate(tasks) for g in range(c.group)]
        firsts = dialogues[:: c.group]
        engine.open([self._prompt(d) for d in firsts], [_name(tasks[d.prompt], d.prompt) for d in firsts])
        engine.fork(c.group)
        live = list(dialogues)
        for turn in tqdm(range(c.max_turns + 1), desc="turns", leave=False, delay=2, disable=not progress):
            self._turn(live, last=turn == c.max_turns)
            going = [i for i, d in enumerate(live) if not d.over]
            if not engine.anyone(bool(going)):
                break
            if len(going) < len(live):
                engine.keep(going)
                live = [live[i] for i in going]
        done = [self._trajectory(d, tasks[d.prompt], policy_version) for d in dialogues]
        for d in dialogues:
            d.env.close()
        failed = [t for t in done if t.failure]
        if len(failed) == len(done):
            raise UserError(f"the environment failed in every rollout; first: {failed[0].failure}")
        return done

    def _begin(self, prompt: int, rollout: int, task: Mapping[str, Any], seed: int) -> _Dialogue:
        env = self.make_env()
        return _Dialogue(prompt, rollout, env, *self._ask(lambda: env.reset(task, seed, rollout)))

    def _prompt(self, dialogue: _Dialogue) -> list[int]:
        if dialogue.opening is None:
            raise UserError(f"the environment could not begin task {dialogue.prompt}: {dialogue.failure}")
        ids, c = self.observations.prompt_ids(dialogue.opening), self.config
        if len(ids) + c.answer_tokens > c.total_tokens:
            raise UserError(
                f"task {dialogue.prompt}: its prompt has {len(ids)} tokens, which leaves no room for an answer of "
                f"{c.answer_tokens} within total_tokens={c.total_tokens}"
            )
        return ids

    def _turn(self, live: list[_Dialogue], *, last: bool) -> None:
        """One turn of the model on every live dialogue, and what the environments say to it."""
        c, engine = self.config, self.engine
        used = [len(engine.ids(i)) for i in range(len(live))]
        free = [c.total_tokens - n for n in used]
        ends = [last or n <= c.answer_tokens for n in free]  # this turn is the row's last: what was kept is for it
        limits = [min(c.turn_tokens, n if end else n - c.answer_tokens) for n, end in zip(free, ends, strict=True)]
        turns = engine.step(limits, live[0].env.stops if live else ())
        calls = [partial(d.env.step, turn.text) for d, turn in zip(live, turns, strict=True)]
        for i, (step, failure) in enumerate(_together(calls, c.timeout_s)):
            d, turn = live[i], turns[i]
            d.marks.append((used[i], turn))
            d.ids, d.failure = engine.ids(i), d.failure or failure
            d.terms.append({} if step is None else dict(step.info.get("terms", {"reward": step.reward})))
            d.over = ends[i] or bool(d.failure) or step is None or step.terminated or step.truncated
            if step is None:
                continue
            d.finished = step.terminated
            d.facts["errors"] += bool(step.info.get("error"))
            if not d.over:
                room = min(c.observation_tokens, c.total_tokens - len(d.ids) - c.answer_tokens)
                said = self.observations.ids(step.observation, ended=turn.stop == "end", room=room)
                d.facts["cut_observations"] += len(said) >= room
                d.over = not said  # no room for another turn
                engine.append(i, said)

    def _trajectory(self, d: _Dialogue, task: Mapping[str, Any], version: int) -> Trajectory:
        turn_id, logprob = [NOT_SAMPLED] * len(d.ids), [0.0] * len(d.ids)
        for k, (start, turn) in enumerate(d.marks):
            stop = start + len(turn.ids)
            turn_id[start:stop], logprob[start:stop] = [k] * len(turn.ids), turn.logprobs
        outcome, failure = (None, d.failure) if d.failure else self._ask(d.env.outcome)
        return Trajectory(
            prompt=d.prompt,
            rollout=d.rollout,
            ids=d.ids,
            turn_id=turn_id,
            logprob=logprob,
            turn_terms=d.terms,
            outcome_terms=outcome or {},
            stops=[turn.stop for _, turn in d.marks],
            finished=d.finished,
            policy_version=version,
            row_id=_name(task, d.prompt),
            failure=failure,
            facts=d.facts,
        )

    def _ask(self, question: Callable[[], R]) -> tuple[R | None, str]:
        return _together([question], self.config.timeout_s)[0]


def _name(task: Mapping[str, Any], position: int) -> str:
    return str(task.get("row_id", position))


def _together(calls: Sequence[Callable[[], R]], timeout_s: float) -> list[tuple[R | None, str]]:
    """Run calls side by side; the result of each, or what it failed with.

    A call that hangs is left behind in its thread, which does not keep the program from ending.
    """
    found: list[tuple[R | None, str]] = [(None, f"no answer within {timeout_s:g} s")] * len(calls)

    def run(i: int) -> None:
        try:
            found[i] = (calls[i](), "")
        except Exception as error:  # whatever an environment fails with is counted, and costs one rollout
            found[i] = (None, f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(calls))]
    deadline = time.monotonic() + timeout_s
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(deadline - time.monotonic(), 0))
    return list(found)
