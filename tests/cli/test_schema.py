"""The JSON schema of recipes, on toy classes and against an independent validator."""

from __future__ import annotations

import copy
import re
import sys
from pathlib import Path

import cli_toys
import pytest
import yaml
from jsonschema import Draft202012Validator

from lit_reason.cli import door, reason_cli, schema
from lit_reason.errors import UserError

RECIPE = yaml.safe_load(
    """
seed_everything: 3
vars: {w: 24}
model:
  class_path: LoudToyRegime
  init_args: {volume: 2.5, width: "${vars.w}", lm: {path: abc, adapter: {rank: 4, targets: [q, v]}}}
data:
  class_path: cli_toys.ToyData
  init_args: {train_file: x, condense: {strategy: epic, tau: 0.5}}
trainer:
  max_steps: "${vars.w}"
  accelerator: cpu
  callbacks:
    - {class_path: ToyBell, init_args: {sound: dong}}
    - {class_path: lightning.pytorch.callbacks.Timer}
  callbacks+: [{class_path: my.own.Callback, init_args: {anything: 1}}]
"""
)


@pytest.fixture(scope="module")
def toy_schema():
    return reason_cli.schema_for(cli_toys.ToyTrainer, cli_toys.ToyRegime)


@pytest.fixture(scope="module")
def validator(toy_schema):
    Draft202012Validator.check_schema(toy_schema)
    return Draft202012Validator(toy_schema)


def test_a_good_recipe_is_valid(validator):
    validator.validate(RECIPE)
    validator.validate({"model": {"init_args": {"width": 3}}})  # an overlay keeps the class
    validator.validate({"model": "model.yaml", "trainer": {"logger": False}})


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["modle"], {}),
        (["model", "class_path"], "LoudToyRegme"),
        (["model", "init_args", "volum"], 1),
        (["model", "init_args", "lm", "pth"], 1),
        (["model", "init_args", "lm", "adapter", "rank"], "many"),
        (["model", "init_args", "width"], 1.5),
        (["data", "init_args", "condense", "strategy"], "epicc"),
        (["data", "init_args", "condense", "tau"], "half"),
        (["trainer", "max_stepz"], 3),
        (["trainer", "max_steps"], "three"),
        (["trainer", "callbacks", 0, "init_args", "sound"], "dang"),
        (["trainer", "callbacks", 0, "class_path"], "ToyBel"),
    ],
)
def test_each_mistake_is_caught(validator, path, value):
    recipe = copy.deepcopy(RECIPE)
    place = recipe
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert not validator.is_valid(recipe)


def test_descriptions_defaults_and_inherited_arguments(toy_schema):
    volume = schema.part_of(toy_schema, "LoudToyRegime")["properties"]
    assert set(volume) == {"volume", "lm", "optim", "width"}
    assert volume["volume"]["description"] == "how loud." and volume["volume"]["default"] == 1.0
    assert volume["width"]["description"] == "inputs of the linear layer."
    trainer = schema.part_of(toy_schema, "ToyTrainer")["properties"]
    assert {"max_steps", "use_distributed_sampler", "callbacks", "callbacks+"} <= set(trainer)
    assert trainer["use_distributed_sampler"]["default"] is False
    assert "limit" in toy_schema["properties"] and "model" in toy_schema["properties"]
    assert not {"datamodule", "train_dataloaders", "self"} & set(toy_schema["properties"])


def test_part_stands_alone_and_suggests(toy_schema):
    part = schema.part_of(toy_schema, "ToyData")
    Draft202012Validator.check_schema(part)
    Draft202012Validator(part).validate({"train_file": "x", "condense": {"tau": 0.5}})
    assert not Draft202012Validator(part).is_valid({"condense": {"tauu": 0.5}})
    assert len(part["$defs"]) < len(toy_schema["$defs"])
    with pytest.raises(UserError, match="did you mean 'ToyData'"):
        schema.part_of(toy_schema, "ToyDatta")


def test_docstring_args_joins_lines_and_stops_at_the_next_block():
    def function():
        """Do it.

        Args:
            first: one: with a colon,
                and a second line.
            second (int): two.

        Returns:
            third: not an argument.
        """

    assert schema.docstring_args(function) == {
        "first": "one: with a colon, and a second line.",
        "second": "two.",
    }


def test_every_reference_resolves(toy_schema):
    names = set(re.findall(r"#/\$defs/([^'\"]+)", str(toy_schema)))
    assert names and names <= set(toy_schema["$defs"])


def test_write(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(reason_cli, "house_classes", lambda: (cli_toys.ToyTrainer, cli_toys.ToyRegime))
    monkeypatch.setattr(sys, "argv", ["lit-reason"])
    target = tmp_path / "recipe.schema.json"
    assert door.main(["schema", "--write", str(target)]) == 0
    assert "# yaml-language-server: $schema=recipe.schema.json" in capsys.readouterr().out
    Draft202012Validator.check_schema(yaml.safe_load(Path(target).read_text()))
    assert door.main(["schema", "ToyBell"]) == 0
    assert set(yaml.safe_load(capsys.readouterr().out)["properties"]) == {"every", "sound"}
