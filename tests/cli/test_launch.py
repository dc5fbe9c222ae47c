"""Scripts for several machines: run them with a stand-in for the scheduler, and look at what it was told."""

import os
import subprocess

import pytest

from lit_reason.cli.door import main

STAND_IN = '#!/bin/sh\nfor word in "$@"; do echo "$word"; done > "$TOLD.$(basename "$0")"\nexit ${CODE:-0}\n'


def run(tmp_path, text, **environment):
    """Run a script; what torchrun, srun and scontrol were told, word by word, and the exit code."""
    for name in ("torchrun", "srun", "scontrol"):
        (tmp_path / name).write_text(STAND_IN if name != "scontrol" else STAND_IN.replace("${CODE:-0}", "0"))
        (tmp_path / name).chmod(0o755)
    told = tmp_path / "told"
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TOLD": str(told), **environment}
    done = subprocess.run(["bash", "-c", text], env=env, capture_output=True, text=True)
    words = {p.suffix[1:]: p.read_text().splitlines() for p in tmp_path.glob("told.*")}
    return words, done.returncode, done.stderr


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "my recipe.yaml"
    path.write_text("data: TraceData\n")
    return path


def script(capsys, *argv):
    assert main(["launch", *map(str, argv)]) == 0
    return capsys.readouterr().out


def test_torchrun_starts_fit_with_this_machines_number(tmp_path, recipe, capsys):
    text = script(capsys, recipe, "--nodes", 3, "--gpus", 2, "--scheduler", "torchrun", "--model.optim.lr", "1e-4")
    words, code, _ = run(tmp_path, text, MASTER="ten", NODE="2")
    assert code == 0 and words["torchrun"] == [
        *["--nnodes", "3", "--nproc-per-node", "2", "--max-restarts", "3", "--rdzv-backend", "c10d"],
        *["--rdzv-endpoint", "ten:29500", "--rdzv-id", "run", "--rdzv-conf", "is_host=0"],
        *["-m", "lit_reason", "fit", "--config", str(recipe)],
        *["--trainer.num_nodes", "3", "--trainer.devices", "2", "--trainer.strategy", "fsdp2", "--resume", "auto"],
        *["--model.optim.lr", "1e-4"],
    ]
    assert "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1\n" in text
    words, _, _ = run(tmp_path, text, MASTER="ten", NODE="0", ADDRESS="10.0.0.7", PORT="5")
    told = " ".join(words["torchrun"])
    assert "--rdzv-endpoint ten:5" in told and "--rdzv-conf is_host=1 --local-addr 10.0.0.7 -m lit_reason" in told
    _, code, said = run(tmp_path, text, MASTER="ten")
    assert code != 0 and "number of this machine, 0 to 2" in said


@pytest.mark.parametrize("left_with, queued_again", [(0, False), (1, False), (143, True)])
def test_slurm_queues_again_after_a_save_alone(tmp_path, recipe, capsys, left_with, queued_again):
    out = tmp_path / "four.sbatch"
    script(capsys, "--nodes", 4, "--scheduler", "slurm", "--strategy", "ddp", "--out", out, recipe)
    text = out.read_text()
    for line in ("--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8", "--job-name=four", "--signal=TERM@120"):
        assert f"#SBATCH {line}\n" in text
    words, code, _ = run(tmp_path, text, CODE=str(left_with), SLURM_JOB_ID="77")
    assert code == left_with
    assert words["srun"][1:] == [
        *["python", "-m", "lit_reason", "fit", "--config", str(recipe), "--trainer.num_nodes", "4"],
        *["--trainer.devices", "8", "--trainer.strategy", "ddp", "--resume", "auto"],
    ]
    assert words.get("scontrol") == (["requeue", "77"] if queued_again else None)


def test_ones_own_way_of_resuming_stays(recipe, capsys):
    given = [recipe, "--nodes", 2, "--scheduler", "slurm"]
    assert "--resume auto" not in script(capsys, *given, "--ckpt_path=a.ckpt")
    assert "--resume auto" not in script(capsys, *given, "--resume", "runs/x")


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--nodes", "0", "--scheduler", "slurm"], "at least 1"),
        (["--nodes", "2", "--scheduler", "sge"], "invalid choice"),
        (["--nodes", "2"], "--scheduler"),
        (["--nodes", "2", "--scheduler", "slurm", "another.yaml"], "neither"),
    ],
)
def test_wrong_arguments_are_refused(recipe, capsys, argv, said):
    assert main(["launch", str(recipe), *argv]) == 2
    assert said in capsys.readouterr().err


def test_an_unknown_recipe_and_an_existing_file_are_refused(recipe, capsys):
    assert main(["launch", "no/such", "--nodes", "2", "--scheduler", "slurm"]) == 2
    assert main(["launch", str(recipe), "--nodes", "2", "--scheduler", "slurm", "--out", str(recipe)]) == 2
    assert "exists already" in capsys.readouterr().err and recipe.read_text() == "data: TraceData\n"
