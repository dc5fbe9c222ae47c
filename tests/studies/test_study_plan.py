"""Study files: what is read from them, which runs follow, and what is refused."""

import pytest

from lit_reason.errors import UserError
from lit_reason.studies.plan import Cell, Stage, cells, options, read_study

SMALL = {
    "recipe": "demo/student",
    "arms": {
        "half": {"options": {"a.b": 2}},
        "full": None,
        "short": {"stages": [{"share": 0.5, "options": {"a.b": 3}}, {"share": 0.5}], "budgets": ["epochs"]},
        "here": {"tasks": ["one"]},
    },
    "reference": "full",
    "tasks": {"one": {"options": {"a.b": 1, "a.c": 1}}, "two": None},
    "options": {"a.b": 0, "a.d": 0},
    "seeds": [3, 1],
    "budgets": ["tokens", "epochs"],
}


def test_each_seed_is_complete_before_the_next_and_nothing_stands_before_what_it_needs():
    found = cells(read_study(SMALL, "s.yaml"))
    assert [c.seed for c in found] == [3] * 10 + [1] * 10
    assert [(c.task, c.budget, c.arm) for c in found[:10]] == [
        *(("one", "epochs", arm) for arm in ("full", "half", "short", "here")),
        *(("two", "epochs", arm) for arm in ("full", "half", "short")),
        # under tokens the reference is its run under epochs, and `short` is not asked for
        *(("one", "tokens", arm) for arm in ("half", "here")),
        ("two", "tokens", "half"),
    ]


def test_options_of_equal_name_later_ones_hold():
    study = read_study(SMALL, "s.yaml")
    assert options(study, Cell("two", "epochs", "full", 1), Stage()) == {"a.b": 0, "a.d": 0}
    assert options(study, Cell("one", "epochs", "full", 1), Stage()) == {"a.b": 1, "a.c": 1, "a.d": 0}
    assert options(study, Cell("one", "epochs", "half", 1), Stage())["a.b"] == 2
    assert options(study, Cell("one", "epochs", "half", 1), Stage(1, {"a.b": 4}))["a.b"] == 4
    assert [s.share for s in study.arms["short"].stages] == [0.5, 0.5]


def test_defaults():
    study = read_study({"recipe": "r", "arms": {"a": {}, "b": {}}}, "s.yaml")
    assert (study.reference, study.seeds, study.budgets, list(study.tasks)) == ("a", (0,), ("epochs",), ["task"])
    assert study.arms["a"].stages == (Stage(),)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"arm": {}}, "no key 'arm' (did you mean 'arms'?)"),
        ({"arms": {"a": {"option": {}}}}, "arms.a: no key 'option' (did you mean 'options'?)"),
        ({"arms": ["full"]}, "mapping with names as keys"),
        ({"arms": {"a": 3}}, "arms.a: 3 stands where a mapping belongs"),
        ({"arms": {"full": {"options": {1: 2}}}}, "names as keys"),
        ({"reference": "ful"}, "'ful' (did you mean 'full'?)"),
        ({"budgets": ["token"]}, "did you mean 'tokens'"),
        ({"budgets": ["tokens"], "arms": {"full": {}}}, "list epochs as well"),
        ({"seeds": 3}, "list of at least one"),
        ({"seeds": [1, 1]}, "names something twice"),
        ({"seeds": [-1]}, "seeds: -1"),
        ({"seeds": [True]}, "seeds: True"),
        ({"arms": {"full": {"stages": [{"share": 1.5}]}}}, "shares lie above 0"),
        ({"arms": {"full": {"stages": []}}}, "list of at least one"),
        ({"arms": {"full": {"tasks": ["on"]}}}, "did you mean 'one'"),
        ({"arms": {"full": {"tasks": ["one"]}}}, "does not run on task two"),
        ({"arms": {"full": {}, "a/b": {}}}, "holds no slash"),
        ({"tasks": {"one": {"problems": {"kind": "chain", "rows": 3}}}}, "'held_out' is missing"),
    ],
)
def test_what_is_refused(change, words):
    with pytest.raises(UserError) as error:
        read_study({**SMALL, **change}, "s.yaml")
    assert words in str(error.value) and str(error.value).startswith("s.yaml")


def test_a_missing_recipe_is_named():
    with pytest.raises(UserError, match="s.yaml: 'recipe' is missing"):
        read_study({"arms": {"a": {}}}, "s.yaml")
