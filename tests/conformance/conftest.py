"""Data and student that the tiny recipes run on, and the regimes that are checked."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from lit_reason.tasks import chain
from lit_reason.tasks.problem_file import write_problems
from lit_reason.tasks.student import write_student


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-golden", action="store_true", help="record the first losses of regimes that have none")


@pytest.fixture(scope="session")
def smoke_folder(tmp_path_factory) -> Path:
    """What `vars.folder` of a tiny recipe points to: the files of the demo, fewer of them."""
    folder = tmp_path_factory.mktemp("smoke")
    config = chain.ChainConfig()
    write_student(folder / "base", chain.words(config))
    write_problems(folder / "data/train.jsonl", partial(chain.record, config, 0, held_out=False), 60)
    write_problems(folder / "data/heldout.jsonl", partial(chain.record, config, 0, held_out=True), 24)
    write_problems(folder / "data/styles.jsonl", partial(chain.styled, config, 0), 120)
    return folder


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Threads wait for each other more than they work on matrices this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
