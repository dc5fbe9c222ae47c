"""Finding recipes, reading their headers, and holding the shipped ones to the conventions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import yaml

from lit_reason.cli.config_files import read_config
from lit_reason.cli.messages import Walker
from lit_reason.cli.recipes import Recipe, find_recipes, header_problems, lint_recipes, locate, read_header
from lit_reason.errors import UserError

TEXT = """\
# yaml-language-server: $schema=../recipe.schema.json
# Toy model on toy rows.
# This line explains, and belongs to no field.
# Hardware: any CPU,
#   or a GPU.
# Expected: 2 s; accuracy 1.
#
# More prose.
# Command: lit-reason fit --config toy/run
seed_everything: 1
# Hardware: not in the header
"""


@pytest.fixture
def shelf(tmp_path):
    for name in ("sft/tiny", "sft/large", "demo/tiny", "smoke/quick"):
        path = tmp_path / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(TEXT)
    return tmp_path


def test_header_fields():
    assert read_header(TEXT) == {
        "purpose": "Toy model on toy rows.",
        "hardware": "any CPU, or a GPU.",
        "expected": "2 s; accuracy 1.",
        "command": "lit-reason fit --config toy/run",
    }
    assert read_header("seed: 1\n") == {} and read_header("") == {}


def test_find_is_sorted_and_named_by_path(shelf):
    assert [recipe.name for recipe in find_recipes(shelf)] == [
        "demo/tiny",
        "sft/large",
        "sft/tiny",
        "smoke/quick",
    ]
    assert find_recipes(shelf)[0].folder == "demo"


@pytest.mark.parametrize(
    "given", ["sft/large", "sft/large.yaml", "recipes/sft/large.yaml", "./recipes/sft/large", "large"]
)
def test_locate_by_name(shelf, given):
    assert locate(given, shelf) == shelf / "sft/large.yaml"


def test_locate_prefers_a_file_and_refuses_clearly(shelf, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / "large"
    mine.write_text("a: 1\n")
    assert locate("large", shelf).read_text() == "a: 1\n"
    with pytest.raises(UserError, match="several recipes: demo/tiny, sft/tiny"):
        locate("tiny", shelf)
    with pytest.raises(UserError, match="did you mean 'sft/large'"):
        locate("sft/lage", shelf)
    with pytest.raises(UserError, match="did you mean 'smoke/quick'"):
        locate("quik.yaml", shelf)
    with pytest.raises(UserError, match="folder"):
        locate(str(shelf / "sft"), shelf)


def test_header_problems(shelf):
    assert header_problems(find_recipes(shelf)[0]) == []
    bare = Recipe("a/b", shelf / "x.yaml", purpose="p.")
    assert [line.split()[-1] for line in header_problems(bare)] == ["hardware", "expected", "command"]
    (cut,) = header_problems(replace(find_recipes(shelf)[0], purpose="A sentence that goes on, and"))
    assert "no whole sentence" in cut


def test_shipped_recipes_have_headers_parse_and_build(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["lit-reason"])
    monkeypatch.chdir(tmp_path)
    assert find_recipes()
    assert lint_recipes() == []
    assert list(tmp_path.iterdir()) == []


def test_lint_tells_what_is_wrong(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["lit-reason"])
    (tmp_path / "sft").mkdir()
    good = locate("sft/smollm2-epic").read_text()
    (tmp_path / "sft/other.yaml").write_text(good)
    (tmp_path / "sft/wrong.yaml").write_text("# Purpose.\ntrainer: {max_stepz: 1}\n")
    problems = "\n".join(lint_recipes(tmp_path))
    assert "sft/other: the command in its header does not name it" in problems
    assert "sft/wrong: the header has no hardware" in problems and "did you mean 'max_steps'" in problems


def test_shipped_recipes_follow_the_schema():
    from jsonschema import Draft202012Validator

    from lit_reason.cli.reason_cli import house_classes, schema_for

    schema = schema_for(*house_classes())
    Draft202012Validator.check_schema(schema)
    validator, walker = Draft202012Validator(schema), Walker(schema)
    for recipe in find_recipes():
        errors = [error.message for error in validator.iter_errors(yaml.safe_load(recipe.path.read_text()))]
        assert errors == [], recipe.name
        assert walker.first_problem([read_config(recipe.path)]) is None, recipe.name
