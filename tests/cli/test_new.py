"""`lit-reason new regime`: what it writes where, and what it refuses. That it trains is shown in tests/conformance."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lit_reason.cli import door
from lit_reason.cli.new import SKELETON

ROOT = Path(__file__).resolve().parents[2]
MODULES = {"__init__.py", "config.py", "loss.py", "regime.py"}


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def written(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def refusal(capsys, *argv: str) -> str:
    before = written(Path())
    assert door.main(["new", *argv]) == 2
    assert written(Path()) == before
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    return err


def test_a_package_of_ones_own(capsys):
    assert door.main(["new", "regime", "turn_credit"]) == 0
    files = {f"turn_credit/{name}" for name in MODULES}
    files |= {"recipes/smoke/turn_credit.yaml", "docs/regimes/turn_credit.md"}
    assert written(Path()) == files
    out = capsys.readouterr().out
    assert all(name in out for name in files) and "recipes/smoke/turn_credit.yaml" in out.partition("Next:")[2]
    assert "class TurnCreditRegime(Regime)" in Path("turn_credit/regime.py").read_text()
    assert "class_path: turn_credit.regime.TurnCreditRegime" in Path("recipes/smoke/turn_credit.yaml").read_text()
    assert "turn_credit exists already" in refusal(capsys, "regime", "turn_credit")


def test_in_a_checkout_it_joins_the_house(capsys):
    (Path("house") / "lit_reason/regimes").mkdir(parents=True)
    assert door.main(["new", "regime", "grpo", "--title", "MT-GRPO", "--into", "house"]) == 0
    files = {f"lit_reason/regimes/grpo/{name}" for name in MODULES}
    assert written(Path("house")) == files | {"recipes/smoke/grpo.yaml", "docs/regimes/grpo.md"}
    assert "tests/conformance" in capsys.readouterr().out
    recipe, page = (Path("house") / p for p in ("recipes/smoke/grpo.yaml", "docs/regimes/grpo.md"))
    assert "class_path: MTGRPORegime" in recipe.read_text() and "--config smoke/grpo" in recipe.read_text()
    assert page.read_text().startswith("# MT-GRPO\n") and "--config smoke/grpo" in page.read_text()
    regime = Path("house/lit_reason/regimes/grpo/regime.py").read_text()
    assert "from lit_reason.regimes.grpo.loss import" in regime
    again = refusal(capsys, "regime", "grpo2", "--title", "MT GRPO", "--into", "house")
    assert "has a MTGRPORegime already" in again and "--title" in again
    rules = ["--isolated", "--line-length=120", "--select=E,F,I,UP,B,W,D417,DOC102", "--preview"]
    rules += ["--config", "lint.isort.known-first-party=['lit_reason']"]
    for command in (["check", *rules], ["format", "--check", "--isolated", "--line-length=120"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--no-cache", "lit_reason"],
            capture_output=True,
            text=True,
            cwd="house",
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["regime", "TurnCredit"], "did you mean 'turn_credit'?"),
        (["regime", "turn-credit"], "did you mean 'turn_credit'?"),
        (["regime", "2nd"], "the first character a letter"),
        (["regime", "../up"], "no name for a folder"),
        (["regime", "lambda"], "has a meaning already"),
        (["regime", "optim"], "has a meaning already"),
        (["regime", "json"], "would hide the installed package"),
        (["regime", "fine", "--title", "3"], "must begin with a letter"),
        (["regime", "fine", "--into", "nowhere"], "--into nowhere is no folder"),
        (["regim", "fine"], "did you mean 'regime'?"),
        (["regime"], "NAME"),
        (["regime", "fine", "--inot", "x"], "unrecognized arguments: --inot"),
    ],
)
def test_refusals(capsys, argv, words):
    assert words in refusal(capsys, *argv)


@pytest.mark.parametrize("taken", ["fine", "recipes/smoke/fine.yaml", "docs/regimes/fine.md"])
def test_nothing_is_overwritten(capsys, taken):
    Path(taken).mkdir(parents=True)
    assert f"{taken} exists already" in refusal(capsys, "regime", "fine")


def test_templates_hold_no_name_of_their_own():
    assert {path.name for path in SKELETON.iterdir()} == {f"{name}.jinja" for name in MODULES} | {
        "recipe.yaml.jinja",
        "page.md.jinja",
    }
    assert all("turn_credit" not in path.read_text() for path in SKELETON.iterdir())
