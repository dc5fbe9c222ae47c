"""The code of the documentation, run as it stands: an environment, a reward and a credit rule of one's own."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from tiny_run import write_model

from lit_reason.cli.reason_cli import build
from lit_reason.core.metrics_log import read_metrics
from lit_reason.core.run_folder import run_folder
from lit_reason.rollout.trajectory import read_ledger

DOCS = Path(__file__).resolve().parents[2] / "docs"
NAMES = ("my_env", "my_rewards", "my_rules")
QUESTIONS = ({"question": "What is cat?", "answer": "chat"}, {"question": "What is dog?", "answer": "chien"})


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """A folder with the documented modules, importable, and how many lines each has."""
    blocks = {}
    for page in (DOCS / "environments.md", DOCS / "regimes/grpo.md"):
        for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            if found := re.match(r"# (my_\w+)\.py\n", block):
                assert found[1] not in blocks
                blocks[found[1]] = block
    assert set(blocks) == set(NAMES)
    for name, block in blocks.items():
        (tmp_path / f"{name}.py").write_text(block)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield {name: len(block.splitlines()) for name, block in blocks.items()}
    for name in NAMES:
        sys.modules.pop(name, None)


def test_they_are_as_short_as_the_page_says(modules):
    assert modules["my_env"] <= 30 and modules["my_rewards"] <= 10 and modules["my_rules"] <= 10


def test_the_environment_plays(modules):
    from my_env import Translate

    env = Translate()
    opening = env.reset(QUESTIONS[0], 0)
    assert "look_up(word: str)" in opening[0]["content"]
    step = env.step('<tool>{"name": "look_up", "args": {"word": "cat"}}</tool>')
    assert step.observation == "<result>chat</result>" and "useful" in step.info["terms"]
    assert env.step("<answer>chat</answer>").terminated and env.outcome()["correct"] == 1.0


def test_all_three_train_together(modules, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    write_model(tmp_path / "model")
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    cli = build(
        "fit",
        [
            "--model=GRPORegime", f"--model.lm.path={tmp_path / 'model'}", "--model.credit.rule=my_rules:halved",
            "--model.dialogue.group=3", "--model.dialogue.max_turns=1", "--model.dialogue.turn_tokens=6",
            "--model.dialogue.answer_tokens=4", "--model.dialogue.total_tokens=250", "--model.dialogue.keep_every=1",
            "--data=TaskData", "--data.env=my_env.Translate", f"--data.train_file={tmp_path / 'tasks.jsonl'}",
            "--data.rewards={environment: 1.0, 'checker:exact': 0.5, 'my_rewards:brevity': -0.01}",
            "--data.val_count=0", "--data.batch_rows=2", "--trainer.accelerator=cpu", "--trainer.max_steps=1",
            "--trainer.log_every_n_steps=1", "--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={tmp_path}",
            "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false",
        ],
    )  # fmt: skip
    cli.run_verb()
    torch.set_num_threads(before)
    folder = run_folder(cli.trainer)
    rollouts = list(read_ledger(folder / "rollouts.jsonl"))
    assert len(rollouts) == 6 and not any(t.failure for t in rollouts)
    for t in rollouts:
        assert all(set(terms) == {"malformed", "my_rewards:brevity"} for terms in t.turn_terms)
        assert t.outcome_terms == {"answered": 0.0, "correct": 0.0, "checker:exact": 0.0}
    assert any(t.turn_terms[0]["my_rewards:brevity"] < 0 for t in rollouts)
    assert read_metrics(folder / "metrics.csv").last("train/failed") == 0.0
