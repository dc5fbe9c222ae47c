"""C2 and C3 in a tiny size: all cases compute the same loss and gradient, which a plain formula confirms."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import head_family, head_loss, operators, policy_update
from benchmarks.chat_samples import TINY
from benchmarks.meter import cost_of
from lit_reason.models.config import ModelConfig
from lit_reason.models.language_model import LanguageModel


def options(of, case, *more):
    return of.arguments().parse_args(["--case", case, "--threads", "1", "--tiny", "--seed", "3", *more])


@pytest.mark.parametrize("case", [c for c in head_loss.CASES if not c.peer], ids=lambda c: c.name)
def test_every_case_computes_the_same_loss(case):
    if case.name == "torch" and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        pytest.skip("this torch has no linear_cross_entropy")
    figures = head_loss.run(head_loss.loss_of(case.name), options(head_loss, case.name))
    given = head_loss.inputs(3, 64, 16, 199)
    trained = given.targets >= 0
    logp = torch.log_softmax(given.hidden.double() @ given.weight.double().T, -1)
    loss = -logp[trained, given.targets[trained]].sum()
    loss.backward()
    assert 10 < int(trained.sum()) < 40
    assert figures["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert figures["gradient"] == pytest.approx(float(given.weight.grad.norm()), rel=1e-5)
    assert figures["cpu_s"] > 0


@pytest.mark.parametrize("case", [c for c in head_loss.CASES if c.peer], ids=lambda c: c.name)
def test_peers_compute_the_same_loss(case):
    pytest.importorskip("liger_kernel" if case.name.startswith("liger") else "trl")
    from benchmarks.peers import head_loss as peers

    theirs = head_loss.run(peers.loss_of(case.name), options(head_loss, case.name))
    ours = head_loss.run(head_loss.loss_of("lit_reason"), options(head_loss, "lit_reason"))
    for key in ("loss", "gradient"):
        assert theirs[key] == pytest.approx(ours[key], rel=1e-5)


def test_the_update_minimises_the_loss_as_written_out():
    given = policy_update.rollouts(3, TINY["vocab_size"])
    assert len(given) == 16 and given[0].prompt == given[3].prompt != given[4].prompt
    loss = policy_update.updates(TINY)(given)

    torch.manual_seed(0)
    policy, reference = (LanguageModel.load(ModelConfig(config=TINY)).hf for _ in range(2))
    terms, clipped = [], 0
    for r in given:
        ids = torch.tensor([r.prompt + r.completion])
        place, target = slice(len(r.prompt) - 1, -1), torch.tensor(r.completion)
        with torch.no_grad():
            log_p, log_q = (torch.log_softmax(m(ids).logits[0, place].double(), -1) for m in (policy, reference))
        logp, ref = (x[torch.arange(len(target)), target] for x in (log_p, log_q))
        ratio = (logp - torch.tensor(r.old_logp)).exp()
        gain = torch.minimum(ratio * r.advantage, ratio.clamp(0.8, 1.2) * r.advantage)
        clipped += int((gain != ratio * r.advantage).sum())
        kl = (ref - logp).exp() - (ref - logp) - 1
        terms.append(-gain + 0.04 * kl + 0.01 * (log_p.exp() * log_p).sum(-1))
    assert 100 < clipped < 1500
    assert loss == pytest.approx(float(torch.cat(terms).mean()), abs=1e-5)


def test_a_second_update_starts_from_the_first():
    given = policy_update.rollouts(3, TINY["vocab_size"])
    update = policy_update.updates(TINY)
    assert update(given) != update(given)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux can start a peak anew")
def test_memory_counts_from_what_was_resident():
    torch.ones(2**26)  # 256 MiB that are gone before the work
    cost, size = cost_of(lambda: torch.ones(2**25).numel())
    assert size == 2**25
    assert 120 < cost["rise_mib"] < 200
    assert cost["wall_s"] > 0


def test_the_ways_to_one_loss_in_the_family_agree(monkeypatch):
    sizes = {"ROWS": 30, "WIDTH": 8, "TEACHER_WIDTH": 12, "VOCABULARY": 199}
    for name, size in sizes.items():
        monkeypatch.setattr(head_family, name, size)
    losses = {case.name: head_family.run(case.name, 3, 1)["loss"] for case in head_family.CASES}
    for kind in ("policy", "divergence", "chunks"):
        ways = [loss for name, loss in losses.items() if name.startswith(kind)]
        assert len(ways) > 1 and ways == pytest.approx([ways[0]] * len(ways), rel=1e-4) and ways[0] != 0


@pytest.mark.parametrize("pair", zip(operators.CASES[::2], operators.CASES[1::2], strict=True), ids=lambda p: p[0].name)
def test_both_ways_of_every_operation_of_the_table_agree(pair):
    chunked, materialised = (operators.run(case.name, seed=3, tiny=True) for case in pair)
    for figure in ("loss", "gradient"):
        assert chunked[figure] == pytest.approx(materialised[figure], rel=1e-4) and chunked[figure] != 0
