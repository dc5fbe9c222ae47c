"""The demo: its table, its folder, and the whole way on a few problems."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_reason.cli import demo, demo_page
from lit_reason.cli.door import main as door
from lit_reason.cli.recipes import locate
from lit_reason.cli.runs import clear_folder
from lit_reason.core.metrics_log import MetricsLog
from lit_reason.errors import UserError

FULL = demo.ArmResult("full", 0.5, 0.4, 0.6, 2000, 80.0, MetricsLog(), (), Path("x/full"))
EPIC = replace(FULL, name="epic", accuracy=1.0, low=0.985, high=1.0, trained_tokens=900, seconds=20.0)


def test_table():
    assert demo.table([FULL, EPIC]).splitlines() == [
        "arm   accuracy                trained tokens  seconds  time saved",
        "full   50.0% [40.0%, 60.0%]            2,000     80.0",
        "epic  100.0% [98.5%, 100.0%]             900     20.0         75%",
    ]


def test_time_saved_can_be_negative():
    assert EPIC.time_saved(FULL) == 0.75
    assert FULL.time_saved(EPIC) == -3.0


def test_times_of_a_busy_machine_are_doubted_and_those_of_a_quiet_one_are_not():
    quiet = replace(EPIC, seconds=FULL.seconds * EPIC.trained_tokens / FULL.trained_tokens * 1.1)
    busy = replace(quiet, seconds=1.5 * quiet.seconds)
    assert not demo_page.disturbed([FULL, quiet]) and not demo_page.disturbed([FULL])
    assert demo_page.disturbed([FULL, busy]) and demo_page.disturbed([busy, FULL])


def test_the_two_recipes_differ_in_nothing_but_the_condensation_and_the_name():
    full, epic = (yaml.safe_load(locate(f"demo/chain-{arm}").read_text()) for arm in demo.ARMS)
    condense = [recipe["data"]["init_args"].pop("condense") for recipe in (full, epic)]
    assert condense == [
        {"strategy": "full", "min_chars": 1, "min_tokens": 0},
        {"strategy": "epic", "tau": 0.5, "rho": 0.5, "min_chars": 1, "min_tokens": 0},
    ]
    assert [recipe["trainer"]["logger"][0]["init_args"].pop("name") for recipe in (full, epic)] == ["full", "epic"]
    assert full == epic


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A demo of two steps an arm, and what it printed."""
    out = tmp_path_factory.mktemp("demo") / "runs"
    with pytest.MonkeyPatch.context() as patch:
        import contextlib
        import io

        patch.setattr(demo, "QUICK_HELD_OUT", 8)
        said, noise = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(noise):
            code = demo.main(["--quick", "--rows", "32", "--seed", "3", "--out", str(out)])
    return out, code, said.getvalue().replace("Preparing ...\r", ""), noise.getvalue()


def test_what_it_prints(tiny):
    out, code, said, noise = tiny
    assert code == 0
    lines = said.splitlines()
    assert lines[0] == "Decode-and-chain: 32 problems to train on, 8 held out; 2 steps an arm."
    assert [line.split()[0] for line in lines[2:5]] == ["arm", "full", "epic"]
    assert "The best constant guess would give 14%" in said
    assert lines[-1] == "Not above chance: full, epic: 32 problems are too few, 12800 are enough"
    assert "train full: 100%" in noise and "train epic: 100%" in noise
    assert not re.search(r"warn|GPU|Seed set|Trainer|shards", noise, re.IGNORECASE)
    for name in re.findall(r"^(?:report|model) +(\S+)", said, re.MULTILINE):
        assert Path(name).exists()


def test_what_it_leaves(tiny):
    out = tiny[0]
    assert {item.name for item in out.iterdir()} == demo.MADE_HERE
    for arm in demo.ARMS:
        assert {"config.yaml", "metrics.csv", "report.html", "export"} <= {p.name for p in (out / arm).iterdir()}
        assert len((out / arm / "samples-2.jsonl").read_text().splitlines()) == 8
    page = (out / "report.html").read_text()
    assert "Accuracy by step" in page and "given " in page


def test_the_trained_tokens_are_those_of_the_kept_thoughts(tiny):
    out, _, said, _ = tiny
    tokenizer = AutoTokenizer.from_pretrained(out / "base")
    expected = {"full": 0, "epic": 0}
    for line in (out / "data" / "train.jsonl").read_text().splitlines():
        reply = json.loads(line)["messages"][1]["content"]
        trace, _, solution = reply.removeprefix("<think>").partition("</think>")
        thoughts = trace.split("\n\n")
        kept = max(2, math.ceil(0.5 * len(thoughts)))
        tail = kept // 2
        condensed = thoughts[: kept - tail] + thoughts[-tail:]
        for arm, chosen in (("full", thoughts), ("epic", condensed)):
            text = "<think>" + "\n\n".join(chosen) + f"</think>{solution}<|end|>"
            expected[arm] += len(tokenizer(text, add_special_tokens=False).input_ids)
    for arm, count in expected.items():
        assert re.search(rf"^{arm} .* {count:,} ", said, re.MULTILINE), (arm, count, said)


def test_the_exports_load_and_were_trained(tiny):
    out = tiny[0]
    base, full, epic = (
        AutoModelForCausalLM.from_pretrained(out / where).state_dict()["model.embed_tokens.weight"]
        for where in ("base", "full/export", "epic/export")
    )
    assert not torch.equal(base, full) and not torch.equal(base, epic) and not torch.equal(full, epic)
    assert AutoTokenizer.from_pretrained(out / "epic" / "export").chat_template


def test_another_demo_replaces_an_earlier_one_but_nothing_else(tiny, tmp_path):
    out = tmp_path / "runs"
    for name in ("data", "base", "cache", "full"):
        (out / name).mkdir(parents=True)
        (out / name / "file").write_text("x")
    clear_folder(out, demo.MADE_HERE, keep={"cache"})
    assert {item.name for item in out.iterdir()} == {"cache"}
    (out / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="thesis.txt"):
        clear_folder(out, demo.MADE_HERE, keep={"cache"})
    mine = tmp_path / "mine"
    (mine / "data").mkdir(parents=True)
    with pytest.raises(UserError, match="holds other things"):
        clear_folder(mine, demo.MADE_HERE)
    assert (mine / "data").is_dir()
    clear_folder(tmp_path / "new", demo.MADE_HERE)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--row", "3", "--ot", "x"], "--ot"),
        (["--rows", "3"], "at least 16"),
        (["--sed", "3"], "did you mean '--seed'"),
        (["--seed", "three"], "invalid int"),
    ],
)
def test_wrong_options_end_with_a_short_message(argv, words, capsys):
    assert door(["demo", *argv]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(("rows", "low", "code"), [(demo.ROWS, 0.15, 1), (demo.ROWS, 0.3, 0), (demo.ROWS - 1, 0.15, 0)])
def test_an_arm_at_chance_fails_when_it_had_enough_problems(monkeypatch, tmp_path, rows, low, code):
    record = demo_record()
    arms = {r.name: replace(r, low=low, records=(record,)) for r in (FULL, EPIC)}
    monkeypatch.setattr(demo, "prepare", lambda out, *_: out.mkdir() or 0.2)
    monkeypatch.setattr(demo, "run_arm", lambda name, *_: arms[name])
    assert demo.main(["--rows", str(rows), "--out", str(tmp_path / "x")]) == code


def demo_record():
    from lit_reason.core.evaluation import EvalRecord

    return EvalRecord("r:1", 0, "given", "<think></think> 1", "1", True, "", "", 4, True, "closed", False)


def test_the_page_shows_both_arms_over_steps_and_time(tmp_path):
    series = {
        "val/pass@1": [(50, 0.2), (100, 0.5)],
        "val/pass@1_low": [(50, 0.1), (100, 0.4)],
        "val/pass@1_high": [(50, 0.3), (100, 0.6)],
        "perf/total_seconds": [(19, 10.0), (49, 30.0), (99, 80.0)],
        "train/loss_seam": [(19, 2.0), (39, 1.0)],
        "train/loss_convergence": [(19, 2.0), (39, 0.5)],
    }
    results = [replace(r, records=(demo_record(),), log=MetricsLog(series)) for r in (FULL, EPIC)]
    spent = demo_page.accuracy_over_time(results[0])
    assert spent.points == [(30.0, 0.2), (80.0, 0.5)]
    assert spent.band == [(30.0, 0.1, 0.3), (80.0, 0.4, 0.6)]
    page = (
        demo_page.write_page(results, tmp_path / "report.html", chance=0.136, rows=100, seed=7)
        .read_text()
        .replace("\u00a0", " ")
    )
    for words in ("Accuracy by step", "Accuracy by time", "Convergence", "Seam", "seed 7", "75 %", "45 %", "13.6 %"):
        assert words in page, words
    assert "Exploration" not in page  # nothing was logged under that name


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_both_arms_learn(seed, tmp_path, capsys):
    assert demo.main(["--seed", str(seed), "--out", str(tmp_path / "x")]) == 0
    said = capsys.readouterr().out
    for arm in demo.ARMS:
        (accuracy,) = re.findall(rf"^{arm} +([\d.]+)%", said, re.MULTILINE)
        assert float(accuracy) > 80, said
