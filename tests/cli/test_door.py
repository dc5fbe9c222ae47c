"""The front door: what it prints, what it imports, and how it ends."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import cli_toys
import pytest
import torch
from lightning.pytorch import Callback

from lit_reason import __version__
from lit_reason.cli import door, reason_cli
from lit_reason.cli.recipes import find_recipes
from lit_reason.errors import UserError

RECIPE = find_recipes()[0].name


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["--version"],
        ["list"],
        ["show", RECIPE],
        ["doctor"],
        ["completion", "bash"],
        ["fit", "--config=no"],
    ],
)
def test_light_verbs_import_next_to_nothing(argv):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "lit_reason", *argv], capture_output=True, text=True
    )
    assert done.returncode == (2 if argv[0] == "fit" else 0)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "import time:" in line}
    assert "lit_reason.cli.door" in imported
    # Start-up time is imports: the standard library, this package and a YAML reader, and few modules of those.
    installed = {name.partition(".")[0] for name in imported} & packages_distributions().keys()
    assert installed <= {"lit_reason", "yaml", "_distutils_hack"} | {name for name in installed if "editable" in name}
    assert len(imported) < 250  # `import numpy` alone adds more than a hundred


def test_help_names_every_verb_and_fits_a_terminal(capsys):
    assert door.main([]) == 0
    text = capsys.readouterr().out
    for verb in door.VERBS:
        assert f"\n  {verb:<12}" in text
    assert max(len(line) for line in text.splitlines()) <= 110
    grouped = [verb for _, verbs in door.GROUPS for verb in verbs]
    assert sorted(grouped) == sorted(door.VERBS)


def test_version(capsys):
    assert door.main(["--version"]) == 0
    assert capsys.readouterr().out == f"lit-reason {__version__}\n"


def test_list_shows_each_recipe_with_its_purpose(capsys):
    assert door.main(["list"]) == 0
    text = capsys.readouterr().out
    for recipe in find_recipes():
        assert f"{recipe.name} " in text and recipe.purpose in text
    assert door.main(["list", "no such word"]) == 2


def test_show_prints_the_file_and_suggests(capsys, tmp_path):
    recipe = find_recipes()[0]
    assert door.main(["show", recipe.name]) == 0
    assert capsys.readouterr().out == recipe.path.read_text()
    assert door.main(["show", str(recipe.path)]) == 0
    assert capsys.readouterr().out == recipe.path.read_text()
    assert door.main(["show", recipe.name[:-1]]) == 2
    assert "did you mean" in capsys.readouterr().err
    assert door.main(["show"]) == 2


def test_unknown_verb(capsys):
    assert door.main(["fitt"]) == 2
    assert "did you mean 'fit'?" in capsys.readouterr().err
    assert door.main(["--config", "x.yaml", "fit"]) == 2
    assert "the verb comes first" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UserError("tau is 2"), 2, "tau is 2"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "No space left on device", "x.ckpt"), 1, "No space left on device: x.ckpt"),
        (PermissionError(errno.EACCES, "Permission denied", "/root"), 1, "Permission denied: /root"),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "a"),
            1,
            "No such file or directory: a",
        ),
        (SystemExit(3), 3, ""),
        (SystemExit(), 0, ""),
        (SystemExit("words"), 1, "words"),
    ],
)
def test_how_it_ends(capsys, monkeypatch, error, code, words):
    def fail(argv):
        raise error

    monkeypatch.setattr(door, "dispatch", fail)
    assert door.main(["fit"]) == code
    err = capsys.readouterr().err
    assert words in err and "Traceback" not in err and len(err.splitlines()) == bool(words)


def test_defects_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(door, "dispatch", lambda argv: [][1])
    with pytest.raises(IndexError):
        door.main(["fit"])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_told_in_one_line():
    with pytest.raises(RuntimeError) as full:
        torch.save({"w": torch.zeros(100_000)}, "/dev/full")
    assert "disk is full" in door.machine_message(full.value)
    with pytest.raises(OSError) as plain, open("/dev/full", "w") as file:
        file.write("x" * 100_000)
    assert "No space left" in door.machine_message(plain.value)
    assert door.machine_message(RuntimeError("shape mismatch")) is None


class Stopper(Callback):
    """Stops the run from inside, as the user or the scheduler would from outside."""

    def __init__(self, how: str) -> None:
        self.how = how

    def on_train_batch_end(self, trainer, *args) -> None:
        if self.how == "SIGINT":
            raise KeyboardInterrupt
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(("how", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_signals_during_training_show_in_the_exit_code(capsys, monkeypatch, tmp_path, how, code):
    monkeypatch.setattr(reason_cli, "house_classes", lambda: (cli_toys.ToyTrainer, cli_toys.ToyRegime))
    monkeypatch.setattr(sys, "argv", ["lit-reason"])
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(
        "model: {class_path: PlainToyRegime}\n"
        "data: {class_path: ToyData, init_args: {train_file: x, rows: 64}}\n"
        "trainer:\n"
        "  {max_steps: 20, accelerator: cpu, logger: false, enable_progress_bar: false,\n"
        "   enable_model_summary: false, enable_checkpointing: false,\n"
        f"   callbacks: [{{class_path: Stopper, init_args: {{how: {how}}}}}]}}\n"
    )
    old = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    try:
        assert door.main(["fit", "--config", "run.yaml"]) == code
    finally:
        signal.signal(signal.SIGINT, old[0])
        signal.signal(signal.SIGTERM, old[1])
    assert capsys.readouterr().err.splitlines()[-1].startswith("lit-reason: ")


def test_reader_that_goes_away_is_not_an_error():
    done = subprocess.run(
        f"{sys.executable} -m lit_reason completion fish | head -n 0; echo ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() in ("0", "141") and done.stderr == ""
