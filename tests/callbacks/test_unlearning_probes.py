"""Guard and probes on the tiny unlearning recipe: what they find, and that they leave the weights alone."""

import dataclasses
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from dist import two_ranks
from lightning.pytorch.trainer.states import TrainerFn

from lit_reason.callbacks.quantization_probe import QuantizationProbe
from lit_reason.callbacks.relearn_probe import RelearnProbe, halves
from lit_reason.callbacks.unlearning_guard import UnlearningGuard
from lit_reason.cli.reason_cli import build
from lit_reason.core.metrics_log import read_metrics
from lit_reason.core.probe import weights_put_back
from lit_reason.core.run_folder import run_folder
from lit_reason.data.token_row import TokenRow
from lit_reason.data.unlearning.pairs import RoleRows
from lit_reason.data.unlearning.rows import Role
from lit_reason.errors import UserError
from lit_reason.tasks import chain
from lit_reason.tasks.problem_file import write_problems
from lit_reason.tasks.student import write_student

RECIPE = Path(__file__).resolve().parents[2] / "recipes/smoke/unlearn.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    here, config = tmp_path_factory.mktemp("probes"), chain.ChainConfig()
    write_student(here / "base", chain.words(config))
    for name, held_out, count in (("train", False, 12), ("heldout", True, 8)):
        write_problems(here / f"data/{name}.jsonl", partial(chain.record, config, 0, held_out=held_out), count)
    questions = [{"question": "given a1", "choices": [" a", " b", " c"], "answer": i % 3} for i in range(6)]
    (here / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    return here


def run(folder: Path, *callbacks, **settings: object):
    given = [f"--{name.replace('__', '.')}={value}" for name, value in settings.items()]
    cli = build("fit", ["--config", str(RECIPE), f"--vars.folder={folder}", "--trainer.max_steps=3", *given])
    cli.trainer.callbacks.extend(callbacks)
    after: dict[str, torch.Tensor] = {}
    cli.model.on_fit_end = lambda: after.update({n: p.clone() for n, p in cli.model.named_parameters()})
    cli.run_verb()
    return cli, after


def test_probes_report_and_put_the_weights_back_bit_for_bit(folder):
    plain, _ = run(folder)
    probed, after = run(folder, RelearnProbe(steps=8, lr=3e-3), QuantizationProbe())
    for name, weight in plain.model.named_parameters():
        assert torch.equal(weight, after[name]), name
    found = {
        name: json.loads((run_folder(probed.trainer) / f"{name}.json").read_text()) for name in ("relearn", "quantized")
    }
    assert found["relearn"]["loss_after"] < 0.9 * found["relearn"]["loss_before"]
    assert found["quantized"]["loss_after"] != found["quantized"]["loss_before"]
    assert read_metrics(run_folder(probed.trainer) / "metrics.csv").points("probe/relearn_loss_after")


def test_no_row_of_a_shown_document_is_asked_for():
    """A row says what the others of its document ask for."""
    names = ["aasc1", "aaqa0", "aaqa1", "bbsc1", "bbqa0", "ccsc1", "book#0", "book#1", "bbsc1"]
    row = TokenRow(np.zeros(2, np.int32), np.ones(2, np.float32), np.zeros(2, np.uint8), np.zeros(2, np.int8), "")
    rows = [dataclasses.replace(row, row_id=name) for name in names]
    store = RoleRows(rows, [Role.FORGET] * 8 + [Role.RETAIN])
    assert halves(store) == ([0, 1, 2, 5], [3, 4, 6, 7])


def test_an_adapter_is_merged_rounded_and_taken_out_again(folder):
    cli, _ = run(folder, QuantizationProbe(), model__lm__adapter__rank=2, model__optim__lr=0.05)
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        before = cli.model.lm.hf.eval()(input_ids=ids).logits
        with weights_put_back(cli.model):
            cli.model.lm.hf.merge_adapter()
            assert QuantizationProbe("fp4").round(cli.model.lm.base) == 14
            rounded = cli.model.lm.hf(input_ids=ids).logits
            cli.model.lm.hf.unmerge_adapter()
        assert torch.equal(cli.model.lm.hf(input_ids=ids).logits, before)
    assert 0.8 < float(torch.cosine_similarity(rounded.flatten(), before.flatten(), 0)) < 0.9999


def watched(folder: Path, guard: UnlearningGuard, **settings: object):
    questions = {"data__utility": folder / "questions.jsonl", "trainer__limit_val_batches": 1.0}
    often = {"trainer__max_epochs": 6, "trainer__max_steps": -1, "trainer__num_sanity_val_steps": 0}
    return run(folder, guard, **{**questions, **often, **settings})[0]


def test_the_guard_stops_where_rows_are_forgotten_far_enough(folder):
    guard = UnlearningGuard(min_utility=0.01, max_forget_loss=4.7)
    cli = watched(folder, guard)
    assert "above max_forget_loss 4.7" in guard.reason and 0 < cli.trainer.current_epoch < 6
    log = read_metrics(run_folder(cli.trainer) / "metrics.csv").points("val/forget_loss")
    assert [loss > 4.7 for _, loss in log] == [False] * (len(log) - 1) + [True]


def test_the_guard_stops_where_utility_is_lost(folder):
    guard = UnlearningGuard()
    guard.start = 10.0  # as if the model had known far more
    cli = watched(folder, guard)
    assert "utility fell from 10.000" in guard.reason and cli.trainer.current_epoch == 1


@pytest.mark.parametrize(
    ("utility", "forget_loss", "reason"),
    [
        (0.61, 4.9, ""),
        (0.59, 4.9, "utility fell from 0.800 to 0.590, below 75% of it"),
        (0.61, 5.1, "the loss of the rows to forget is 5.10, above max_forget_loss 5.0"),
    ],
)
def test_the_guard_compares_with_its_start(utility, forget_loss, reason):
    guard, metrics = UnlearningGuard(max_forget_loss=5.0), {"val/utility": utility, "val/forget_loss": forget_loss}
    guard.load_state_dict({"start": 0.8})
    state = SimpleNamespace(fn=TrainerFn.FITTING)
    trainer = SimpleNamespace(
        sanity_checking=False, state=state, callback_metrics=metrics, global_step=7, should_stop=False
    )
    guard.on_validation_end(trainer, None)
    assert guard.reason == reason and trainer.should_stop == bool(reason)


def test_the_guard_lets_a_sound_run_finish(folder):
    guard = UnlearningGuard(min_utility=0.01)
    with pytest.warns(UserWarning, match=r"no better than guessing \(0\.333\)"):
        cli = watched(folder, guard, model__optim__lr=1e-6)
    assert guard.reason == "" and cli.trainer.current_epoch == 6 and guard.state_dict() == {"start": guard.start}


def _guarded(folder: Path, **spread: object) -> tuple[float, float]:
    guard = UnlearningGuard(min_utility=0.01)
    cli = watched(folder, guard, trainer__max_epochs=1, **spread)
    assert guard.start is not None
    return guard.start, float(cli.trainer.callback_metrics["val/forget_loss"])


def _guarded_in_shards(folder: Path) -> tuple[float, float]:
    return _guarded(folder, trainer__strategy="fsdp2", trainer__devices=2, data__batch_rows=4)


@pytest.mark.slow
@pytest.mark.dist
def test_the_guard_watches_weights_in_shards(folder, tmp_path):
    """As in `unlearn/olmo-7b-gd`."""
    alone = _guarded(folder)
    for in_shards in two_ranks.run(_guarded_in_shards, tmp_path, folder):
        assert in_shards == pytest.approx(alone, rel=1e-4)


def test_what_changes_weights_wants_them_whole_and_what_looks_does_not():
    sharded = SimpleNamespace(device_mesh=object(), rescore=lambda: None, trainer=SimpleNamespace(datamodule=None))
    for probe in (RelearnProbe(), QuantizationProbe()):
        with pytest.raises(UserError, match=rf"{type(probe).__name__} changes whole weights.*ddp"):
            probe.on_train_start(sharded.trainer, sharded)
    with pytest.raises(UserError, match="this run has none"):  # shards are no obstacle
        UnlearningGuard().on_train_start(SimpleNamespace(enable_validation=False), sharded)


def test_what_cannot_be_watched_is_refused(folder):
    with pytest.raises(UserError, match="this run has none"):
        run(folder, UnlearningGuard())
    with pytest.raises(UserError, match="give data.utility"):
        run(folder, UnlearningGuard(), trainer__limit_val_batches=1.0)
    one = folder / "one.jsonl"
    one.write_text((folder / "data/heldout.jsonl").read_text().splitlines()[0] + "\n")
    with pytest.raises(UserError, match="at least two documents to forget"):
        run(folder, RelearnProbe(), data__forget=one)
    with pytest.raises(UserError, match="it needs UnlearnRegime, not SFTRegime"):
        sft = ["--config", str(RECIPE.parent / "sft.yaml"), f"--vars.folder={folder}", "--trainer.max_steps=1"]
        cli = build("fit", sft)
        cli.trainer.callbacks.append(RelearnProbe())
        cli.run_verb()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: UnlearningGuard(min_utility=0.0), "min_utility is 0.0"),
        (lambda: RelearnProbe(steps=0), "steps is 0"),
        (lambda: QuantizationProbe("nf5"), "did you mean 'nf4'"),
    ],
)
def test_useless_settings_of_callbacks_are_refused(make, said):
    with pytest.raises(UserError, match=said):
        make()
