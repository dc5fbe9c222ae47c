"""Every regime under `lit_reason.regimes` keeps the shared promises with its recipe `recipes/smoke/<regime>.yaml`.

Nothing is registered: a new regime folder is found by the scan. To record its first losses, once:
`pytest tests/conformance --write-golden`.
"""

from __future__ import annotations

from pathlib import Path

import promise_breakers
import promises
import pytest
from promises import PROMISES, Case, find_regimes, the_first_steps_are_as_recorded, write_golden

from lit_reason.cli.recipes import ROOT

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
REGIMES = find_regimes()


def test_the_scan_finds_regimes():
    assert REGIMES["sft"][0].__name__ == "SFTRegime"


@pytest.mark.parametrize("name", REGIMES)
def test_each_folder_has_one_regime_and_a_tiny_recipe(name):
    assert len(REGIMES[name]) == 1, "one regime a folder, so that its recipe is found by its name"
    assert (ROOT / "smoke" / f"{name}.yaml").is_file()


@pytest.fixture(scope="module", params=REGIMES)
def case(request, smoke_folder) -> Case:
    name = request.param
    return Case(name, REGIMES[name][0], ROOT / "smoke" / f"{name}.yaml", smoke_folder, GOLDEN / f"{name}.json")


@pytest.mark.parametrize("promise", PROMISES, ids=lambda check: check.__name__)
def test_promise(case, promise, request):
    wanted = promise is the_first_steps_are_as_recorded and request.config.getoption("--write-golden", default=False)
    if wanted and not case.golden.exists():
        write_golden(case)
    promise(case)


@pytest.mark.dist
def test_two_processes_equal_one(case, tmp_path):
    promises.two_processes_equal_one(case, tmp_path)


@pytest.mark.parametrize(
    ("regime", "broken"),
    [
        (promise_breakers.ClimbingRegime, promises.fits_and_the_loss_falls),
        (promise_breakers.MeanOfMeansRegime, promises.micro_batches_equal_one_batch),
        (promise_breakers.UnseededRegime, promises.the_seed_decides_the_losses),
        (promise_breakers.UnseededRegime, promises.the_saved_config_repeats_the_run),
        (promise_breakers.ForgetfulRegime, promises.a_resume_within_an_epoch_is_bit_equal),
        (promise_breakers.HalfRegime, promises.full_training_changes_every_weight),
        (promise_breakers.HalfRegime, promises.the_first_steps_are_as_recorded),
        (promise_breakers.SecretiveRegime, promises.every_setting_has_a_line_in_the_docstring),
        (promise_breakers.SecretiveRegime, promises.the_recipe_explains_itself_and_names_the_regime),
    ],
    ids=lambda thing: thing.__name__,
)
def test_a_broken_promise_is_seen(regime, broken, smoke_folder, tmp_path):
    recipe = ROOT / "smoke/sft.yaml"
    if broken is not promises.the_recipe_explains_itself_and_names_the_regime:
        text = recipe.read_text().replace("SFTRegime", f"promise_breakers.{regime.__name__}")
        recipe = tmp_path / "broken.yaml"
        recipe.write_text(text.replace("max_steps: 24", "max_steps: 12"))
    with pytest.raises(AssertionError):
        broken(Case("broken", regime, recipe, smoke_folder, GOLDEN / "sft.json"))


@pytest.mark.slow
@pytest.mark.dist
def test_processes_that_do_not_add_up_are_seen(smoke_folder, tmp_path):
    recipe = tmp_path / "broken.yaml"
    recipe.write_text((ROOT / "smoke/sft.yaml").read_text().replace("SFTRegime", "promise_breakers.PerRankRegime"))
    with pytest.raises(AssertionError, match="ddp"):
        regime = promise_breakers.PerRankRegime
        promises.two_processes_equal_one(Case("broken", regime, recipe, smoke_folder, GOLDEN / "sft.json"), tmp_path)
