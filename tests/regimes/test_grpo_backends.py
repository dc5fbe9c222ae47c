"""GRPO whose turns other samplers write: the ledger says who sampled, and with which weights."""

from __future__ import annotations

import statistics

import pytest
import torch
from completion_stub import CompletionStub
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from lit_reason.cli.reason_cli import build
from lit_reason.core.metrics_log import read_metrics
from lit_reason.core.run_folder import run_folder
from lit_reason.errors import UserError
from lit_reason.rollout.trajectory import read_ledger
from lit_reason.rollout.verify import inconsistencies
from lit_reason.tasks import chain
from lit_reason.tasks.student import write_student


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grpo")
    write_student(folder / "base", chain.words(chain.ChainConfig()))
    return folder


def rounds(folder, *options):
    """Two rounds; their ledger and their figures."""
    torch.set_num_threads(1)
    plain = ["--model.lm.overrides.attention_dropout=0.0", "--trainer.max_steps=2", "--model.dialogue.keep_every=1"]
    run = build("fit", ["--config", "smoke/grpo", f"--vars.folder={folder}", *plain, *options])
    run.run_verb()
    place = run_folder(run.trainer)
    return list(read_ledger(place / "rollouts.jsonl")), read_metrics(place / "metrics.csv")


def test_credit_is_in_ledger_metrics_and_report(folder):
    ledger, log = rounds(folder, "--trainer.callbacks+=RunReport", "--data.env.coin_reward=1.0")
    for t in ledger:
        assert len(t.advantage) == len(t.ids)
        assert all(a == 0 for a, k in zip(t.advantage, t.turn_id, strict=True) if k < 0)
    firsts = [t.advantage[t.turn_id.index(0)] for t in ledger[:64]]
    assert log.points("credit/variance_turn_1")[0] == (0, pytest.approx(statistics.variance(firsts), rel=1e-4))
    shares = [dict(log.points(f"credit/gradient_turn_{k}")) for k in (1, 2)]
    assert shares[0][1] + shares[1][1] == pytest.approx(1.0)
    (report,) = sorted((folder / "smoke-grpo").glob("*/report.html"))
    assert "Share of the gradient" in report.read_text() and "turn 2 · 1 · credit" in report.read_text()


def test_continuous_batching_in_training(folder):
    ledger, log = rounds(folder, "--model.dialogue.backend.name=continuous")
    assert len(ledger) == 128 and {(t.sampler, t.scorer) for t in ledger} == {("continuous", "sampler")}
    assert [t.policy_version for t in ledger] == [0] * 64 + [1] * 64
    assert [inconsistencies(t) for t in ledger] == [[]] * 128
    assert max(value for _, value in log.points("train/logprob_gap")) < 1e-4


@pytest.fixture
def stub(folder, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    stub = CompletionStub(get_peft_model(base, LoraConfig(r=4, target_modules="all-linear")))
    yield stub
    stub.close()


def test_a_server_in_training_is_given_each_new_adapter(folder, stub, tmp_path):
    server = {"name": "server", "url": stub.url, "model": "base", "folder": tmp_path}
    options = [f"--model.dialogue.backend.{name}={value}" for name, value in server.items()]
    ledger, log = rounds(folder, "--model.lm.adapter.rank=4", *options)
    assert {(t.sampler, t.scorer) for t in ledger} == {("server", "sampler")}
    assert [t.policy_version for t in ledger] == [0] * 64 + [1] * 64
    used = list(dict.fromkeys(asked["model"] for asked in stub.asked))
    assert [name.rpartition("-")[0] for name in used] == ["policy-0", "policy-1"]
    assert max(value for _, value in log.points("train/logprob_gap")) < 1e-4  # of both rounds: the weights went over


def test_a_server_that_is_not_synced_stops_the_run_when_it_is_behind(folder, stub):
    server = {"name": "server", "url": stub.url, "model": "base", "sync": "none"}
    options = [f"--model.dialogue.backend.{name}={value}" for name, value in server.items()]
    with pytest.raises(UserError, match="holds the weights of version 0, the trainer has made 1 updates"):
        rounds(folder, *options)
