"""Two processes train as one does: ddp and fsdp2, whole weights and adapters, rows counted and rows packed."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import two_ranks
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_run import fit, write_model, write_traces
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from training import assert_equal_runs, train, whole
from transformers import AutoConfig, AutoModelForCausalLM

from lit_reason.cli.door import main
from lit_reason.core.resume import read_step
from lit_reason.errors import UserError
from lit_reason.strategies.clipping import clip_norm

pytestmark = [pytest.mark.dist, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]

PACKED = {"data__batch_rows": None, "data__batch_tokens": 256}
CASES = {
    "rows": {"data__batch_rows": 8, "trainer__gradient_clip_val": 0.3},  # five batches: one process lacks a sixth
    "tied": {**PACKED, "model__lm__gradient_checkpointing": "true"},
    "lora": {**PACKED, "model__lm__adapter__rank": 3, "trainer__gradient_clip_val": 0.01},
}
AS_FILE = {  # of fsdp2: gather a checkpoint on the first process
    "trainer__strategy": "lit_reason.strategies.fsdp2.FSDP2Strategy",
    "trainer__strategy__save_distributed_checkpoint": "false",
}
RUNS = [("fsdp2", "rows"), ("fsdp2", "tied"), ("fsdp2", "lora"), ("ddp", "rows"), ("ddp", "lora")]


def in_both(folder: Path) -> dict:
    found = {}
    for strategy, case in RUNS:
        settings = {
            "trainer__strategy": strategy,
            "trainer__devices": 2,
            **(AS_FILE if (strategy, case) == ("fsdp2", "lora") else {}),
        }
        run = folder / strategy / case
        found[strategy, case] = train(folder, run, {**CASES[case], **settings})
        if strategy == "fsdp2":
            saved = run / "checkpoints" / "step=2.ckpt"
            found["own", case] = train(folder, folder / "again" / case, {**CASES[case], **settings}, saved)
        if strategy == "fsdp2" and case == "rows":
            saved = folder / "one" / case / "checkpoints" / "step=2.ckpt"
            found["file of one", case] = train(folder, folder / "from_one" / case, {**CASES[case], **settings}, saved)
    consolidated = folder / "rows.ckpt"
    if torch.distributed.get_rank() == 0:
        assert main(["consolidate", str(folder / "fsdp2/rows/checkpoints/step=2.ckpt"), str(consolidated)]) == 0
    torch.distributed.barrier()
    settings = {**CASES["rows"], "trainer__strategy": "ddp", "trainer__devices": 2}
    found["ddp from fsdp2", "rows"] = train(folder, folder / "ddp_from_fsdp2", settings, consolidated)
    found["stopped"] = stop_one_of_two(folder)
    found["clipping"] = clip_on_three_meshes()
    settings = {"trainer__strategy": "fsdp2", "trainer__devices": 2}
    for kind, saved in (("folder", folder / "fsdp2"), ("file", folder / "one")):
        saved = saved / "rows" / "checkpoints" / "step=2.ckpt"
        with pytest.raises(UserError) as refused:
            train(folder, folder / "refused", {**CASES["lora"], **settings}, saved)
        found["refused", kind] = str(refused.value)
    return found


class Interrupt(Callback):
    """The second process is told to stop while it computes its second batch; the first is told nothing."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_rank == 1 and batch_idx == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def stop_one_of_two(folder: Path) -> int:
    settings = {**CASES["rows"], "trainer__strategy": "fsdp2", "trainer__devices": 2, "trainer__max_steps": 20}
    saver = ModelCheckpoint(folder / "stopped", save_on_exception=True, filename="{step}", every_n_train_steps=50)
    with pytest.raises(SystemExit) as stop:
        fit(folder, folder / "stopped", [Interrupt(), saver], **settings)
    assert type(stop.value).__name__ == "SIGTERMException"
    (saved,) = [path for path in (folder / "stopped").iterdir() if path.suffix == ".ckpt"]
    return read_step(saved)


def gradients() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator) for shape in [(5, 3), (4, 2), (7,), (2, 2)]]


def clip_on_three_meshes() -> tuple[float, list[torch.Tensor]]:
    """Clip gradients of which two are sharded along one dimension, one over a 2D mesh, and one is whole."""
    line = init_device_mesh("cpu", (2,))
    plane = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    a, b, c, d = gradients()
    spread = [
        distribute_tensor(a, line, [Shard(0)]),  # five rows: three here, two there
        distribute_tensor(b, plane, [Shard(0), Shard(1)]),
        distribute_tensor(c, line, [Replicate()]),
        d,
    ]
    parameters = [torch.nn.Parameter(torch.zeros_like(g)) for g in spread]
    for parameter, gradient in zip(parameters, spread, strict=True):
        parameter.grad = gradient
    parameters.append(torch.nn.Parameter(torch.zeros(3)))  # without gradient
    norm = clip_norm(parameters, 1.5)
    return float(norm), [whole(p.grad) for p in parameters[:4]]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """One process with two micro-batches a step, and two processes."""
    base = tmp_path_factory.mktemp("dist")
    write_model(base / "model")
    tied = AutoConfig.from_pretrained(base / "model", tie_word_embeddings=True)
    shutil.copytree(base / "model", base / "tied")
    AutoModelForCausalLM.from_config(tied).save_pretrained(base / "tied")
    CASES["tied"]["model__lm__path"] = base / "tied"
    write_traces(base / "traces.jsonl")
    write_traces(base / "val.jsonl", rows=5, seed=1)
    os.environ["LIT_REASON_CACHE"] = str(base / "cache")
    for settings in CASES.values():
        settings["data__val_file"] = base / "val.jsonl"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    one = {"trainer__accumulate_grad_batches": 2}
    alone = {case: train(base, base / "one" / case, {**settings, **one}) for case, settings in CASES.items()}
    both = two_ranks.run(in_both, base, base)
    torch.set_num_threads(threads)
    return base, alone, both


@pytest.mark.parametrize("strategy, case", RUNS)
def test_losses_gradients_weights_and_completions_are_those_of_one_process(results, strategy, case):
    _, alone, both = results
    assert both[0][strategy, case]["losses"]
    for got in (both[0][strategy, case], both[1][strategy, case]):
        assert_equal_runs(got, alone[case])
        assert (got["sharded"] == len(got["weights"])) if strategy == "fsdp2" else not got["sharded"]


@pytest.mark.parametrize(
    "start, case",
    [("own", "rows"), ("own", "tied"), ("own", "lora"), ("file of one", "rows"), ("ddp from fsdp2", "rows")],
)
def test_two_processes_go_on_from_their_folder_their_file_a_file_of_one_and_one_of_the_other(results, start, case):
    _, alone, both = results
    went_on, straight = both[0][start, case], both[0]["fsdp2", case]
    exact = start == "own"
    assert len(went_on["losses"]) == 2 and not went_on["gradients"]  # steps 3 and 4 alone
    assert went_on["losses"] == (straight["losses"][2:] if exact else pytest.approx(straight["losses"][2:], rel=1e-5))
    for name, value in straight["weights"].items():
        tolerance = 0 if exact else 2e-6
        torch.testing.assert_close(went_on["weights"][name], value, rtol=0, atol=tolerance, msg=f"weights of {name}")


@pytest.mark.parametrize("case", ["rows", "tied", "lora"])
def test_a_consolidated_folder_and_a_gathered_file_resume_in_one_process(results, case, capsys):
    base, alone, both = results
    straight = both[0]["fsdp2", case]
    folder, out = base / "fsdp2" / case / "checkpoints" / "step=2.ckpt", base / f"{case}.ckpt"
    if case == "rows":  # done already, by two processes
        out = base / "rows.ckpt"
    elif case == "lora":  # written as a file
        assert main(["consolidate", str(folder), str(out)]) == 2 and "is a file" in capsys.readouterr().err
        out = folder
    else:
        assert main(["consolidate", str(folder), str(out)]) == 0 and "step 2" in capsys.readouterr().out
    one = torch.load(base / "one" / case / "checkpoints" / "step=2.ckpt", weights_only=True)
    got = torch.load(out, weights_only=True)
    assert got.keys() == one.keys() and got["state_dict"].keys() == one["state_dict"].keys()
    ours, theirs = got["optimizer_states"][0], one["optimizer_states"][0]
    assert [g["params"] for g in ours["param_groups"]] == [g["params"] for g in theirs["param_groups"]]
    for number, values in theirs["state"].items():
        for key, value in values.items():
            torch.testing.assert_close(ours["state"][number][key], value, rtol=1e-4, atol=1e-6)
    run = base / "consolidated" / case
    went_on = train(base, run, {**CASES[case], "trainer__accumulate_grad_batches": 2}, out)
    assert went_on["losses"] == straight["losses"][2:] and len(went_on["losses"]) == 2
    for name, value in straight["weights"].items():
        torch.testing.assert_close(went_on["weights"][name], value, rtol=0, atol=2e-6, msg=f"weights of {name}")
    if case != "lora":
        assert main(["consolidate", str(folder), str(out)]) == 2 and "exists already" in capsys.readouterr().err
    assert not list(base.glob(".*")) and not list(folder.parent.glob(".*"))  # nothing half done is left behind


@pytest.mark.parametrize("case", ["rows", "tied", "lora"])
def test_sharded_weights_are_exported_whole(results, case):
    base = results[0]
    ours, theirs = (AutoModelForCausalLM.from_pretrained(base / run / case / "export") for run in ("fsdp2", "one"))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=0, atol=2e-6, msg=name)


def test_a_signal_to_one_process_stops_and_saves_both_after_the_same_step(results):
    assert [found["stopped"] for found in results[2]] == [2, 2]


def test_clipping_over_several_meshes_is_that_of_whole_gradients(results):
    _, _, both = results
    expected = [torch.nn.Parameter(torch.zeros_like(g)) for g in gradients()]
    for parameter, gradient in zip(expected, gradients(), strict=True):
        parameter.grad = gradient
    norm = float(torch.nn.utils.clip_grad_norm_(expected, 1.5))
    assert norm > 3
    for found in both:
        assert found["clipping"][0] == pytest.approx(norm, rel=1e-6)
        for got, parameter in zip(found["clipping"][1], expected, strict=True):
            torch.testing.assert_close(got, parameter.grad, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_checkpoint_of_another_recipe_is_refused(results, kind):
    for found in results[2]:
        assert "the checkpoint does not fit this recipe" in found["refused", kind]
