"""Real launchers: a worker is killed and the job ends with the same weights; two machines with a network between."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import two_ranks
import yaml
from die_once import KeepWeights
from tiny_run import arguments, fit, write_model, write_traces

from lit_reason.cli.door import main

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.dist, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]
SETTINGS = {
    "data__batch_rows": 4,
    "trainer__max_steps": 8,
    "model__lm__overrides": '{"attention_dropout": 0.2}',
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("torchrun")
    write_model(base / "model")
    write_traces(base / "traces.jsonl")
    return base


def undisturbed(folder: Path, strategy: str) -> None:
    keep = KeepWeights(str(folder / f"{strategy}.pt"))
    fit(folder, folder / f"whole-{strategy}", [keep], trainer__strategy=strategy, trainer__devices=2, **SETTINGS)


@pytest.fixture(scope="module")
def expected(folder):
    """By strategy: weights after the same steps on two processes that nobody disturbed."""
    known: dict[str, dict[str, torch.Tensor]] = {}

    def get(strategy: str) -> dict[str, torch.Tensor]:
        if strategy not in known:
            two_ranks.run(undisturbed, folder, folder, strategy)
            known[strategy] = torch.load(folder / f"{strategy}.pt", weights_only=True)
        return known[strategy]

    return get


def words(folder: Path, run: Path, strategy: str, *, dies_after: int | None) -> list[str]:
    """Options of `fit` for a run that saves every two steps, and in which one process may be killed."""
    run.mkdir()
    callbacks = [
        {"class_path": "die_once.KeepWeights", "init_args": {"path": str(run / "weights.pt")}},
        {
            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {"every_n_train_steps": 2, "save_last": True},
        },
    ]
    if dies_after is not None:
        killing = {"marker": str(run / "died"), "step": dies_after}
        callbacks.insert(0, {"class_path": "die_once.DieOnce", "init_args": killing})
    (run / "callbacks.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
    return [f"--config={run / 'callbacks.yaml'}", *arguments(folder, run, **SETTINGS)]


def environment(run: Path, **more: str) -> dict[str, str]:
    here = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests/dist")))
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    return {**os.environ, "PYTHONPATH": here, "PATH": path, "OMP_NUM_THREADS": "1", **more}


def assert_ended_as(run: Path, expected: dict[str, torch.Tensor]) -> None:
    found = torch.load(run / "weights.pt", weights_only=True)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_torchrun_starts_all_again_when_a_worker_is_killed(folder, expected, tmp_path, strategy):
    run = tmp_path / "run"
    given = words(folder, run, strategy, dies_after=5)
    spread = [f"--trainer.strategy={strategy}", "--trainer.devices=2", "--resume=auto"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2"]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "lit_reason", "fit", *given, *spread],
        env=environment(run, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1"),  # as the script of `launch` has it
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (run / "died").exists() and "going on from" in done.stderr and "step 4" in done.stderr
    assert_ended_as(run, expected(strategy))


@pytest.fixture
def two_machines() -> Iterator[list[tuple[str, str]]]:
    """Two network namespaces joined by a cable: name and address of each."""
    machines = [("lr-a", "10.77.0.1"), ("lr-b", "10.77.0.2")]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)

    try:
        for name, _ in machines:
            ip("netns", "add", name)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces cannot be made here: {getattr(error, 'stderr', None) or error}")
    try:
        ip("link", "add", "cable", "netns", "lr-a", "type", "veth", "peer", "name", "cable", "netns", "lr-b")
        for name, address in machines:
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield machines
    finally:
        for name, _ in machines:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.mark.multinode
@pytest.mark.parametrize(("strategy", "dies_after"), [("ddp", None), ("fsdp2", 5)])
def test_two_machines_run_the_script_of_launch(folder, expected, tmp_path, two_machines, strategy, dies_after):
    """Undisturbed, and with a process of the second machine killed: both machines start again and go on."""
    run, script = tmp_path / "run", tmp_path / "two.sh"
    given = words(folder, run, strategy, dies_after=dies_after)
    recipe = run / "callbacks.yaml"
    spread = ["--nodes", "2", "--gpus", "1", "--scheduler", "torchrun", "--strategy", strategy, "--out", str(script)]
    assert main(["launch", str(recipe), *spread, *given[1:]]) == 0
    started = []
    for number, (name, address) in enumerate(two_machines):
        place = {"MASTER": two_machines[0][1], "NODE": str(number), "ADDRESS": address, "GLOO_SOCKET_IFNAME": "cable"}
        log = (tmp_path / f"{name}.log").open("w")
        command = ["ip", "netns", "exec", name, "bash", str(script)]
        started.append(subprocess.Popen(command, env=environment(run, **place), stdout=log, stderr=log))
    try:
        codes = [process.wait(timeout=600) for process in started]
    finally:
        for process in started:
            process.kill()
    said = "\n".join((tmp_path / f"{name}.log").read_text()[-3000:] for name, _ in two_machines)
    assert codes == [0, 0], said
    assert (run / "died").exists() is (dies_after is not None)
    assert_ended_as(run, expected(strategy))
