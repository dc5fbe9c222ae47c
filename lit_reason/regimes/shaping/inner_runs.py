"""The inner runs of one process, one after the other in one `fit`: what begins and ends between two rounds.

All decisions about trials are made on the first process of a run and told to the others. Everything here is in the
checkpoint, and a trial's weights come from the store, so that a run killed anywhere goes on as it would have.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning.pytorch.utilities import rank_zero_info

from lit_reason.core.ranks import from_all_ranks
from lit_reason.core.schedules import lr_factor, schedule_of
from lit_reason.regimes.shaping.config import SearchConfig
from lit_reason.regimes.shaping.trial_store import TrialStore, trial_from
from lit_reason.regimes.shaping.trials import Trial, hopeless, next_trial, over

POLL_S = 2.0
WORDS = {"search": "trial", "rerun": "rerun", "final": "final run"}


class Trained(Protocol):
    """What an inner run trains: a regime."""

    optim_config: Any
    policy: Any
    trainer: Any

    def named_parameters(self) -> Any:
        """Weights by name."""

    def optimizers(self) -> Any:
        """The optimizer."""

    def held_out(self, part: str, seed: int) -> dict[str, float]:
        """Figures on held-out prompts, `objective` and its `variance` among them."""


class InnerRuns:
    """Begins, counts and ends inner runs.

    Args:
        config: the search.
        explainers: names, in the order of the weights.
        updates: optimizer steps a round.
    """

    def __init__(self, config: SearchConfig, explainers: Sequence[str], updates: int) -> None:
        self.config, self.explainers, self.updates = config, tuple(explainers), updates
        self.trial: Trial | None = None
        self.known: list[Trial] = []  # the trials when this one began
        self.done: list[int] = []
        self.curve: list[float] = []
        self.spent: dict[str, float] = {}
        self.rounds = self.began_at = 0
        self.owner = ""
        self._since = time.perf_counter()
        self._store: TrialStore | None = None
        self._start: dict[str, torch.Tensor] = {}

    @property
    def planned_steps(self) -> int:
        """Most optimizer steps of the search when one process makes it alone."""
        c = self.config
        inner = (c.trials + min(c.reruns, c.trials)) * c.rounds if len(self.explainers) > 1 else 0
        return (inner + c.final_rounds) * self.updates

    def set_length(self, trainer: Any) -> None:
        """Make a run as long as its inner runs together; one that the recipe makes shorter is said to be cut.

        Args:
            trainer: about to fit.
        """
        loop, steps = trainer.fit_loop, self.planned_steps
        if loop.epoch_loop.max_steps == -1:
            loop.epoch_loop.max_steps, loop.max_epochs = steps, -1
        elif loop.epoch_loop.max_steps < steps:
            rank_zero_info(
                f"search: {steps} updates are planned, trainer.max_steps cuts it at {loop.epoch_loop.max_steps}"
            )

    def remember_start(self, regime: Trained) -> None:
        """Keep the weights that every inner run begins with.

        Args:
            regime: freshly built, before a checkpoint is read.
        """
        self._start = {n: p.detach().clone() for n, p in regime.named_parameters() if p.requires_grad}

    def open(self, regime: Trained, folder: Path, digest: str) -> None:
        """Open the store, and put back what a checkpoint knew of it.

        Args:
            regime: gives the process's rank.
            folder: the run folder.
            digest: of everything that decides a trial's result.
        """
        self.owner = from_all_ranks(self.owner or uuid.uuid4().hex)[0]
        self._since = time.perf_counter()
        if regime.trainer.is_global_zero:
            self._store = TrialStore(Path(self.config.store or folder / "trials.sqlite"), digest)
            here = [] if self.trial is None else [self.trial]
            self._store.restore([*self.known, *here], self.owner)

    def before_round(self, regime: Trained) -> bool:
        """End the inner run that is complete, begin the next one.

        Args:
            regime: about to play a round.

        Returns:
            False when there is nothing left to run.
        """
        if self.trial is None or self.trial.status != "running":
            return self._begin(regime)
        sound = all(from_all_ranks(_finite(regime)))
        more = self.rounds < self.config.length(self.trial.kind)
        stopped = more and self.trial.kind == "search" and hopeless(self.curve, self.known, self.config)
        if sound and more and not stopped:
            self.rounds += 1
            self._on_first(regime, lambda: self._needed.heard(self._running.number))
            return True
        if self.trial.kind == "final" and sound:
            return False  # `finish` tests it
        self._end(regime, "stopped" if stopped else "finished", sound)
        return self._running.kind != "final" and self._begin(regime)

    def note_round(self, scores: Sequence[float], spent: dict[str, float]) -> None:
        """Add what a round of rollouts brought and cost, over all processes.

        Args:
            scores: unshaped score of each answer of this process.
            spent: costs by name.
        """
        everyone = from_all_ranks((sum(scores), len(scores), spent))
        mean = sum(total for total, _, _ in everyone) / max(sum(count for _, count, _ in everyone), 1)
        self.curve = [*self.curve[: self.rounds - 1], mean]  # of a round that is played again, the newest
        for _, _, amounts in everyone:
            for name, amount in amounts.items():
                self.spent[name] = self.spent.get(name, 0.0) + amount

    def finish(self, regime: Trained) -> None:
        """Test the final run, if that is what has just ended.

        Args:
            regime: at the end of training.
        """
        final = self.trial is not None and self.trial.kind == "final" and self.trial.status == "running"
        if final and self.rounds >= self.config.final_rounds:
            sound = all(from_all_ranks(_finite(regime)))
            self._end(regime, "finished", sound)

    def lr_factor(self, step: int, config: Any) -> float:
        """The learning rate's share at a step: each inner run has a schedule of its own.

        Args:
            step: optimizer steps so far, of all inner runs.
            config: gives the shape.
        """
        kind = self.trial.kind if self.trial is not None else "search"
        return lr_factor(max(step - self.began_at, 0), self.config.length(kind) * self.updates, config)

    def trials(self) -> list[Trial]:
        """All trials in the store; those known here on processes that have none."""
        return self._store.trials() if self._store is not None else self.known

    # ---- checkpoints ----

    def state(self, step: int) -> dict[str, Any]:
        """All that the next round depends on, as plain values.

        Args:
            step: optimizer steps behind the checkpoint. A round that no step was taken on yet will be played again.
        """
        rounds = min(self.rounds, -(-(step - self.began_at) // self.updates))
        return {
            "trial": None if self.trial is None else asdict(self.trial),
            "known": [asdict(trial) for trial in self.known],
            "done": list(self.done),
            "curve": self.curve[:rounds],
            "spent": dict(self.spent),
            "rounds": rounds,
            "began_at": self.began_at,
            "owner": self.owner,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave.

        Args:
            state: of a checkpoint.
        """
        self.trial = None if state["trial"] is None else trial_from(state["trial"])
        self.known = [trial_from(values) for values in state["known"]]
        self.done, self.curve, self.spent = list(state["done"]), list(state["curve"]), dict(state["spent"])
        self.rounds, self.began_at, self.owner = state["rounds"], state["began_at"], state["owner"]

    # ---- one inner run ----

    @property
    def _running(self) -> Trial:
        assert self.trial is not None
        return self.trial

    @property
    def _needed(self) -> TrialStore:
        assert self._store is not None
        return self._store

    def _on_first(self, regime: Trained, work: Callable[[], Any]) -> Any:
        """The result of work that the first process does for all."""
        return from_all_ranks(work() if regime.trainer.is_global_zero else None)[0]

    def _begin(self, regime: Trained) -> bool:
        thinking = time.perf_counter()
        claimed = self._on_first(regime, self._claim)
        if claimed is None:
            return False
        trial, before = claimed
        if self.config.start == "restart" or trial.kind == "final":
            _restart(regime, self._start)
        self.trial, self.known = trial, [t for t in before if t.number < trial.number]
        self.curve, self.rounds, self.began_at = [], 1, regime.trainer.global_step
        self.spent = {"outer_seconds": time.perf_counter() - thinking}
        self._since = time.perf_counter()
        optimizer = regime.optimizers().optimizer
        for group in optimizer.param_groups:
            shape = schedule_of(group, regime.optim_config)
            group["lr"] = group["initial_lr"] * self.lr_factor(regime.trainer.global_step, shape)
        named = ", ".join(f"{n} {w:.2f}" for n, w in zip(self.explainers, self._running.weights, strict=True))
        rank_zero_info(f"{WORDS[self._running.kind]} {self._running.number}: {named}")
        return True

    def _claim(self) -> tuple[Trial, list[Trial]] | None:
        """The next trial for this process; waits where it depends on the trials of others."""

        def choose(trials: Sequence[Trial]) -> tuple[str, list[float]] | None:
            found = next_trial(trials, self.config, self.explainers)
            return None if found is None else (found[0], found[1].tolist())

        while True:
            trial = self._needed.claim(self.owner, self.done, choose, self.config.lease_s)
            trials = self._needed.trials()
            if trial is not None:
                return trial, trials
            if over(trials):
                return None
            time.sleep(POLL_S)

    def _end(self, regime: Trained, status: str, sound: bool) -> None:
        trial = self._running
        self.spent["seconds"] = time.perf_counter() - self._since
        figures: dict[str, float] = {}
        if sound:
            part = "test" if trial.kind == "final" else "validation"
            figures = regime.held_out(part, seed=int(trial.kind == "rerun"))
            self.spent["evaluation_seconds"] = time.perf_counter() - self._since - self.spent["seconds"]
        self.trial = replace(
            trial,
            status=status if sound else "diverged",
            objective=figures.get("objective"),
            variance=figures.get("variance"),
            curve=tuple(self.curve),
            facts={**figures, **self.spent, "rounds": self.rounds},
        )
        self.done.append(trial.number)
        self._on_first(regime, lambda: self._needed.record(self._running, self.owner))
        shown = "diverged" if not sound else f"{status}, objective {figures['objective']:.4g}"
        rank_zero_info(f"{WORDS[trial.kind]} {trial.number}: {shown}")


def _finite(regime: Trained) -> bool:
    """Whether all trained weights of this process are numbers still."""
    return all(bool(_local(p).isfinite().all()) for _, p in regime.named_parameters() if p.requires_grad)


@torch.no_grad()
def _restart(regime: Trained, start: dict[str, torch.Tensor]) -> None:
    """The weights that the run began with, and an optimizer that has seen nothing."""
    for name, parameter in regime.named_parameters():
        if name in start:
            _local(parameter).copy_(_local(start[name]))
    regime.optimizers().optimizer.state.clear()


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
