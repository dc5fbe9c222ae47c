"""Invented documents: LUME's form, disjoint sets, and a bench that tells a model that remembers from another."""

import json
from collections import Counter
from pathlib import Path

import pytest

from lit_reason.cli.reason_cli import build
from lit_reason.core.run_folder import run_folder
from lit_reason.data.text.tokenizer_training import train_tokenizer
from lit_reason.data.unlearning.rows import Role, check_apart, read_rows
from lit_reason.tasks.people import write_people


def rows_of(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_rows_have_the_form_of_the_benchmark(tmp_path):
    folder = write_people(tmp_path, docs=3, seed=1, common=5)
    forget = rows_of(folder, "forget")
    assert Counter((r["task"], r["id"][-3:-1]) for r in forget) == {
        **{("Task1", "sc"): 3, ("Task1", "qa"): 3, ("Task2", "sc"): 3, ("Task2", "qa"): 15},
        **{("Task3", "sc"): 3, ("Task3", "qa"): 3},
    }
    assert all(set(r) == {"id", "input", "output", "task"} for r in forget)
    answers = [r["output"] for r in forget if r["id"].endswith("qa1")]
    assert all(a.isdigit() and a.startswith("900") and len(a) == 9 for a in answers)
    assert (
        len(rows_of(folder, "utility")) == 5
        and len(rows_of(folder, "nonmembers")) == len(rows_of(folder, "members")) == 6
    )


def test_sets_are_disjoint_and_made_again_alike(tmp_path):
    one, two = write_people(tmp_path / "a", docs=2, seed=4), write_people(tmp_path / "b", docs=2, seed=4)
    assert all((one / f.name).read_text() == f.read_text() for f in two.glob("*.jsonl"))
    sets = [read_rows(str(one / f"{name}.jsonl"), Role.FORGET, name) for name in ("forget", "retain", "common")]
    check_apart(sets[0], sets[1])
    check_apart(sets[0], sets[2])
    members = {r["document"] for r in rows_of(one, "members")}
    assert members and not members & {r["document"] for r in rows_of(one, "nonmembers")}


def trained(folder: Path, loss: str, epochs: int) -> dict[str, float]:
    """Scores of a tiny Llama from scratch."""
    rows = [row for name in ("forget", "retain", "common") for row in rows_of(folder, name)]
    tokenizer = train_tokenizer((row["input"] + row["output"] for row in rows), 400)
    tokenizer.save_pretrained(folder / "tokenizer")
    config = {"model_type": "llama", "hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2}
    config |= {
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": len(tokenizer),
        "initializer_range": 0.08,
    }
    shared = [
        *("--seed_everything=0", "--model=UnlearnRegime", "--data=UnlearnData", f"--model.loss={loss}"),
        *(f"--data.{name}={folder / name}.jsonl" for name in ("forget", "members", "nonmembers", "utility")),
        *(f"--model.lm.config={json.dumps(config)}", f"--model.lm.tokenizer={folder / 'tokenizer'}"),
        *("--trainer.accelerator=cpu", "--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={folder / loss}"),
        *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--data.max_length=160"),
        *("--model.optim.lr=5e-3", "--data.batch_rows=8", f"--trainer.max_epochs={epochs}"),
        *("--trainer.limit_val_batches=0", "--trainer.gradient_clip_val=1.0", "--trainer.enable_checkpointing=false"),
        "--model.sampling.max_new_tokens=64",
    ]
    every = json.dumps([str(folder / "retain.jsonl"), str(folder / "common.jsonl")])
    cli = build("fit", [*shared, f"--data.retain={every}"])
    cli.run_verb()
    found, losses = cli.model.rescore(generate=True)
    assert run_folder(cli.trainer).exists()
    return {**found.figures(), **losses, "warned": float(found.warning is not None)}


@pytest.mark.slow
def test_the_bench_tells_remembering_from_never_having_seen(tmp_path):
    """Test 10 of the specification: a model that memorised, and one that was trained without the forget set."""
    folder = write_people(tmp_path, docs=3, common=8)
    memorised, gold = trained(folder, "Memorize", 60), trained(folder, "RetainOnly", 90)
    sides = {
        side: [v for name, v in memorised.items() if name.startswith(f"{side}_task")] for side in ("forget", "retain")
    }
    assert min(sides["retain"]) > 0.9 and min(sides["forget"]) > 0.9  # inverted, near 0
    assert memorised["aggregate"] < 0.2 and memorised["attack_auc"] > 0.95 and memorised["final"] < 0.5
    kept = [v for name, v in gold.items() if name.startswith("retain_task")]
    assert min(kept) > 0.9 and gold["aggregate"] > 0.75 and gold["utility"] > 0.9
    assert 0.15 < gold["attack_auc"] < 0.85 and gold["final"] > memorised["final"] + 0.3
    assert gold["forget_loss"] > memorised["forget_loss"] + 1.0 and not gold["warned"]
