"""Inverse RL in two processes: phases, pairs and brakes agree, also where policy and reward share one base."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from dist import two_ranks
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lit_reason.cli.reason_cli import build
from lit_reason.core.metrics_log import read_metrics
from lit_reason.core.run_folder import run_folder
from lit_reason.tasks import chain
from lit_reason.tasks.problem_file import write_problems
from lit_reason.tasks.student import write_student

PLAIN = ["--model.lm.overrides.attention_dropout=0.0", "--trainer.max_steps=8"]
PLAIN += ["--model.reward.start=fresh", "--model.rounds.samples=2", "--model.rounds.prompts=12"]


def prepared(folder: Path) -> Path:
    config = chain.ChainConfig()
    write_student(folder / "base", chain.words(config))
    write_problems(folder / "data/train.jsonl", partial(chain.record, config, 0, held_out=False), 24)
    return folder


def curve(folder: Path, options: list[str]) -> tuple[list[float], Path]:
    torch.set_num_threads(1)
    cli = build("fit", ["--config", "smoke/irl", f"--vars.folder={folder}", *PLAIN, *options])
    cli.run_verb()
    log = read_metrics(run_folder(cli.trainer) / "metrics.csv")
    names = ("train/loss", "train/kl_previous", "train/reward_std")
    return [value for name in names for _, value in log.points(name)], run_folder(cli.trainer)


def in_two(folder: Path, strategy: str, options: list[str]) -> tuple[list[float], Path]:
    spread = ["--trainer.devices=2", f"--trainer.strategy={strategy}", "--trainer.enable_checkpointing=false"]
    return curve(folder, [*spread, "--data.batch_rows=4", *options])


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize(
    ("strategy", "base"), [("ddp", "shared"), ("fsdp2", "shared"), ("fsdp2", "apart")], ids=lambda word: word
)
def test_two_processes_go_through_the_phases_of_two_rounds_as_one(tmp_path, strategy, base):
    folder = prepared(tmp_path)
    exports = ["--model.lm.adapter.rank=2"]
    if base == "apart":
        exports = ["--model.critic.trunk=separate", "--model.rounds.critic_start=reward"]
    exports += ["--trainer.callbacks+=HFExport", "--trainer.callbacks+=RewardExport"]
    alone, here = curve(folder, exports)
    (both, there), _ = two_ranks.run(in_two, tmp_path, folder, strategy, exports)
    assert both == pytest.approx(alone, rel=1e-3, abs=1e-4) and len(alone) == 11
    ids = torch.arange(3, 40)[None]
    for name, kind in (("export", AutoModelForCausalLM), ("reward", AutoModelForSequenceClassification)):
        ours, theirs = (kind.from_pretrained(run / name).eval()(input_ids=ids).logits for run in (here, there))
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
