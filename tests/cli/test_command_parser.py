"""What the verbs' own parser refuses, and how it says so."""

from __future__ import annotations

import importlib

import pytest

from lit_reason.cli.command_parser import CommandParser
from lit_reason.cli.completion import LIKE_FIT
from lit_reason.cli.door import OTHER_VERBS, module_of
from lit_reason.errors import UserError


def parser():
    made = CommandParser("bake", "Bake.")
    made.add_argument("what")
    made.add_argument("--degrees", type=int, required=True)
    made.add_argument("--shape", choices=("round", "square"))
    return made


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["x", "--degrees", "2", "--shap", "round"], "unrecognized arguments: --shap round (did you mean '--shape'?)"),
        (["x", "--degrees", "2", "--qqqq=1"], "unrecognized arguments: --qqqq=1"),
        (["x", "--degree=2"], "following arguments are required: --degrees; --degree is no option (did you mean"),
        (["x"], "the following arguments are required: --degrees"),
        (["x", "--degrees", "hot"], "argument --degrees: invalid int value: 'hot'"),
        (["x", "--degrees", "2", "--shape", "roud"], "'roud' (choose from 'round', 'square') (did you mean 'round'?)"),
    ],
)
def test_refusals_name_the_nearest(argv, message):
    with pytest.raises(UserError) as refused:
        parser().parse_args(argv)
    first, second = str(refused.value).splitlines()
    assert first.startswith("bake: ") and message in first and second == "See lit-reason bake --help"


def test_every_verb_has_such_a_parser_and_help_for_each_option():
    for verb in OTHER_VERBS.keys() - {"list", "show", *LIKE_FIT}:
        made = importlib.import_module(module_of(verb)).build_parser()
        assert isinstance(made, CommandParser) and made.verb == verb and made.description
        assert not [option for option in made._actions if not option.help]
