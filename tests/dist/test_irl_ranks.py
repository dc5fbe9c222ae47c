"""Inverse RL in two processes: phases, pairs and brakes agree, also where policy and reward share one base."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from dist import two_ranks

from lit_reason.cli.reason_cli import build
from lit_reason.core.metrics_log import read_metrics
from lit_reason.core.run_folder import run_folder
from lit_reason.errors import UserError
from lit_reason.tasks import chain
from lit_reason.tasks.problem_file import write_problems
from lit_reason.tasks.student import write_student

PLAIN = ["--model.lm.overrides.attention_dropout=0.0", "--trainer.max_steps=6", "--model.lm.adapter.rank=2"]
PLAIN += ["--model.reward.start=fresh", "--model.rounds.samples=2", "--model.rounds.prompts=12"]


def prepared(folder: Path) -> Path:
    config = chain.ChainConfig()
    write_student(folder / "base", chain.words(config))
    write_problems(folder / "data/train.jsonl", partial(chain.record, config, 0, held_out=False), 24)
    return folder


def curve(folder: Path, options: list[str]) -> list[float]:
    torch.set_num_threads(1)
    cli = build("fit", ["--config", "smoke/irl", f"--vars.folder={folder}", *PLAIN, *options])
    cli.run_verb()
    log = read_metrics(run_folder(cli.trainer) / "metrics.csv")
    return [value for name in ("train/loss", "train/kl_previous", "train/reward_std") for _, value in log.points(name)]


def in_two(folder: Path) -> list[float]:
    spread = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.enable_checkpointing=false"]
    return curve(folder, [*spread, "--data.batch_rows=4"])


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_with_a_shared_base_go_through_the_phases_as_one(tmp_path):
    folder = prepared(tmp_path)
    alone = curve(folder, [])
    both = two_ranks.run(in_two, tmp_path, folder)
    assert both[0] == pytest.approx(alone, rel=1e-3, abs=1e-5) and len(alone) == 8


@pytest.mark.slow
@pytest.mark.dist
def test_a_shared_base_in_shards_is_refused(tmp_path):
    folder = prepared(tmp_path)
    with pytest.raises(UserError, match="cannot share a base that is in shards"):
        curve(folder, ["--trainer.strategy=fsdp2", "--trainer.devices=1"])
