"""Restarts of low-rank runs: when, what they leave alone, what they forget, and how a run is resumed around one."""

from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_run import arguments, write_model, write_traces

from lit_reason.callbacks import restart as restart_of
from lit_reason.callbacks.restart import Restart
from lit_reason.cli.reason_cli import build
from lit_reason.core.metrics_log import read_metrics
from lit_reason.errors import UserError
from lit_reason.models.lowrank import lowrank_layers
from lit_reason.strategies import refactorization
from lit_reason.strategies.refactorization import Balance, refactorize_layers

K = 5
LOWRANK = {
    "model__lm__lowrank__rank": 6,
    "model__lm__lowrank__alpha": 6,
    "model__lm__overrides__attention_dropout": 0.1,  # so that a restart could disturb random numbers
    "trainer__max_steps": 2 * K + 7,
    "model__optim__warmup": 0.1,
    "model__optim__period_steps": K,
    "model__optim__recovery_steps": 1,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("tiny")
    write_model(base / "model")
    write_traces(base / "traces.jsonl")
    return base


def train(folder, run, *others, restart=None, ckpt_path=None, last=False, **settings):
    """A run that saves after every step; the restart comes before, as from a recipe, or last."""
    restart = restart or Restart()
    saver = ModelCheckpoint(run / "saved", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    cli = build("fit", arguments(folder, run, **{**LOWRANK, **settings}))
    before, after = ([], [restart]) if last else ([restart], [])
    cli.trainer.callbacks = [*others, *before, *cli.trainer.callbacks, saver, *after]
    cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=ckpt_path)
    return cli, restart


def layers(cli):
    return [layer for _, layer in lowrank_layers(cli.model.lm)]


def defect(layer):
    out, inner = (f.detach().t() @ f.detach() for f in (layer.out_factor, layer.in_factor))
    return float((out - inner).norm() / out.norm())


class Watch(Callback):
    """What stands after each micro-batch and its restart: step, worst balance, largest moment."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        states = trainer.optimizers[0].state.values()
        moment = max((float(s["exp_avg"].abs().max()) for s in states), default=0.0)
        worst = max(defect(layer) for _, layer in lowrank_layers(pl_module.lm))
        self.seen.append((trainer.global_step, worst, moment))


def test_restarts_balance_factors_and_empty_the_optimizer_at_every_period(folder, tmp_path):
    watch = Watch()
    cli, restart = train(folder, tmp_path, watch, trainer__accumulate_grad_batches=2, data__batch_rows=4)
    by_step = {step: (worst, moment) for step, worst, moment in reversed(watch.seen)}  # first micro-batch after a step
    assert sorted(by_step) == list(range(2 * K + 7)) and len(watch.seen) == 2 * (2 * K + 7)
    empty = [step for step, (_, moment) in by_step.items() if moment == 0]
    assert sorted(empty) == [0, K, 2 * K]  # 15 is too near the end
    assert all(by_step[step][0] < 1e-4 for step in (K, 2 * K)) and by_step[K - 1][0] > 1e-3
    assert restart.state_dict()["count"] == 2 and restart.state_dict()["last_step"] == 2 * K
    log = read_metrics(Path(cli.trainer.log_dir) / "metrics.csv")
    assert [value for _, value in log.points("restart/count")] == [1, 2]
    for name in ("balance_defect", "stable_rank", "stable_rank_min", "effective_lr", "seconds", "loss_before"):
        assert all(value > 0 for _, value in log.points(f"restart/{name}")), name
    for (step, before), (_, after) in zip(
        log.points("restart/loss_before"), log.points("restart/loss_after"), strict=True
    ):
        assert after == pytest.approx(before, abs=1e-5) and step in (K - 1, 2 * K - 1)  # steps are counted from 0
    assert log.points("restart/stable_rank")[0][1] <= 6


def test_ranks_are_told_by_block():
    names = ("layers.0.attn.q", "layers.0.mlp.up", "layers.10.mlp.up", "tail.proj")
    with pytest.warns(UserWarning, match="1 of 4 layers keep their factors"):
        figures = restart_of._summary(names, [Balance(0.1, 2.0), None, Balance(0.3, 4.0), Balance(0.2, 6.0)])
    assert figures["stable_rank"] == 4.0 and figures["stable_rank_min"] == 2.0
    assert figures["balance_defect"] == pytest.approx(0.2) and figures["skipped_layers"] == 1
    assert {k: v for k, v in figures.items() if "block" in k} == {
        "stable_rank_block_0": 2.0,
        "stable_rank_block_10": 4.0,
    }


def test_figures_are_those_of_the_dense_product(folder, tmp_path):
    """Balance and stable rank of one layer, from the matrix itself."""
    cli, _ = train(folder, tmp_path, trainer__max_steps=2)
    layer = layers(cli)[0]
    with torch.no_grad():
        layer.out_factor.mul_(3.0)
    product = (layer.out_factor @ layer.in_factor.t()).detach()
    singular = torch.linalg.svdvals(product.double())
    expected = defect(layer)
    (found,) = refactorize_layers([layer])
    assert found.defect == pytest.approx(expected, rel=1e-5)
    assert found.stable_rank == pytest.approx(float(singular.square().sum() / singular.max() ** 2), rel=1e-4)
    torch.testing.assert_close(layer.out_factor @ layer.in_factor.t(), product, rtol=1e-5, atol=1e-6)


def test_a_refactorization_alone_keeps_moments_and_a_reset_alone_keeps_factors(folder, tmp_path):
    kept, emptied = Watch(), Watch()
    train(folder, tmp_path / "a", kept, restart=Restart(reset="none"))
    train(folder, tmp_path / "b", emptied, restart=Restart(refactorize=False))
    at = [entry for entry in kept.seen if entry[0] == K][0]
    assert at[1] < 1e-4 and at[2] > 0
    at = [entry for entry in emptied.seen if entry[0] == K][0]
    assert at[1] > 1e-3 and at[2] == 0


@pytest.fixture(scope="module")
def straight(folder, tmp_path_factory):
    run = tmp_path_factory.mktemp("straight")
    cli, _ = train(folder, run)
    return run, read_metrics(Path(cli.trainer.log_dir) / "metrics.csv").points("train/loss"), cli.model.state_dict()


@pytest.mark.parametrize("stop", [K - 1, K, K + 3])
def test_a_run_resumed_around_a_restart_is_the_uninterrupted_one_bit_for_bit(folder, tmp_path, straight, stop):
    saved, losses, weights = straight
    cli, restart = train(folder, tmp_path, ckpt_path=saved / "saved" / f"step={stop}.ckpt")
    went_on = read_metrics(Path(cli.trainer.log_dir) / "metrics.csv").points("train/loss")
    assert len(losses) == 2 * K + 7 and went_on == losses[stop:]
    assert restart.state_dict()["count"] == 2
    for name, value in weights.items():
        assert torch.equal(cli.model.state_dict()[name], value), name


def test_checkpoints_load_without_running_code_and_hold_the_place_in_the_cycle(straight):
    states = [
        torch.load(straight[0] / "saved" / f"step={step}.ckpt", weights_only=True)["callbacks"]["Restart"]
        for step in (K - 1, K)
    ]
    assert [(s["step"], s["count"], s["last_step"], s["restart_pending"]) for s in states] == [
        (K - 1, 0, 0, False),
        (K, 1, K, False),
    ]


def test_a_restart_that_was_due_when_the_checkpoint_was_saved_is_made_on_resume(folder, tmp_path, straight):
    """The checkpoint is written before the restart of the same step, as the released code does; nothing is lost."""
    _, losses, weights = straight
    train(folder, tmp_path / "a", last=True)
    due = tmp_path / "a" / "saved" / f"step={K}.ckpt"
    state = torch.load(due, weights_only=True)["callbacks"]["Restart"]
    assert state["restart_pending"] and state["count"] == 0
    cli, restart = train(folder, tmp_path / "b", ckpt_path=due)
    assert restart.state_dict()["count"] == 2 and restart.state_dict()["last_step"] == 2 * K
    assert read_metrics(Path(cli.trainer.log_dir) / "metrics.csv").points("train/loss") == losses[K:]
    for name, value in weights.items():
        assert torch.equal(cli.model.state_dict()[name], value), name


class Break(Callback):
    """Makes one number of the run not finite, once, at step K."""

    def __init__(self, where):
        self.where = where

    def on_after_backward(self, trainer, pl_module):
        if self.where == "gradient" and trainer.global_step == K - 1:
            next(lowrank_layers(pl_module.lm))[1].out_factor.grad[0, 0] = float("inf")

    def on_train_batch_end(self, trainer, pl_module, *_):
        if self.where == "factor" and trainer.global_step == K:
            next(lowrank_layers(pl_module.lm))[1].out_factor.data[0, 0] = float("nan")


def test_no_restart_after_a_gradient_that_is_not_finite(folder, tmp_path, recwarn):
    _, restart = train(folder, tmp_path, Break("gradient"), trainer__max_steps=2 * K - 1)
    assert restart.state_dict()["count"] == 0
    assert any(f"skipped at step {K}, because its gradient" in str(w.message) for w in recwarn)


def test_a_layer_with_nan_keeps_its_factors_and_the_run_goes_on(folder, tmp_path, recwarn):
    cli, restart = train(folder, tmp_path, Break("factor"), trainer__max_steps=2 * K)
    assert restart.last["restart/skipped_layers"] == 1 and cli.trainer.global_step == 2 * K
    assert any("1 of 14 layers keep their factors" in str(w.message) and "q_proj" in str(w.message) for w in recwarn)


def test_a_refactorization_that_moves_the_loss_is_warned_about(folder, tmp_path, monkeypatch, recwarn):
    losses = iter([1.0, 1.02, 1.0, 1.005])
    monkeypatch.setattr("lit_reason.callbacks.restart._loss", lambda *_: next(losses))
    train(folder, tmp_path)
    jumps = [str(w.message) for w in recwarn if "moved the loss" in str(w.message)]
    assert len(jumps) == 1 and f"at step {K} moved the loss by 0.02" in jumps[0]


@pytest.mark.parametrize("batch_entries", [1, 2**24])
def test_layers_are_independent_of_each_other_in_a_batch(folder, tmp_path, monkeypatch, batch_entries):
    monkeypatch.setattr(refactorization, "BATCH_ENTRIES", batch_entries)
    cli, _ = train(folder, tmp_path, trainer__max_steps=2)
    some = layers(cli)
    with torch.no_grad():
        some[3].in_factor[2, 1] = float("inf")
        before = [(layer.out_factor @ layer.in_factor.t()).clone() for layer in some]
    found = refactorize_layers(some)
    assert [i for i, balance in enumerate(found) if balance is None] == [3]
    for i, layer in enumerate(some):
        if i != 3:
            torch.testing.assert_close(layer.out_factor @ layer.in_factor.t(), before[i], rtol=1e-4, atol=1e-6)
            assert defect(layer) < 1e-4


def test_a_failed_decomposition_leaves_its_layer_alone(folder, tmp_path, monkeypatch):
    cli, _ = train(folder, tmp_path, trainer__max_steps=1)
    real = refactorization.refactorize

    def failing(b, a):
        if b.shape[-2] == 64:
            raise torch.linalg.LinAlgError("did not converge")
        return real(b, a)

    monkeypatch.setattr(refactorization, "refactorize", failing)
    found = refactorize_layers(layers(cli))
    assert [layer.out_features == 64 for layer in layers(cli)] == [balance is None for balance in found]


def test_compiled_layers_stay_compiled_across_a_refactorization(folder, tmp_path):
    cli, _ = train(folder, tmp_path, trainer__max_steps=1)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    block = layers(cli)[0]
    compiled = torch.compile(block, backend=counter, fullgraph=True)
    x = torch.randn(3, 32)
    before = compiled(x)
    with torch.no_grad():
        block.out_factor.mul_(2.0)
        block.in_factor.mul_(0.5)
    refactorize_layers([block])
    torch.testing.assert_close(compiled(x), before, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    "given, settings, message",
    [
        (
            {},
            {"model__lm__lowrank__rank": None, "model__lm__lowrank__alpha": None},
            "no low-rank layers; set lm.lowrank",
        ),
        ({}, {"model__optim__period_steps": None}, "the period is None; set optim.period_steps"),
        ({"period_steps": -3}, {}, "the period is -3; set optim.period_steps to at least 1"),
        ({}, {"model__optim__recovery_steps": 6}, "the period is 5 steps, shorter than optim.recovery_steps, 6"),
        (
            {"period_steps": 7},
            {"model__optim__schedule": "cosine_quick_recovery"},
            "period_steps is 7, but optim.period_steps is 5",
        ),
    ],
)
def test_recipes_that_contradict_themselves_are_refused(folder, tmp_path, given, settings, message):
    with pytest.raises(UserError, match=message):
        train(folder, tmp_path, restart=Restart(**given), **settings)


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(UserError, match="reset is 'moment'; allowed: .*did you mean 'moments'"):
        Restart(reset="moment")
    with pytest.raises(UserError, match="neither refactorize nor reset"):
        Restart(refactorize=False, reset="none")
