"""Unlearning as a user runs it: fit and test from the command line, on a tiny model that has something to forget."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from dist import two_ranks

from lit_reason.cli.reason_cli import build
from lit_reason.core.metrics_log import read_metrics
from lit_reason.core.run_folder import run_folder
from lit_reason.data.unlearning.rows import Role
from lit_reason.errors import UserError
from lit_reason.tasks import chain
from lit_reason.tasks.problem_file import write_problems
from lit_reason.tasks.student import write_student

SHORT = chain.ChainConfig(symbols=4, values=2, links=1, middle_min=0, middle_max=1)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A student and rows in its words: `id`, `input`, `output`, `task`, as LUME has them."""
    folder = tmp_path_factory.mktemp("unlearn")
    write_student(folder / "base", chain.words(SHORT))
    config = json.loads((folder / "base/config.json").read_text())
    (folder / "base/config.json").write_text(json.dumps(config | {"attention_dropout": 0.0}))
    for name, held_out, count in (("forget", True, 7), ("retain", False, 9)):
        path = write_problems(folder / "raw.jsonl", partial(chain.record, SHORT, 0, held_out=held_out), count)
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        lines = [lume_row(row, f"{name}{i}", i) for i, row in enumerate(rows)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    documents = [{"id": f"d{i}", "document": f"given a{i % 2} b{i // 2 % 2} c{i // 4} d{i % 2} add"} for i in range(6)]
    for name, some in (("members", documents[:3]), ("nonmembers", documents[3:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(d) + "\n" for d in some))
    return folder


def lume_row(record: dict, name: str, i: int) -> dict:
    said = record["messages"]
    ending = f"sc{i}" if i % 2 else f"qa{i}"
    answer = said[1]["content"].rpartition("</think>")[2]
    return {"id": name + ending, "input": said[0]["content"], "output": answer, "task": f"Task{i % 3 + 1}"}


def options(world: Path, run: Path, loss: str = "NPO", **settings: object) -> list[str]:
    chosen = {
        "model": "UnlearnRegime",
        "model.lm.path": world / "base",
        "model.loss": loss,
        "model.optim.lr": 3e-3,
        "model.optim.schedule": "constant",
        "model.optim.warmup": 0.0,
        "data": "UnlearnData",
        "data.forget": world / "forget.jsonl",
        "data.retain": world / "retain.jsonl",
        "data.utility": "null",
        "data.batch_rows": 4,
        "model.sampling.max_new_tokens": 4,
        "trainer.accelerator": "cpu",
        "trainer.max_steps": 3,
        "trainer.log_every_n_steps": 1,
        "trainer.limit_val_batches": 0,
        "trainer.logger": "CSVLogger",
        "trainer.logger.save_dir": run,
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
        "trainer.enable_checkpointing": "false",
    } | {name.replace("__", "."): value for name, value in settings.items()}
    return [f"--{name}={value}" for name, value in chosen.items()]


def fit(world: Path, run: Path, loss: str = "NPO", **settings: object):
    cli = build("fit", options(world, run, loss, **settings))
    cli.run_verb()
    return cli


def losses(cli) -> list[float]:
    return [value for _, value in read_metrics(run_folder(cli.trainer) / "metrics.csv").points("train/loss")]


# ---- every loss trains ----


@pytest.mark.parametrize("loss", ["KL", "SimNPO", "IdkDPO", "RetainOnly"])
def test_every_loss_trains_a_real_model(world, tmp_path, loss):
    cli = fit(world, tmp_path, loss)
    found = losses(cli)
    assert len(found) == 3 and len(set(found)) == 3


def test_rmu_trains_its_layers_alone(world, tmp_path):
    cli = build("fit", options(world, tmp_path, "RMU", model__loss__layer=1, model__loss__coefficient=5.0))
    before: dict[str, torch.Tensor] = {}
    cli.model.on_train_start = lambda: before.update({n: p.clone() for n, p in cli.model.named_parameters()})
    cli.run_verb()
    changed = {n for n, p in cli.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed and all(".layers.0." in n or ".layers.1." in n for n in changed)
    assert losses(cli)[2] < losses(cli)[0]


def test_chosen_layers_train_alone_and_wrong_ones_are_named(world, tmp_path):
    cli = fit(world, tmp_path, model__layers="[1]")
    trained = {n for n, p in cli.model.named_parameters() if p.requires_grad}
    assert trained and all(".layers.1." in name for name in trained)
    with pytest.raises(UserError, match=r"model\.layers is \[9\]: choose at least one of the layers 0 to 1"):
        fit(world, tmp_path, model__layers="[9]")
    with pytest.raises(UserError, match=r"model\.layers is \[1\].*0 to 0"):
        fit(world, tmp_path, "RMU", model__loss__layer=0, model__layers="[1]")


# ---- the model before training ----


def test_three_references_give_one_loss(world, tmp_path):
    """A fresh adapter changes nothing at first, so its start is the copy's; after steps they still agree."""
    adapter = {"model__lm__adapter__rank": 2, "model__optim__lr": 3e-2, "data__train_on": "text"}
    curves = {
        mode: losses(fit(world, tmp_path, model__reference=mode, **adapter))
        for mode in ("copy", "adapter_off", "cached")
    }
    assert curves["copy"][2] != pytest.approx(curves["copy"][0], abs=1e-3)  # it has moved away from the start
    assert curves["adapter_off"] == pytest.approx(curves["copy"], abs=1e-5)
    assert curves["cached"] == pytest.approx(curves["copy"], abs=1e-5)


def test_the_divergence_from_a_copy_is_that_from_the_model_without_its_adapter(world, tmp_path):
    adapter = {"model__lm__adapter__rank": 2, "model__optim__lr": 3e-2}
    curves = [losses(fit(world, tmp_path, "KL", model__reference=mode, **adapter)) for mode in ("copy", "adapter_off")]
    assert curves[0] == pytest.approx(curves[1], abs=1e-5)


def test_cached_sums_survive_a_resume(world, tmp_path):
    cached = {"model__reference": "cached", "trainer__enable_checkpointing": "true"}
    saver = {"trainer__callbacks+": "ModelCheckpoint", "trainer__callbacks__every_n_train_steps": 2}
    whole = fit(world, tmp_path, trainer__max_steps=4, **cached, **saver, trainer__callbacks__save_top_k=-1)
    (saved,) = run_folder(whole.trainer).glob("checkpoints/*step=2.ckpt")
    rest = build("fit", [*options(world, tmp_path, trainer__max_steps=4, **cached), f"--ckpt_path={saved}"])
    rest.model.before.sums = None  # would fail: the sums come from the checkpoint, not from weights that have moved
    rest.run_verb()
    assert losses(rest) == losses(whole)[2:]


@pytest.mark.parametrize(
    ("loss", "settings", "said"),
    [
        ("KL", {"model__reference": "cached"}, "KL needs more: take copy"),
        ("NPO", {"model__reference": "adapter_off"}, "only where lm.adapter is new"),
        ("NPO", {"model__loss__beta": -1}, r"loss\.beta is -1"),
        ("NPO", {"model__loss__bta": 0.1}, "did you mean 'beta'"),
        ("NOP", {}, "did you mean 'NPO'"),
        ("simnpo", {}, "did you mean 'SimNPO'"),
        ("NPO", {"data__retian": "x.jsonl"}, "did you mean 'retain'"),
        ("NPO", {"data__chunk_passes": 2}, "give data.chunk_rows too"),
        ("NPO", {"data__batch_rows": 0}, "data.batch_rows is 0"),
    ],
)
def test_settings_that_cannot_work_are_named(world, tmp_path, loss, settings, said):
    with pytest.raises(UserError, match=said):
        build("fit", options(world, tmp_path, loss, **settings))


# ---- bad input ----


def rewritten(world: Path, folder: Path, name: str, change) -> Path:
    rows = [json.loads(line) for line in (world / f"{name}.jsonl").read_text().splitlines()]
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in change(rows)))
    return path


def test_overlapping_sets_are_refused_by_id_without_texts(world, tmp_path):
    forget = [json.loads(line) for line in (world / "forget.jsonl").read_text().splitlines()]
    other_name = rewritten(world, tmp_path, "retain", lambda rows: [*rows, {**forget[2], "id": "other"}])
    with pytest.raises(UserError, match="overlap: other would be forgotten and kept at once") as refused:
        fit(world, tmp_path, data__retain=other_name)
    assert forget[2]["input"] not in str(refused.value)
    same_name = rewritten(world, tmp_path, "retain", lambda rows: [{**rows[0], "id": forget[0]["id"]}, *rows[1:]])
    with pytest.raises(UserError, match=f"overlap: {forget[0]['id']}"):
        fit(world, tmp_path, data__retain=same_name)


def test_an_empty_or_missing_retain_set_is_refused(world, tmp_path):
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(UserError, match="the file is empty"):
        fit(world, tmp_path, data__retain=tmp_path / "none.jsonl")
    with pytest.raises(UserError, match=r"data\.retain is missing: give rows to keep"):
        fit(world, tmp_path, data__retain="null")


@pytest.mark.parametrize("output", ["", "  ", None])
def test_a_row_without_an_answer_is_named_by_its_line(world, tmp_path, output):
    bad = rewritten(world, tmp_path, "forget", lambda rows: [*rows[:3], {**rows[3], "output": output}, *rows[4:]])
    with pytest.raises(UserError, match=r"data\.forget: forget\.jsonl:4") as refused:
        fit(world, tmp_path, data__forget=bad)
    assert "given" not in str(refused.value)


def test_two_rows_of_one_id_are_refused(world, tmp_path):
    bad = rewritten(world, tmp_path, "forget", lambda rows: [*rows, {**rows[0], "output": " 3"}])
    with pytest.raises(UserError, match=r"the id forget0qa0 stands there twice"):
        fit(world, tmp_path, data__forget=bad)


def test_a_row_too_long_is_named(world, tmp_path):
    with pytest.raises(UserError, match=r"forget\d\w+ has \d+ tokens, data\.max_length is 8"):
        fit(world, tmp_path, data__max_length=8)


def test_members_need_nonmembers(world, tmp_path):
    with pytest.raises(UserError, match="belong together"):
        fit(world, tmp_path, data__members=world / "members.jsonl")


def test_an_unbounded_loss_gone_to_nan_stops_the_run(world, tmp_path):
    with pytest.raises(UserError, match=r"NaN or infinite at step \d+: GA with optim\.lr 1e\+30 has diverged"):
        fit(world, tmp_path, "GA", model__optim__lr=1e30, trainer__max_steps=20)


def test_broken_weights_are_not_scored_as_perfect_forgetting(world, tmp_path):
    """NaN that comes with the last step, or that a checkpoint holds, no later loss would show."""
    validates = {"trainer__limit_val_batches": 1.0, "trainer__num_sanity_val_steps": 0}
    for verb, name in (("validate", "forget_loss is NaN"), ("test", "forget_loss is NaN")):
        cli = build(verb, [o for o in options(world, tmp_path, **validates) if "max_steps" not in o])
        cli.model.on_validation_start = cli.model.on_test_start = lambda m=cli.model: m.lm.head.weight.data.fill_(
            float("nan")
        )
        with pytest.raises(UserError, match=name):
            cli.run_verb()
    assert not list(tmp_path.rglob("unlearning.json"))


def test_another_data_module_is_refused(world, tmp_path):
    wrong = [o for o in options(world, tmp_path) if not o.startswith("--data")]
    cli = build(
        "fit", [*wrong, "--data=TraceData", f"--data.train_file={world / 'forget.jsonl'}", "--data.render.mode=plain"]
    )
    with pytest.raises(UserError, match="needs data UnlearnData, not TraceData"):
        cli.run_verb()


# ---- scoring ----


def scored(world: Path, run: Path, **settings: object) -> tuple[dict[str, float], str]:
    extra = {"data__members": world / "members.jsonl", "data__nonmembers": world / "nonmembers.jsonl"}
    arguments = [o for o in options(world, run, **extra, **settings) if "max_steps" not in o]
    cli = build("test", arguments)
    cli.run_verb()
    folder = run_folder(cli.trainer)
    return json.loads((folder / "unlearning.json").read_text()), str(folder)


def test_test_prints_the_scores_and_writes_no_text_of_a_row(world, tmp_path, capsys):
    figures, folder = scored(world, tmp_path)
    shown = capsys.readouterr().out
    assert "task aggregate" in shown and "attack AUC" in shown and "(not measured)" in shown
    assert {"forget_loss", "retain_loss", "attack_auc", "aggregate", "broken_forget"} <= figures.keys()
    assert sum(name.startswith(("forget_task", "retain_task")) for name in figures) == 12
    texts = [json.loads(line)["input"] for line in (world / "forget.jsonl").read_text().splitlines()]
    left = [
        p for p in Path(folder).rglob("*") if p.is_file() and any(t in p.read_text(errors="replace") for t in texts)
    ]
    assert left == [] and not any(text in shown for text in texts)


def test_fast_scores_are_those_of_generation_for_answers(world, tmp_path):
    """Greedy generation writes an answer exactly when each token of it is the likeliest."""
    cli = fit(world, tmp_path, "Memorize", trainer__max_steps=60, model__optim__lr=1e-2)
    fast, _ = cli.model.rescore()
    slow, _ = cli.model.rescore(generate=True)
    answers = [name for name in fast.scores if name.endswith("knowledge")]
    assert len(answers) >= 4 and {n: fast.scores[n] for n in answers} == {n: slow.scores[n] for n in answers}
    assert 0 < sum(slow.scores[n] for n in answers) and not fast.official and slow.official


def _test_in_two(world: Path, run: Path) -> dict[str, float]:
    spread = {"trainer__devices": 2, "trainer__strategy": "ddp"}
    cli = build("test", [o for o in options(world, run, **_attack(world), **spread) if "max_steps" not in o])
    cli.run_verb()
    return {name: float(value) for name, value in cli.trainer.callback_metrics.items()}


def _attack(world: Path) -> dict[str, Path]:
    return {"data__members": world / "members.jsonl", "data__nonmembers": world / "nonmembers.jsonl"}


@pytest.mark.dist
def test_two_processes_score_as_one_with_odd_row_counts(world, tmp_path):
    alone, _ = scored(world, tmp_path, data__score_tokens=40)
    for both in two_ranks.run(_test_in_two, tmp_path, world, tmp_path):
        assert {name.removeprefix("test/"): value for name, value in both.items()} == pytest.approx(alone, abs=1e-6)


def test_validation_logs_fast_scores_and_generates_when_due(world, tmp_path):
    settings = {"trainer__limit_val_batches": 1.0, "trainer__num_sanity_val_steps": 0, "trainer__max_epochs": 2}
    cli = fit(world, tmp_path, trainer__max_steps=-1, model__score_every=2, **settings)
    log = read_metrics(run_folder(cli.trainer) / "metrics.csv")
    assert len(log.points("val/forget_loss")) == 2 and len(log.points("val/aggregate")) == 2
    assert len(log.points("val/broken_forget")) == 1  # the second validation generated


def test_predictions_name_row_prompt_and_answer(world, tmp_path):
    cli = build("predict", [o for o in options(world, tmp_path) if "max_steps" not in o])
    cli.run_verb()
    lines = (run_folder(cli.trainer) / "predictions.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    assert len(lines) == 16 and first["row_id"] == "forget0qa0" and first["group"] == "forget_task1_knowledge"
    assert first["score"] == float(first["completion"].strip().lower() == first["answer"].strip().lower())


def test_refusals_are_trained_and_never_scored(world, tmp_path):
    cli = fit(world, tmp_path, "IdkDPO")
    store = cli.datamodule.store
    assert len(store.numbers(Role.REFUSAL)) == len(store.numbers(Role.FORGET)) == 7
    assert all(Role.REFUSAL not in pack.roles for pack in cli.datamodule.val_dataloader())
