"""A folder of shards takes the place of an older one, and a kill at any moment of that loses neither."""

import os
import shutil

import pytest
import torch

from lit_reason.core.checkpoint_io import clear_parts
from lit_reason.core.resume import find, read_step
from lit_reason.strategies import checkpoint_folder
from lit_reason.strategies.checkpoint_folder import UNFINISHED, beside, left_behind, put_in_place


class Killed(BaseException):
    pass


def shards(folder, step):
    folder.mkdir(parents=True)
    (folder / ".metadata").write_bytes(b"x")
    torch.save({"global_step": step, "loops": {}}, folder / "meta.pt")
    return folder


def steps(run):
    said = []
    return find([run], None, said.append), said


@pytest.mark.parametrize("moment", range(6))
def test_a_kill_at_any_moment_leaves_a_whole_folder(tmp_path, monkeypatch, moment):
    """Before and after each rename and each removal: the newest whole one is found, and the next save succeeds."""
    checkpoints = tmp_path / "checkpoints"
    target = shards(checkpoints / "last.ckpt", 1)
    new = shards(beside(target, UNFINISHED), 2)
    ticks = []

    def around(inner):
        def counted(*args):
            for act in (lambda: None, lambda: inner(*args)):
                act()
                ticks.append(inner)
                if len(ticks) == moment + 1:
                    raise Killed

        return counted

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_folder.os, "replace", around(os.replace))
        patch.setattr(checkpoint_folder.shutil, "rmtree", around(shutil.rmtree))
        with pytest.raises(Killed):
            put_in_place(new, target)
    point, said = steps(tmp_path)
    assert said == [] and point.step == (1 if moment < 3 else 2)
    assert read_step(point.checkpoint) == point.step
    assert (left_behind(checkpoints) == [point.checkpoint]) is (moment in (1, 2))
    clear_parts(checkpoints)
    assert steps(tmp_path)[0] == point  # what is unfinished goes, what is whole stays
    put_in_place(shards(beside(target, UNFINISHED), 3), target)
    assert steps(tmp_path)[0].step == 3
    assert [path.name for path in checkpoints.iterdir()] == ["last.ckpt"]


def test_a_file_of_that_name_gives_way_and_an_unfinished_folder_is_removed(tmp_path):
    target = tmp_path / "last.ckpt"
    target.write_text("of another strategy")
    put_in_place(shards(beside(target, UNFINISHED), 1), target)
    assert read_step(target) == 1
    shards(beside(target, UNFINISHED), 2)
    (tmp_path / ".a.ckpt.7.part").write_text("half")
    clear_parts(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
