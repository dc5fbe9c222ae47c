"""Restarts of two processes are those of one: kernels on uneven shards, ddp, fsdp2 by both routes, resumes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import two_ranks
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_run import arguments, write_model, write_traces
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from lit_reason.callbacks.hf_export import HFExport
from lit_reason.callbacks.restart import Restart
from lit_reason.cli.reason_cli import build
from lit_reason.core.metrics_log import read_metrics
from lit_reason.kernels.refactorization import refactorize, refactorize_sharded
from lit_reason.models.lowrank import LowRankLinear, lowrank_layers
from lit_reason.strategies import refactorization

pytestmark = [pytest.mark.dist, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]

K, STEPS = 3, 8
SETTINGS = {
    "model__lm__lowrank__rank": 6,
    "model__lm__lowrank__alpha": 6,
    "model__optim__schedule": "cosine_quick_recovery",
    "model__optim__period_steps": K,
    "model__optim__recovery_steps": 1,
    "model__optim__warmup": 0.0,
    "trainer__max_steps": STEPS,
}
RUNS = {"ddp": "auto", "gather": "gather", "tsqr": "tsqr"}
STOPS = {"ddp": K - 1, "gather": K, "tsqr": K + 2}  # just before, at and after the first restart
SPARSE = {"model__lm__lowrank__sparse_density": 0.1, "trainer__max_steps": K + 2}
SPLITS = [(20, 10), (3, 27), (30, 0)]  # rows on each of two processes, at rank 6: many, fewer than the rank, none


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def train(folder: Path, run: Path, route: str = "auto", ckpt_path: Path | None = None, **settings) -> dict:
    """A low-rank run with two restarts: what came out of it."""
    restart = Restart(route=route)
    saver = ModelCheckpoint(run / "saved", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    export = HFExport(str(run / "export"))
    cli = build("fit", arguments(folder, run, **{**SETTINGS, **settings}))
    cli.trainer.callbacks = [restart, export, *cli.trainer.callbacks, saver]
    cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=ckpt_path)
    log = Path(cli.trainer.log_dir) / "metrics.csv"
    first = cli.trainer.is_global_zero
    return {
        "losses": [value for _, value in read_metrics(log).points("train/loss")] if first else [],
        "weights": {n: whole(p) for n, p in cli.model.named_parameters()},
        "last": restart.last,
        "count": restart.state_dict()["count"],
        "sharded": all(isinstance(layer.out_factor, DTensor) for _, layer in lowrank_layers(cli.model.lm)),
    }


def factors() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(30, 6, generator=g) * torch.logspace(0, 2, 6), torch.randn(30, 6, generator=g)


def sharded_kernel() -> list:
    """New factors from every split of the rows, and what NaN comes to."""
    rank, found = dist.get_rank(), []
    for split in SPLITS:
        b, a = (factor.split(split)[rank] for factor in factors())
        found.append(refactorize_sharded(b, a))
    b, a = (factor.split((15, 15))[rank] for factor in factors())
    with pytest.raises(torch.linalg.LinAlgError):
        refactorize_sharded(b.index_fill(0, torch.tensor([2]), float("nan")) if rank == 1 else b, a)
    return found


def some_layers(seed: int, broken: int | None = None) -> list[LowRankLinear]:
    torch.manual_seed(seed)
    made = [LowRankLinear(n, m, 4, 1.0, 0, None, False, torch.empty(0)) for n, m in ((9, 8), (9, 8), (12, 7))]
    for number, layer in enumerate(made):
        layer.draw(False)
        with torch.no_grad():
            layer.out_factor.mul_(float("nan") if number == broken else 5.0)
    return made


def spread() -> dict:
    """Copies on all processes: equal results, a layer that is skipped, and processes that disagree."""
    layers = some_layers(0, broken=1)
    found = refactorization.refactorize_layers(layers)
    result = {"balances": found, "factors": [(lay.out_factor.detach(), lay.in_factor.detach()) for lay in layers]}
    apart = some_layers(0, broken=1)
    if dist.get_rank() == 1:
        nn.init.zeros_(apart[0].out_factor), nn.init.ones_(apart[1].in_factor)  # the skipped layer stays different
    with pytest.raises(RuntimeError, match="hold different factors"):
        refactorization.refactorize_layers(apart)
    return result


def in_both(folder: Path) -> dict:
    found: dict = {}
    for name, route in RUNS.items():
        strategy = "ddp" if name == "ddp" else "fsdp2"
        both = {"trainer__strategy": strategy, "trainer__devices": 2}
        found[name] = train(folder, folder / name, route, **both)
        saved = folder / name / "saved" / f"step={STOPS[name]}.ckpt"
        found["resumed", name] = train(folder, folder / "again" / name, route, saved, **both)
    found["sparse"] = train(folder, folder / "sparse", **SPARSE, trainer__strategy="fsdp2", trainer__devices=2)
    found["from one"] = train(
        folder,
        folder / "from_one",
        ckpt_path=folder / "one" / "saved" / f"step={K + 1}.ckpt",
        trainer__strategy="ddp",
        trainer__devices=2,
    )
    found["kernel"], found["spread"] = sharded_kernel(), spread()
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """One process with two micro-batches a step, and two processes."""
    base = tmp_path_factory.mktemp("restarts")
    write_model(base / "model")
    write_traces(base / "traces.jsonl")
    os.environ["LIT_REASON_CACHE"] = str(base / "cache")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = train(base, base / "one", trainer__accumulate_grad_batches=2)
    alone["sparse"] = train(base, base / "one_sparse", **SPARSE, trainer__accumulate_grad_batches=2)
    both = two_ranks.run(in_both, base, base, timeout=900)
    torch.set_num_threads(threads)
    return base, alone, both


def assert_same(got, expected):
    assert got["count"] == 2
    for name, value in expected["weights"].items():
        torch.testing.assert_close(got["weights"][name], value, rtol=1e-3, atol=1e-4, msg=name)
    for name in ("balance_defect", "stable_rank", "loss_before", "effective_lr"):
        name = f"restart/{name}"
        assert got["last"][name] == pytest.approx(expected["last"][name], rel=1e-3), name


@pytest.mark.parametrize("run", RUNS)
def test_losses_and_factors_of_two_processes_are_those_of_one(results, run):
    _, alone, both = results
    assert len(alone["losses"]) == STEPS and both[0][run]["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    for found in both:
        assert_same(found[run], alone)
        assert found[run]["sharded"] == (run != "ddp")
    for name, value in both[0][run]["weights"].items():
        assert torch.equal(both[1][run]["weights"][name], value), name


@pytest.mark.parametrize("run", RUNS)
def test_two_processes_resume_around_a_restart_bit_for_bit(results, run):
    _, _, both = results
    assert both[0]["resumed", run]["losses"] == both[0][run]["losses"][STOPS[run] :]
    for name, value in both[0][run]["weights"].items():
        assert torch.equal(both[0]["resumed", run]["weights"][name], value), name


@pytest.mark.parametrize("run", RUNS)
def test_the_export_of_two_processes_is_the_dense_model_of_one(results, run):
    base = results[0]
    ours, theirs = (AutoModelForCausalLM.from_pretrained(base / name / "export") for name in (run, "one"))
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_a_sparse_part_in_shards_trains_as_whole(results):
    _, alone, both = results
    expected, got = alone["sparse"], both[0]["sparse"]
    assert len(expected["losses"]) == K + 2 and got["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    values = [name for name in expected["weights"] if name.endswith(".values")]
    assert len(values) == 14
    for name in values:
        torch.testing.assert_close(got["weights"][name], expected["weights"][name], rtol=1e-3, atol=1e-4, msg=name)


def test_the_number_of_processes_may_change_between_restarts(results):
    base, alone, both = results
    assert both[0]["from one"]["losses"] == pytest.approx(alone["losses"][K + 1 :], rel=1e-4)
    assert_same(both[1]["from one"], alone)
    back = train(
        base,
        base / "from_two",
        ckpt_path=base / "ddp" / "saved" / f"step={K + 1}.ckpt",
        trainer__accumulate_grad_batches=2,
    )
    assert back["losses"] == pytest.approx(alone["losses"][K + 1 :], rel=1e-4)
    assert_same(back, alone)


@pytest.mark.parametrize("number", range(len(SPLITS)))
def test_factors_in_shards_of_any_height_are_balanced_as_whole_ones(results, number):
    _, _, both = results
    parts = [found["kernel"][number] for found in both]
    assert [len(part[0]) for part in parts] == list(SPLITS[number])
    got = [torch.cat(shards) for shards in zip(*parts, strict=True)]
    for new, want in zip(got, refactorize(*factors()), strict=True):
        torch.testing.assert_close(new, want, rtol=1e-3, atol=1e-3)
    b, a = factors()
    torch.testing.assert_close(got[0] @ got[1].t(), b @ a.t(), rtol=1e-5, atol=1e-4)


def test_spread_layers_are_those_of_one_process_and_equal_everywhere(results):
    _, _, both = results
    layers = some_layers(0, broken=1)
    balances = refactorization.refactorize_layers(layers)
    assert balances[1] is None and balances[0] is not None
    for found in both:
        assert found["spread"]["balances"] == balances
        for (b, a), layer in zip(found["spread"]["factors"], layers, strict=True):
            torch.testing.assert_close(b, layer.out_factor, rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(a, layer.in_factor, rtol=0, atol=0, equal_nan=True)
