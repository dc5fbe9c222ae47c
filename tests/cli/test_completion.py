"""The completion scripts, run in the shells that are there."""

from __future__ import annotations

import re
import shutil
import subprocess

import cli_toys
import pytest

from lit_reason.cli import completion, reason_cli
from lit_reason.cli.door import VERBS
from lit_reason.cli.recipes import find_recipes


def bash(*words: str, options=completion.COMMON) -> list[str]:
    """What bash offers for the last word."""
    ask = 'COMP_WORDS=("$@"); COMP_CWORD=$(($#-1)); _lit_reason; printf "%s\\n" "${COMPREPLY[@]}"'
    text = f"set -- {' '.join(repr(word) for word in words)}\n{completion.script('bash', options)}\n{ask}"
    return subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=True).stdout.split()


def test_bash(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert bash("lit-reason", "") == [*VERBS, "--help", "--version"]
    assert bash("lit-reason", "va") == ["validate"]
    assert bash("lit-reason", "fit", "--config", "") == [recipe.name for recipe in find_recipes()]
    studies = [study.name for study in find_recipes(studies=True)]
    assert studies and bash("lit-reason", "tournament", "--config", "") == studies
    assert bash("lit-reason", "show", "studies/") == studies and bash("lit-reason", "show", "smoke/sft") == [
        "smoke/sft"
    ]
    assert bash("lit-reason", "fit", "--con") == bash("lit-reason", "plan", "--con") == ["--config"]
    assert bash("lit-reason", "doctor", "--f") == ["--full"]
    assert bash("lit-reason", "condense", "--ta") == ["--tau"]
    assert bash("lit-reason", "inspect", "--sp") == ["--split"]
    assert bash("lit-reason", "launch", "--no") == ["--nodes"]
    assert bash("lit-reason", "list", "--ckpt") == []
    assert bash("lit-reason", "new", "") == ["regime"] and bash("lit-reason", "new", "regime", "--i") == ["--into"]
    (tmp_path / "rows.jsonl").touch()
    assert bash("lit-reason", "condense", "ro") == ["rows.jsonl"]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_accept_the_script(shell):
    text = completion.script(shell)
    assert all(verb in text for verb in VERBS)
    words = set(re.split(r"[\s\"]+", text))
    assert {f"{'' if shell == 'fish' else '--'}{option}" for option in ("batch-tokens", "tau", "nodes")} <= words
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed; the text alone was checked")
    subprocess.run([shell, "-n"], input=text, text=True, check=True, capture_output=True)
    if shell == "fish":
        asked = subprocess.run(
            ["fish", "-c", f"{text}\ncomplete -C 'lit-reason val'"],
            text=True,
            capture_output=True,
            check=True,
        )
        assert asked.stdout.startswith("validate\t")


def test_dotted_options():
    names = completion.option_names(reason_cli.schema_for(cli_toys.ToyTrainer, cli_toys.ToyRegime))
    assert {"--trainer.max_steps", "--model.volume", "--model.lm.adapter.rank", "--data.condense.tau"} <= set(names)
    assert not [name for name in names if name.endswith("+") or "init_args" in name or "..." in name]
    assert "--trainer.max_steps" in bash("lit-reason", "fit", "--trainer.max_st", options=names)


def test_full_adds_them(capsys, monkeypatch):
    monkeypatch.setattr(reason_cli, "house_classes", lambda: (cli_toys.ToyTrainer, cli_toys.ToyRegime))
    assert completion.main(["bash", "--full"]) == 0
    text = capsys.readouterr().out
    assert "--model.volume" in text and text.count("--config --print_config ") == 1  # not offered twice
