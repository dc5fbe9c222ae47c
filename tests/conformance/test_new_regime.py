"""What `lit-reason new regime` writes keeps every promise before a line of it is changed."""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path

import pytest
from promises import PROMISES, Case, find_regimes, own_settings, recipes_of, two_processes_equal_one, write_golden

from lit_reason.cli import door
from lit_reason.core.regime import Regime


@pytest.fixture(scope="module")
def case(smoke_folder, tmp_path_factory) -> Case:
    project = tmp_path_factory.mktemp("project")
    assert door.main(["new", "regime", "fresh_idea", "--into", str(project)]) == 0
    sys.path.insert(0, str(project))
    importlib.invalidate_caches()
    regime = importlib.import_module("fresh_idea.regime").FreshIdeaRegime
    recipe = project / "recipes/smoke/fresh_idea.yaml"
    made = Case("fresh_idea", regime, recipe, smoke_folder, project / "fresh_idea.json")
    write_golden(made)
    yield made
    sys.path.remove(str(project))


@pytest.mark.parametrize("promise", PROMISES, ids=lambda check: check.__name__)
def test_promise(case, promise):
    promise(case)


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_equal_one(case, tmp_path):
    two_processes_equal_one(case, tmp_path)


def test_its_own_settings_are_among_the_checked(case):
    assert list(own_settings(case, set())) == ["fresh_idea", "fresh_idea.focus"]


def test_the_scan_would_find_it(case):
    assert find_regimes("fresh_idea") == [case.regime]
    assert recipes_of(case.regime, case.recipe.parent) == [case.recipe]
    assert issubclass(case.regime, Regime) and Path(inspect.getfile(case.regime)).parent.name == "fresh_idea"


def test_without_focus_it_is_plain_fine_tuning(case):
    """The weights are those of the data at focus 0, and smaller for likely tokens above it."""
    import torch

    token_weights = importlib.import_module("fresh_idea.loss").token_weights
    logp, weight = torch.tensor([0.0, -0.5, -4.0]), torch.tensor([1.0, 2.0, 0.5])
    assert torch.equal(token_weights(logp, weight, focus=0.0), weight)
    assert token_weights(logp, weight, focus=2.0) == pytest.approx(weight * (1 - logp.exp()) ** 2)
