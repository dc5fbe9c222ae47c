"""Training runs of the studies of shaped rewards, which keep the reward and the cost of every update."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Check = Callable[[Any], dict[str, Any]]


def arguments(given: Mapping[str, Any], search: Mapping[str, Any] | None, steps: int, work: Path) -> list[str]:
    """Options of `fit` for a run that leaves nothing behind.

    Args:
        given: options by name.
        search: those of a search for the mix; None for a run with given weights.
        steps: updates of a run without a search.
        work: root folder of the run, which becomes unique.
    """
    found = {
        **given,
        "trainer.callbacks": "null",
        "trainer.logger": "false",
        "trainer.enable_checkpointing": "false",
        "trainer.default_root_dir": f"{work}-{time.time_ns()}",
    }
    if search is None:
        found |= {"model.search": "null", "trainer.max_steps": steps}
    else:
        found |= {f"model.search.{name}": value for name, value in search.items()}
    return [f"--{name}={value}" for name, value in found.items()]


def watch(check: Check, every: int, *, first: bool = False, told: bool = False) -> Any:
    """A callback that keeps the reward and the cost of each step, and what a check says every few steps.

    Args:
        check: asked about the regime, in the final run of a search alone.
        every: steps between two checks.
        first: check before the first step too.
        told: print each step's reward.
    """
    from lightning.pytorch import Callback

    class Watch(Callback):
        def __init__(self) -> None:
            self.steps: list[dict[str, float]] = []
            self.checks: list[dict[str, Any]] = []
            self.calls = 0.0

        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            pay = pl_module.token_rewards.pay

            def paid(rollouts: Any, weights: Any) -> Any:
                found, figures = pay(rollouts, weights)
                self.calls += sum(figures["reward_calls"])
                self.score = statistics.fmean(figures["score"])
                return found, figures

            pl_module.token_rewards.pay = paid

        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if first and not self.checks:
                self.checks.append({"step": 0, **check(pl_module)})

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            inner = pl_module.inner
            final = inner is None or (inner.trial is not None and inner.trial.kind == "final")
            number = trainer.global_step - (inner.began_at if inner else 0)
            cost = {"calls": self.calls, "cpu": time.process_time()}
            self.steps.append({"final": final, "reward": self.score, **cost})
            if told:
                print(f"  {trainer.global_step} {'' if final else '(search) '}{self.score:.3f}", flush=True)
            if final and number % every == 0:
                self.checks.append({"step": number, **check(pl_module)})

    return Watch()


def fit(recipe: str, options: list[str], seen: Any) -> tuple[Any, dict[str, Any]]:
    """Train by a recipe.

    Args:
        recipe: its name.
        options: over those of the recipe.
        seen: the callback of `watch`.

    Returns:
        The trained regime, and its steps, checks and weights.
    """
    from lit_reason.cli.reason_cli import build
    from lit_reason.cli.runs import quiet

    with quiet():
        cli = build("fit", ["--config", recipe, *options])
        cli.trainer.callbacks.append(seen)
        began = time.process_time()
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    steps = [{**s, "cpu": s["cpu"] - began} for s in seen.steps]
    inner = cli.model.inner
    weights = list(inner.trial.weights) if inner is not None else list(cli.model.weights)
    return cli.model, {"steps": steps, "checks": seen.checks, "weights": weights}


def read(path: Path) -> list[dict[str, Any]]:
    """Finished runs; a line that a kill broke off is no run."""
    found = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found
