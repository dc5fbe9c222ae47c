"""Checkpoint files, metrics.csv and the choice of what to resume from, without training."""

import errno
import os
import resource
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lit_reason.cli.door import machine_message
from lit_reason.core import checkpoint_io
from lit_reason.core.checkpoint_io import WholeFileIO, disk_error
from lit_reason.core.metrics_file import MetricsFile
from lit_reason.core.resume import difference, find, go_on, read_step
from lit_reason.core.trainer import ReasonTrainer
from lit_reason.errors import UserError


@contextmanager
def files_up_to(size: int):
    """The kernel refuses to let a file grow beyond this, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def checkpoint(step: int) -> dict:
    return {"global_step": step, "loops": {}, "state_dict": {"w": torch.ones(1000)}, "optimizer_states": []}


def test_a_full_disk_leaves_the_older_checkpoint_and_says_so_in_a_line(tmp_path):
    path = tmp_path / "last.ckpt"
    WholeFileIO().save_checkpoint(checkpoint(1), path)
    before = path.read_bytes()
    with files_up_to(3000), pytest.raises(OSError, match="the checkpoint was not written") as caught:
        WholeFileIO().save_checkpoint({**checkpoint(2), "more": torch.ones(100_000)}, path)
    assert caught.value.errno == errno.EFBIG and "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"] and path.read_bytes() == before


def test_no_space_is_a_failure_of_the_machine(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint_io.os, "fsync", full)
    with pytest.raises(OSError) as caught:
        WholeFileIO().save_checkpoint(checkpoint(1), tmp_path / "a.ckpt")
    assert "No space left" in machine_message(caught.value) and "a.ckpt" in machine_message(caught.value)
    assert not list(tmp_path.iterdir())


def test_what_is_no_checkpoint_is_named(tmp_path):
    path = tmp_path / "a.ckpt"
    whole = {**checkpoint(1), "pytorch-lightning_version": "2.6.6"}
    WholeFileIO().save_checkpoint(whole, path)
    assert WholeFileIO().load_checkpoint(path)["global_step"] == 1
    for content, words in (
        (b"a,b\n1,2\n", "a.ckpt: not a checkpoint, or a broken one"),
        (path.read_bytes()[:-50], "a.ckpt: not a checkpoint, or a broken one"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=words):
            WholeFileIO().load_checkpoint(path)
    for value, part in (([1], "state_dict"), ({"w": 1}, "state_dict"), (checkpoint(1), "pytorch-lightning_version")):
        torch.save(value, path)
        with pytest.raises(UserError, match=f"not a checkpoint of a run: it has no {part}"):
            WholeFileIO().load_checkpoint(path)


def test_other_errors_pass_through_and_leave_nothing(tmp_path):
    with pytest.raises(Exception, match="pickle") as caught:
        WholeFileIO().save_checkpoint({"f": lambda: 0}, tmp_path / "a.ckpt")
    assert disk_error(caught.value) is None and not list(tmp_path.iterdir())


def test_the_name_appears_only_when_the_bytes_are_on_the_disk(tmp_path, monkeypatch):
    order = []
    for name in ("fsync", "replace"):
        inner = getattr(os, name)
        monkeypatch.setattr(checkpoint_io.os, name, lambda *a, n=name, f=inner: (order.append(n), f(*a))[1])
    WholeFileIO().save_checkpoint(checkpoint(1), tmp_path / "new" / "a.ckpt")
    assert order == ["fsync", "replace", "fsync"]
    assert read_step(tmp_path / "new" / "a.ckpt") == 1


def run_folder(root: Path, version: int, recipe: dict | None = None) -> Path:
    folder = root / f"version_{version}"
    (folder / "checkpoints").mkdir(parents=True)
    if recipe is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def put(folder: Path, name: str, step: int, age: float) -> Path:
    path = folder / "checkpoints" / name
    torch.save(checkpoint(step), path)
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_the_newest_whole_checkpoint_is_found_and_broken_ones_are_named(tmp_path):
    old, new = run_folder(tmp_path, 0), run_folder(tmp_path, 1)
    put(old, "last.ckpt", 9, age=50)
    good = put(new, "epoch=0-step=4.ckpt", 4, age=40)
    cut = put(new, "last.ckpt", 6, age=30)
    cut.write_bytes(cut.read_bytes()[:-200])
    os.utime(cut, (time.time() - 30,) * 2)
    flipped = put(new, "flip.ckpt", 7, age=0)
    data = bytearray(flipped.read_bytes())
    data[data.index(b"\x00\x00\x80\x3f" * 8) + 5] ^= 1  # one bit within the weights
    flipped.write_bytes(data)
    torch.save({"state_dict": {}, "global_step": 8, "loops": {}}, new / "checkpoints" / "weights.ckpt")
    (new / "checkpoints" / "gone.ckpt").symlink_to("nowhere.ckpt")
    said: list[str] = []
    point = find([old, new], None, said.append)
    assert (point.checkpoint, point.folder, point.step) == (good, new, 4)
    assert len(said) == 3 and all("passed over" in line for line in said)
    assert any("last.ckpt: broken" in line for line in said) and any("flip.ckpt: broken" in line for line in said)
    assert any("weights alone" in line for line in said)
    assert find([run_folder(tmp_path, 2)], None, said.append) is None


def test_runs_of_another_recipe_are_passed_over(tmp_path):
    recipe = {
        "seed_everything": 1,
        "model": {"lr": 1.0},
        "data": {"workers": 0, "tau": 0.5},
        "trainer": {"max_steps": 9},
    }
    mine, other = run_folder(tmp_path, 0, recipe), run_folder(tmp_path, 1, {**recipe, "data": {"tau": 0.7}})
    put(mine, "last.ckpt", 3, age=50)
    put(other, "last.ckpt", 5, age=0)
    said: list[str] = []
    assert find([mine, other], recipe, said.append).step == 3
    assert said == [f"resume: passed over {other}: another recipe (data.tau was 0.7, is 0.5)"]
    longer = {**recipe, "trainer": {"max_steps": 20}, "data": {"workers": 2, "tau": 0.5}}
    assert difference(mine, longer) == ""
    assert "accumulate" in difference(mine, {**recipe, "trainer": {"accumulate_grad_batches": 2}})


def trainer(root: Path, **more) -> ReasonTrainer:
    return ReasonTrainer(logger=CSVLogger(root.parent, root.name), accelerator="cpu", **more)


def test_the_trainer_goes_on_in_the_folder_of_the_run(tmp_path):
    root = tmp_path / "runs"
    path = put(run_folder(root, 3), "last.ckpt", 4, age=9)
    leftover = path.with_name(".last.ckpt.77.part")
    leftover.write_text("half")
    run_folder(root, 4)
    for given in ("auto", str(path), str(root / "version_3")):
        chosen = trainer(root)
        assert go_on(chosen, given, None) == path
        assert Path(chosen.log_dir) == root / "version_3"
    assert not leftover.exists()
    away = tmp_path / "elsewhere.ckpt"
    torch.save(checkpoint(2), away)
    chosen = trainer(root)
    assert go_on(chosen, str(away), None) == away and Path(chosen.log_dir) == root / "version_5"
    with pytest.raises(UserError, match="no such checkpoint"):
        go_on(chosen, str(root / "version_9"), None)
    with pytest.raises(UserError, match="no whole checkpoint in"):
        go_on(chosen, str(root / "version_4"), None)


def test_checkpoints_in_a_folder_of_the_users_choice_are_found(tmp_path):
    root, away = tmp_path / "runs", tmp_path / "away"
    home = run_folder(root, 0)
    away.mkdir()
    torch.save({**checkpoint(5), "step_boundary": {"folder": str(home)}}, away / "last.ckpt")
    chosen = trainer(root, callbacks=[ModelCheckpoint(dirpath=away)])
    assert go_on(chosen, "auto", None) == away / "last.ckpt"
    assert Path(chosen.log_dir) == home
    assert isinstance(chosen.strategy.checkpoint_io, WholeFileIO)


def log(logger: MetricsFile, steps: range, **figures: float) -> None:
    for step in steps:
        logger.log_metrics({"loss": step / 10, **figures}, step)
        logger.save()


def test_metrics_go_on_after_the_rows_of_the_checkpoint(tmp_path):
    first = MetricsFile.like(CSVLogger(tmp_path, "a", version=0))
    log(first, range(5))
    path = Path(first.log_dir) / "metrics.csv"
    path.write_text(path.read_text() + "0.7,")  # killed within a line
    second = MetricsFile(tmp_path, "a")
    second.go_on_in(0)
    second.experiment.keep(3)
    assert second.rows == 3
    log(second, range(3, 5))
    log(second, range(5, 6), other=1.0)  # a new column rewrites the header
    lines = path.read_text().split()
    assert lines[0] == "loss,other,step"
    assert [line.split(",")[2] for line in lines[1:]] == ["0", "1", "2", "3", "4", "5"]


def test_a_row_written_before_its_checkpoint_is_not_written_again(tmp_path):
    logger = MetricsFile.like(CSVLogger(tmp_path, "a"))
    logger.log_early({"loss": 1.0, "epoch": 0}, 4)
    assert logger.rows == 1
    logger.log_metrics({"loss": 1.0, "epoch": 0}, 4)
    logger.log_metrics({"val": 2.0, "epoch": 0}, 4)
    logger.save()
    lines = (Path(logger.log_dir) / "metrics.csv").read_text().split()
    assert lines == ["epoch,loss,step,val", "0,1.0,4,", "0,,4,2.0"]
