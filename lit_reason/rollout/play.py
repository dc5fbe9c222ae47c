"""Rollouts: several dialogues at once between the model and its environments."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from tqdm.auto import tqdm

from lit_reason.envs.environment import Environment, Message, Step
from lit_reason.errors import UserError
from lit_reason.rewards.composition import Paid, Rewards
from lit_reason.rewards.dialogue import Dialogue
from lit_reason.rewards.dialogue import Turn as PlayedTurn
from lit_reason.rollout.backend import Backend, Turn
from lit_reason.rollout.config import DialogueConfig
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
    terms: list[dict[str, float]] = field(default_factory=list)  # what the environment paid for each turn
    played: list[PlayedTurn] = field(default_factory=list)
    facts: dict[str, int] = field(default_factory=lambda: {"calls": 0, "errors": 0, "cut_observations": 0})
    finished: bool = False  # by the environment's own rules
    over: bool = False
    start: int | None = None  # where the turn that is under way begins


class Player:
    """Plays the tasks of a batch, a group of rollouts each.

    Args:
        engine: generates.
        observations: turns what environments say into tokens.
        make_env: makes the environment of one rollout.
        config: limits.
        rewards: what a dialogue is paid; default: what its environment pays.
    """

    def __init__(
        self,
        engine: Backend,
        observations: ObservationEncoder,
        make_env: Callable[[], Environment],
        config: DialogueConfig,
        rewards: Rewards | None = None,
    ) -> None:
        self.engine, self.observations, self.make_env, self.config = engine, observations, make_env, config
        self.rewards = rewards or Rewards()

    def play(
        self, tasks: Sequence[Mapping[str, Any]], *, policy_version: int = 0, seed: int = 0, progress: bool = False
    ) -> list[Trajectory]:
        """Play every task `config.group` times.

        Args:
            tasks: rows of the training data.
            policy_version: number of policy updates so far.
            seed: of the environments' draws; the engine has its own.
            progress: show a progress bar over turns.

        Returns:
            `len(tasks) * group` rollouts, ordered by task and then by rollout, those included whose environment or
            reward failed; one that could not even begin has no tokens. Whether enough are left is the caller's to say.

        Raises:
            UserError: a prompt leaves no room for an answer.
        """
        c, engine = self.config, self.engine
        dialogues = self._begin(tasks, seed)
        groups = [dialogues[i : i + c.group] for i in range(0, len(dialogues), c.group)]
        groups = [group for group in groups if any(d.opening is not None for d in group)]
        prompts = [self._prompt(group) for group in groups]
        with engine.round(policy_version) as held:
            engine.open(prompts, [_name(tasks[group[0].prompt], group[0].prompt) for group in groups])
            engine.fork(c.group)
            live = self._kept([d for group in groups for d in group], lambda d: not d.failure)
            off = None if progress else True  # None: a bar on a terminal, none in a log
            with tqdm(total=len(live), desc="rollouts", leave=False, delay=2, disable=off) as bar:
                while engine.anyone(bool(live)):
                    self._turns(live)
                    bar.update(sum(d.over for d in live))
                    live = self._kept(live, lambda d: not d.over)
        settled = self._together([partial(self._paid, d, tasks[d.prompt]) for d in dialogues])
        self._together([d.env.close for d in dialogues])
        done = [
            self._trajectory(d, tasks[d.prompt], held, paid or Paid(d.terms, {}), failure)
            for d, (paid, failure) in zip(dialogues, settled, strict=True)
        ]
        failed = [t for t in done if t.failure]
        if failed:
            warnings.warn(
                f"{len(failed)} of {len(done)} rollouts failed and are left out of the update; first: "
                f"{failed[0].row_id}/{failed[0].rollout}: {failed[0].failure}",
                stacklevel=2,
            )
        return done

    def _kept(self, live: list[_Dialogue], wanted: Callable[[_Dialogue], bool]) -> list[_Dialogue]:
        """Those that are wanted, here and in the engine."""
        going = [i for i, d in enumerate(live) if wanted(d)]
        if len(going) < len(live):
            self.engine.keep(going)
        return [live[i] for i in going]

    def _begin(self, tasks: Sequence[Mapping[str, Any]], seed: int) -> list[_Dialogue]:
        """An environment for every rollout, all asked to begin at once."""
        places = [(p, g, self.make_env()) for p in range(len(tasks)) for g in range(self.config.group)]
        begun = self._together([partial(env.reset, tasks[p], seed, g) for p, g, env in places])
        return [_Dialogue(*place, *found) for place, found in zip(places, begun, strict=True)]

    def _prompt(self, group: Sequence[_Dialogue]) -> list[int]:
        """The prompt of a task, by the first environment of its group that could begin."""
        opening = next(d.opening for d in group if d.opening is not None)
        ids, c = self.observations.prompt_ids(opening), self.config
        if len(ids) + c.answer_tokens > c.total_tokens:
            raise UserError(
                f"task {group[0].prompt}: its prompt has {len(ids)} tokens, which leaves no room for an answer of "
                f"{c.answer_tokens} within total_tokens={c.total_tokens}"
            )
        return ids

    def _turns(self, live: list[_Dialogue]) -> None:
        """The turns that end next, and what the environments say to them; others are still being written then."""
        c, engine = self.config, self.engine
        for i, d in enumerate(live):
            d.start = len(engine.ids(i)) if d.start is None else d.start
        free = [c.total_tokens - (d.start or 0) for d in live]
        # A dialogue's last turn: what was kept is for it.
        last = [len(d.marks) == c.max_turns or n <= c.answer_tokens for d, n in zip(live, free, strict=True)]
        limits = [min(c.turn_tokens, n if end else n - c.answer_tokens) for n, end in zip(free, last, strict=True)]
        turns = engine.first_turns(limits, live[0].env.stops if live else ())
        ended = [(i, live[i], turn) for i, turn in turns.items()]
        answers = self._together([partial(_answer, d.env, turn.text) for _, d, turn in ended])
        for (i, d, turn), (step, failure) in zip(ended, answers, strict=True):
            d.marks.append((d.start or 0, turn))
            d.start = None
            d.ids, d.failure = engine.ids(i), d.failure or failure
            d.terms.append({} if step is None else dict(step.info.get("terms", {"reward": step.reward})))
            d.played.append(PlayedTurn(turn.text, *(("", {}) if step is None else (step.observation, step.info))))
            d.over = last[i] or bool(d.failure) or step is None or step.terminated or step.truncated
            if step is None:
                continue
            d.finished = step.terminated
            d.facts["calls"] += bool(step.info.get("ran"))
            d.facts["errors"] += bool(step.info.get("error"))
            if not d.over:
                room = min(c.observation_tokens, c.total_tokens - len(d.ids) - c.answer_tokens)
                said = self.observations.ids(step.observation, ended=turn.stop == "end", room=room)
                d.facts["cut_observations"] += len(said) >= room
                d.over = not said  # no room for another turn
                engine.append(i, said)

    def _paid(self, d: _Dialogue, task: Mapping[str, Any]) -> Paid | None:
        """What a dialogue earned; None for one that failed before."""
        if d.failure:
            return None
        return self.rewards.pay(Dialogue(task, tuple(d.played), d.finished), Paid(d.terms, d.env.outcome()))

    def _trajectory(self, d: _Dialogue, task: Mapping[str, Any], version: int, paid: Paid, late: str) -> Trajectory:
        turn_id, logprob = [NOT_SAMPLED] * len(d.ids), [0.0] * len(d.ids)
        for k, (start, turn) in enumerate(d.marks):
            stop = start + len(turn.ids)
            turn_id[start:stop], logprob[start:stop] = [k] * len(turn.ids), turn.logprobs
        return Trajectory(
            prompt=d.prompt,
            rollout=d.rollout,
            ids=d.ids,
            turn_id=turn_id,
            logprob=logprob,
            turn_terms=paid.turns,
            outcome_terms=paid.outcome,
            stops=[turn.stop for _, turn in d.marks],
            finished=d.finished,
            policy_version=version,
            row_id=_name(task, d.prompt),
            failure=d.failure or late,
            facts=d.facts,
            sampler=self.engine.sampler,
            scorer=self.engine.scorer,
        )

    def _together(self, calls: Sequence[Callable[[], R]]) -> list[tuple[R | None, str]]:
        return _together(calls, self.config.timeout_s)


def _answer(env: Environment, action: str) -> Step:
    return Step(*env.step(action))  # Gymnasium's plain five-tuple will do


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
