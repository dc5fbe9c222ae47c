"""Rollouts that failed, or that a limit cut off, in whole runs: counted, left out, and the run goes on."""

from __future__ import annotations

import math
import threading
from pathlib import Path

import pytest
import torch

from lit_reason.cli.reason_cli import build
from lit_reason.core.metrics_log import read_metrics
from lit_reason.core.run_folder import run_folder
from lit_reason.envs.ladder import Ladder
from lit_reason.errors import UserError
from lit_reason.rollout.trajectory import read_ledger
from lit_reason.tasks import chain
from lit_reason.tasks.student import write_student


class Failing(Ladder):
    """A ladder that fails in rollouts 1 (raises), 2 (hangs) and 3 (cannot begin) of every group."""

    def reset(self, task, seed, rollout=0):
        self.rollout = rollout
        if rollout == 3:
            raise OSError("no room")
        return super().reset(task, seed, rollout)

    def step(self, action):
        if self.rollout == 1:
            raise OSError("the disk is gone")
        if self.rollout == 2:
            threading.Event().wait(60)
        return super().step(action)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("failed")
    write_student(folder / "base", chain.words(chain.ChainConfig()))
    return folder


def run(folder, recipe, *options):
    argv = ["--config", recipe, f"--vars.folder={folder}", "--model.lm.overrides.attention_dropout=0.0", *options]
    cli = build("fit", argv)
    cli.run_verb()
    return cli


@pytest.mark.filterwarnings("ignore:.*rollouts failed")
@pytest.mark.parametrize("recipe", ["smoke/grpo", "smoke/ppo"])
def test_failed_rollouts_are_counted_and_nothing_learns_from_them(folder, recipe):
    cli = run(
        folder, recipe, "--data.env=test_failed_rollouts.Failing", "--data.env.words=['1', '2']",
        "--data.env.rungs=2", "--model.dialogue.timeout_s=0.3", "--trainer.max_steps=2",
        "--model.dialogue.keep_every=1",
    )  # fmt: skip
    found = run_folder(cli.trainer)
    metrics = read_metrics(found / "metrics.csv")
    assert [value for _, value in metrics.points("train/failed")] == [0.375, 0.375]  # three of eight
    assert all(math.isfinite(value) for _, value in metrics.points("train/loss"))
    rollouts = list(read_ledger(found / "rollouts.jsonl"))
    assert [t.failure for t in rollouts[:4]] == [
        "", "OSError: the disk is gone", "no answer within 0.3 s", "OSError: no room"]  # fmt: skip
    assert len(rollouts) == 2 * 64
    last = [t for t in rollouts[64:] if t.ids]  # the packs of the second round hold these
    (pack,) = cli.model._packs
    sound = sum(t.sampled for t in last if not t.failure)
    assert pack.norm == sound == int((pack.target_weight != 0).sum())
    failed = sum(t.sampled for t in last if t.failure)
    assert failed and not pack.advantage[pack.target_weight == 0].any()


def test_a_run_whose_rollouts_are_all_cut_off_changes_nothing_and_goes_on(folder):
    cli = run(
        folder, "smoke/grpo", "--model.dialogue.max_turns=0", "--model.policy.truncated=mask", "--trainer.max_steps=2"
    )
    metrics = read_metrics(run_folder(cli.trainer) / "metrics.csv")
    assert [value for _, value in metrics.points("train/finished")] == [0.0, 0.0]
    assert [value for _, value in metrics.points("train/sampled_tokens")] == [1.0, 1.0]
    start = build("fit", ["--config", "smoke/grpo", f"--vars.folder={folder}"]).model
    start.trainer = cli.trainer
    start.configure_model()
    for before, after in zip(start.lm.parameters(), cli.model.lm.parameters(), strict=True):
        assert torch.equal(before, after)


class Shaky(Ladder):
    """A ladder whose every rollout fails to begin in some attempts of a round; it pays nothing, so none has spread."""

    def __init__(self, broken: list[int]) -> None:
        super().__init__([" a", " b"], ["1", "2"], rungs=2, rung_reward=0.0, outcome_reward=0.0, coin_reward=0.0)
        self.broken = broken

    def reset(self, task, seed, rollout=0):
        if seed % 3 in self.broken:  # of a run with two attempts after the first
            raise OSError(f"no browser, attempt {seed % 3}")
        return super().reset(task, seed, rollout)


def shaky(folder, broken):
    return run(
        folder, "smoke/grpo", f"--data.env={{class_path: test_failed_rollouts.Shaky, init_args: {{broken: {broken}}}}}",
        "--model.policy.resample=2", "--trainer.max_steps=1", "--data.batch_rows=2",
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*rollouts failed")
@pytest.mark.parametrize(("broken", "replaced"), [([1], 1.0), ([0, 1], 1.0), ([1, 2], 0.0)])
def test_an_attempt_that_fails_counts_as_one_and_the_run_goes_on(folder, broken, replaced):
    metrics = read_metrics(run_folder(shaky(folder, broken).trainer) / "metrics.csv")
    assert metrics.last("train/resampled") == replaced
    assert metrics.last("train/failed") == pytest.approx(len(broken) / 3)  # of all that were played
    assert metrics.last("train/turns") == 2.0  # of those that count


@pytest.mark.filterwarnings("ignore:.*rollouts failed")
def test_a_round_without_any_rollout_says_how_many_failed_and_why(folder):
    wanted = r"all 48 rollouts .* in 3 attempts \(policy.resample is 2\): 16 times OSError: no browser, attempt 0; 16"
    with pytest.raises(UserError, match=wanted):
        shaky(folder, [0, 1, 2])
