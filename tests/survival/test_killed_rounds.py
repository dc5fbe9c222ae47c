"""On-policy runs that are killed between two rounds, or two updates of one, go on as if nothing had been."""

from __future__ import annotations

import os
import signal
import sys
import traceback

import pytest
import torch
from lightning.pytorch import Callback

from lit_reason.cli import door
from lit_reason.cli.reason_cli import build
from lit_reason.core.metrics_log import read_metrics
from lit_reason.rollout.trajectory import read_ledger
from lit_reason.tasks import chain
from lit_reason.tasks.student import write_student

OPTIONS = [
    *("--model.lm.adapter.rank=4", "--model.lm.adapter.dropout=0.1", "--model.optim.lr=0.01"),
    *("--model.dialogue.keep_every=1", "--model.policy.updates=2", "--trainer.max_steps=8"),
    *("--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps=1"),
    *("--trainer.callbacks.save_last=true", "--resume=auto"),
]
# A search of three inner runs of one round, and a final one: a kill between two of them, and within one.
OWN = {"shaping": [f"--model.search.{name}" for name in ("rounds=1", "final_rounds=1", "propose=random")]}
COSTS = ("perf/", "train/reward_calls", "train/known")  # what a cache that starts empty changes


class KillAt(Callback):
    """Kills the process, without a word, before the batch that follows so many optimizer steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def fit(recipe, folder, home, kill_at=-1):
    """Fit in a child process; its exit code, negative for the signal that ended it."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        torch.set_num_threads(1)

        def verb(words):
            cli = build(words[0], words[1:])
            cli.trainer.callbacks.insert(0, KillAt(kill_at))
            cli.run_verb()
            torch.save(cli.model.state_dict(), home / "weights.pt")
            return 0

        door.run_trainer_verb = verb
        where = [f"--vars.folder={folder}", f"--trainer.logger.save_dir={home}"]
        os._exit(door.main(["fit", "--config", f"smoke/{recipe}", *where, *OPTIONS, *OWN.get(recipe, [])]))
    except BaseException:
        traceback.print_exc(file=sys.__stderr__)
    os._exit(70)


def outcome(home, recipe):
    """Metrics without costs, ledger, and weights of a run."""
    (file,) = home.glob(f"smoke-{recipe}/version_*/metrics.csv")
    series = {k: v for k, v in read_metrics(file).series.items() if not k.startswith(COSTS)}
    played = list(read_ledger(file.parent / "rollouts.jsonl"))
    return series, played, torch.load(home / "weights.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rounds")
    write_student(folder / "base", chain.words(chain.ChainConfig()))
    return folder


@pytest.mark.parametrize("recipe", ["grpo", "ppo", pytest.param("shaping", marks=pytest.mark.slow)])
def test_a_run_killed_between_rounds_ends_as_one_that_was_not(recipe, folder, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for home in (whole, killed):
        home.mkdir()
    assert fit(recipe, folder, whole) == 0
    for step in (4, 5):  # between two rounds, and between two updates of one
        assert fit(recipe, folder, killed, kill_at=step) == -signal.SIGKILL
    assert fit(recipe, folder, killed) == 0
    series, played, weights = outcome(killed, recipe)
    wanted_series, wanted_played, wanted_weights = outcome(whole, recipe)
    assert series == wanted_series and len(series["train/loss"]) == 8
    assert played == wanted_played and {t.policy_version for t in played} == {0, 2, 4, 6}
    assert weights.keys() == wanted_weights.keys()
    assert all(torch.equal(weights[name], wanted_weights[name]) for name in weights)
