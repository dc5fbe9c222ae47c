"""The promises hold for a regime that shares nothing with fine-tuning but the base class."""

from __future__ import annotations

import pytest
import yaml
from other_kind import EvenRegime
from promises import PROMISES, Case, adapted, recipes_of, two_processes_equal_one, write_golden

from lit_reason.cli.recipes import ROOT


@pytest.fixture(scope="module")
def case(smoke_folder, tmp_path_factory) -> Case:
    folder = tmp_path_factory.mktemp("other")
    text = (ROOT / "smoke/sft.yaml").read_text()
    recipe = yaml.safe_load(text)
    recipe["model"]["class_path"] = "other_kind.EvenRegime"
    recipe["data"] = {"class_path": "other_kind.NumberedPrompts", "init_args": {"batch_rows": 8}}
    path = folder / "even.yaml"
    path.write_text(text[: text.index("\nvars:")] + "\n" + yaml.safe_dump(recipe))
    made = Case("even", EvenRegime, path, smoke_folder, folder / "even.json")
    write_golden(made)
    return made


@pytest.mark.parametrize("promise", PROMISES, ids=lambda check: check.__name__)
def test_promise(case, promise):
    promise(case)


def test_what_it_cannot_do_it_refuses(case):
    assert adapted(case) is None
    assert recipes_of(EvenRegime, case.recipe.parent) == [case.recipe]


@pytest.mark.dist
def test_two_processes_equal_one(case, tmp_path):
    two_processes_equal_one(case, tmp_path)
