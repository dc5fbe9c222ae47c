"""The GPU scripts run from end to end in a tiny size, so that a session on a GPU cannot fail for a typo."""

from __future__ import annotations

import argparse
import json
import sys

import pytest
import torch

from benchmarks.gpu import heads, run1, run2, run3
from benchmarks.gpu.session import Session

MISSING = ("datasets", "jsonargparse", "bitsandbytes", "liger_kernel", "cut_cross_entropy", "trl")


def finish(script, monkeypatch, tmp_path) -> dict:
    """Run a script's `main` and return its cases."""
    for name in MISSING:  # what a bare GPU machine lacks
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(sys, "argv", ["script", "--cpu", "--results", str(tmp_path)])
    script.main()
    (path,) = tmp_path.glob("*-tiny.json")
    return json.loads(path.read_text())["cases"]


def test_first_session(monkeypatch, tmp_path):
    cases = finish(run1, monkeypatch, tmp_path)
    assert sum(key.startswith("correct") for key in cases) == 12
    assert {"G7", "G1 S1 Llama-3-8B lit_reason", "G1 S5 compiled"} <= cases.keys()
    assert not [key for key, figures in cases.items() if "failed" in figures]


def test_second_session(monkeypatch, tmp_path):
    cases = finish(run2, monkeypatch, tmp_path)
    failed = {key for key, figures in cases.items() if "failed" in figures}
    assert all(key.endswith(("liger", "liger scaled", "cce", "cce exact", "trl", "torch chunked")) for key in failed)
    done = {key.split()[0] for key in cases.keys() - failed}
    assert {"G1", "G2", "G3", "G4"} <= done


def test_third_session(monkeypatch, tmp_path):
    cases = finish(run3, monkeypatch, tmp_path)
    assert {key for key, figures in cases.items() if "failed" in figures} == {f"G5 {name} trl" for name in run3.MODELS}
    for name in ("adamw", "galore", "apollo"):
        assert cases[f"G6 {name}"]["of_formula"] == pytest.approx(1.0, rel=0.01)
    for name in run3.MODELS:
        ours, theirs = (cases[f"G5 {name} {kind}"] for kind in ("lit_reason", "transformers"))
        assert ours["first_loss"] == pytest.approx(theirs["first_loss"], rel=1e-5)
        assert ours["longest_kernels"]


def test_all_losses_of_a_group_agree():
    given = heads.make_inputs(heads.TINY, torch.device("cpu"), torch.float32)
    for group in (
        (heads.one_pass, heads.materialised),
        (heads.one_pass_policy, heads.recomputed_policy),
        (heads.recomputed_logp_entropy, heads.materialised_logp_entropy),
    ):
        found = []
        for loss in group:
            value = loss(given)
            value.backward()
            found.append((float(value.detach()), given.weight.grad.clone(), given.hidden.grad.clone()))
            given.weight.grad = given.hidden.grad = None
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    other = heads.make_inputs(heads.TINY, torch.device("cpu"), torch.float32, seed=1)
    ours, plain = (float(f(given, other).detach()) for f in (heads.divergence, heads.materialised_divergence))
    assert ours == pytest.approx(plain, rel=1e-4)


def test_a_wrong_operation_is_seen(tmp_path, monkeypatch):
    session = Session("x", argparse.Namespace(cpu=True, budget_s=60, results=tmp_path))
    right = run1.linear_token_loss

    def wrong(hidden, weight, targets, share, **options):
        return right(hidden, weight, targets, share.abs(), **options)  # loses the sign of a weight

    monkeypatch.setattr(
        run1, "linear_token_loss", lambda *a, **k: (right if k["backend"] == "reference" else wrong)(*a, **k)
    )
    session.case("correct", lambda: run1.correctness(session, heads.TINY, torch.float32, "nll"))
    assert "AssertionError" in session.cases["correct"]["failed"]
    with pytest.raises(SystemExit, match="correct"):
        session.close()


def test_what_no_longer_fits_the_budget_is_left_out_and_said(tmp_path):
    session = Session("x", argparse.Namespace(cpu=True, budget_s=20, results=tmp_path))
    session.case("short", lambda: {"ms": 1.0}, needs_s=1)
    session.case("long", lambda: pytest.fail("must not run"), needs_s=100)
    session.case("peer", lambda: {}["nothing"], needs_s=1, peer=True)
    written = json.loads(session.path.read_text())["cases"]
    assert written["short"]["ms"] == 1.0 and "100 s needed" in written["long"]["left_out"]
    assert "KeyError" in written["peer"]["failed"]
    session.close()


def test_the_floor_is_products_plus_passes():
    shape = heads.SHAPES["S1 Llama-3-8B"]
    assert shape.floor_ms(790, 4300) == pytest.approx(65.4 + 4.9, abs=0.1)
    assert shape.floor_ms(790, 4300, passes=8) == pytest.approx(87.2 + 4.9, abs=0.1)


def test_without_a_gpu_a_script_says_how_to_try_it(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit, match="--cpu"):
        Session("x", argparse.Namespace(cpu=False, budget_s=20, results=tmp_path))
