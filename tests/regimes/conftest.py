"""A tiny student for on-policy runs, and one thread for all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lit_reason.tasks import chain
from lit_reason.tasks.student import write_student


@pytest.fixture(scope="package", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the smoke recipes find their student (`vars.folder`) and leave their runs."""
    folder = tmp_path_factory.mktemp("student")
    write_student(folder / "base", chain.words(chain.ChainConfig()))
    return folder
