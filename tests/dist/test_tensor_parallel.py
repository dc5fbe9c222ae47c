"""Layers cut over two processes, and cut and sharded over four, train as one process does."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import two_ranks
from tiny_run import write_model, write_traces
from training import assert_equal_runs, train
from transformers import AutoModelForCausalLM

from lit_reason.cli.door import main

pytestmark = [
    pytest.mark.slow,
    pytest.mark.dist,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
]

STRATEGY = {
    "trainer__strategy": "lit_reason.strategies.fsdp2.FSDP2Strategy",
    "trainer__strategy__tensor_parallel_size": 2,
}
SETTINGS = {
    "data__batch_rows": None,
    "data__batch_tokens": 256,
    "trainer__gradient_clip_val": 0.05,
}


def in_each(folder: Path, world: int, copies: int) -> dict:
    """Train, resume from the folder, resume from the file of one process."""
    run = folder / f"of_{world}"
    settings = {
        **SETTINGS,
        **STRATEGY,
        "trainer__devices": world,
        "trainer__accumulate_grad_batches": 2 // copies,
        "data__val_file": folder / "val.jsonl",
    }
    found = {"straight": train(folder, run, settings)}
    found["own"] = train(folder, folder / f"again_{world}", settings, run / "checkpoints" / "step=2.ckpt")
    one = folder / "one" / "checkpoints" / "step=2.ckpt"
    found["file of one"] = train(folder, folder / f"from_one_{world}", settings, one)
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """One process with two micro-batches a step; two, which share the layers; four, of which two share them."""
    base = tmp_path_factory.mktemp("tensor_parallel")
    write_model(base / "model")
    write_traces(base / "traces.jsonl")
    write_traces(base / "val.jsonl", rows=5, seed=1)
    os.environ["LIT_REASON_CACHE"] = str(base / "cache")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    one = {**SETTINGS, "trainer__accumulate_grad_batches": 2, "data__val_file": base / "val.jsonl"}
    alone = train(base, base / "one", one)
    found = {}
    for world, copies in ((2, 1), (4, 2)):
        results = base / f"results_{world}"
        results.mkdir()
        found[world] = two_ranks.run(in_each, results, base, world, copies, world=world)
    torch.set_num_threads(threads)
    return base, alone, found, one


@pytest.mark.parametrize("world", [2, 4])
def test_losses_gradients_clipping_weights_and_completions_are_those_of_one_process(results, world):
    _, alone, found, _ = results
    assert found[world][0]["straight"]["losses"]
    for got in found[world]:
        assert_equal_runs(got["straight"], alone)
        assert got["straight"]["sharded"] == len(got["straight"]["weights"])
    assert any(not torch.equal(a, alone["clipped"][n]) for n, a in alone["gradients"].items())  # it did clip


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("start", ["own", "file of one"])
def test_runs_go_on_from_a_folder_and_from_a_file_of_one_process(results, world, start):
    _, _, found, _ = results
    straight, went_on = found[world][0]["straight"], found[world][0][start]
    assert len(went_on["losses"]) == 2
    exact = 0 if start == "own" else 1e-5
    assert went_on["losses"] == pytest.approx(straight["losses"][2:], rel=exact, abs=0)
    for name, value in straight["weights"].items():
        torch.testing.assert_close(went_on["weights"][name], value, rtol=0, atol=2e-6 if exact else 0, msg=name)


@pytest.mark.parametrize("world", [2, 4])
def test_a_consolidated_folder_resumes_in_one_process_and_the_export_is_whole(results, world, capsys):
    base, alone, found, one = results
    out = base / f"of_{world}.ckpt"
    assert main(["consolidate", str(base / f"of_{world}" / "checkpoints" / "step=2.ckpt"), str(out)]) == 0
    went_on = train(base, base / f"consolidated_{world}", one, out)
    assert went_on["losses"] == pytest.approx(alone["losses"][2:], rel=1e-5)
    ours, theirs = (AutoModelForCausalLM.from_pretrained(base / run / "export") for run in (f"of_{world}", "one"))
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=0, atol=2e-6, msg=name)
