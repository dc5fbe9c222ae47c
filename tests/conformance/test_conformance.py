"""Every regime under `lit_reason.regimes` keeps the shared promises with its recipes in `recipes/smoke/`.

Nothing is registered: regimes are found by a scan, and their tiny recipes by the class that these name. To record the
first losses of a recipe, once: `pytest tests/conformance --write-golden`.
"""

from __future__ import annotations

from pathlib import Path

import promise_breakers
import promises
import pytest
from promises import PROMISES, Case, find_regimes, recipes_of, the_first_steps_are_as_recorded, write_golden

from lit_reason.cli.recipes import ROOT
from lit_reason.core.on_policy import OnPolicyRegime
from lit_reason.regimes.sft.regime import SFTRegime

SMOKE = ROOT / "smoke"
GOLDEN = Path(__file__).resolve().parents[1] / "golden"
REGIMES = find_regimes()
CASES = [(regime, recipe) for regime in REGIMES for recipe in recipes_of(regime, SMOKE)]


def test_the_scan_finds_regimes_and_their_recipes():
    assert SFTRegime in REGIMES and (SFTRegime, SMOKE / "sft.yaml") in CASES


@pytest.mark.parametrize("regime", REGIMES, ids=lambda regime: regime.__name__)
def test_each_regime_has_a_tiny_recipe(regime):
    assert recipes_of(regime, SMOKE), f"no recipe in {SMOKE} has class_path: {regime.__name__}"


def test_each_tiny_recipe_is_checked():
    assert {recipe for _, recipe in CASES} == set(SMOKE.glob("*.yaml"))


@pytest.fixture(scope="module", params=CASES, ids=lambda pair: pair[1].stem)
def case(request, smoke_folder) -> Case:
    regime, recipe = request.param
    return Case(recipe.stem, regime, recipe, smoke_folder, GOLDEN / f"{recipe.stem}.json")


@pytest.mark.parametrize("promise", PROMISES, ids=lambda check: check.__name__)
def test_promise(case, promise, request):
    wanted = promise is the_first_steps_are_as_recorded and request.config.getoption("--write-golden", default=False)
    if wanted and not case.golden.exists():
        write_golden(case)
    promise(case)


@pytest.mark.dist
def test_two_processes_equal_one(case, tmp_path):
    promises.two_processes_equal_one(case, tmp_path)


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_play_with_an_adapter_as_one_does(case, tmp_path):
    if not issubclass(case.regime, OnPolicyRegime):
        pytest.skip("plays no rollouts")
    promises.two_processes_equal_one(case, tmp_path, "--model.lm.adapter.rank=4")


@pytest.mark.parametrize(
    ("regime", "broken"),
    [
        (promise_breakers.ClimbingRegime, promises.fits_and_learns),
        (promise_breakers.MeanOfMeansRegime, promises.micro_batches_equal_one_batch),
        (promise_breakers.UnseededRegime, promises.the_saved_config_repeats_the_run_bit_for_bit),
        (promise_breakers.ForgetfulRegime, promises.a_resume_within_an_epoch_is_bit_equal),
        (promise_breakers.HalfRegime, promises.full_training_changes_every_trained_weight_and_no_other),
        (promise_breakers.HalfRegime, promises.the_first_steps_are_as_recorded),
        (promise_breakers.DeafRegime, promises.an_adapter_trains_alone),
        (promise_breakers.MuteRegime, promises.an_adapter_trains_alone),
        (promise_breakers.SecretiveRegime, promises.every_setting_has_a_line_in_the_docstring),
        (promise_breakers.SecretiveRegime, promises.the_recipe_explains_itself_and_names_the_regime),
        (promise_breakers.DriftingRegime, promises.full_training_changes_every_trained_weight_and_no_other),
        (promise_breakers.AmnesicRegime, promises.a_resume_within_an_epoch_is_bit_equal),
    ],
    ids=lambda thing: thing.__name__,
)
def test_a_broken_promise_is_seen(regime, broken, smoke_folder, tmp_path):
    recipe = SMOKE / ("steering.yaml" if regime.collects else "sft.yaml")
    if broken is not promises.the_recipe_explains_itself_and_names_the_regime:
        kept = "SteeringRegime" if regime.collects else "SFTRegime"
        text = recipe.read_text().replace(kept, f"promise_breakers.{regime.__name__}")
        recipe = tmp_path / "broken.yaml"
        recipe.write_text(text.replace("max_steps: 24", "max_steps: 12"))
    with pytest.raises(AssertionError):
        broken(Case("broken", regime, recipe, smoke_folder, GOLDEN / "sft.json"))


@pytest.mark.slow
@pytest.mark.dist
def test_processes_that_do_not_add_up_are_seen(smoke_folder, tmp_path):
    recipe = tmp_path / "broken.yaml"
    recipe.write_text((SMOKE / "sft.yaml").read_text().replace("SFTRegime", "promise_breakers.PerRankRegime"))
    with pytest.raises(AssertionError, match="ddp"):
        regime = promise_breakers.PerRankRegime
        promises.two_processes_equal_one(Case("broken", regime, recipe, smoke_folder, GOLDEN / "sft.json"), tmp_path)
