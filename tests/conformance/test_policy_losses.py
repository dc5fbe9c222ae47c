"""On-policy losses in two processes: what is known over all of a round is known over all processes."""

from __future__ import annotations

import promises
import pytest
import yaml
from dist import two_ranks
from promises import Case

from lit_reason.cli.recipes import ROOT
from lit_reason.regimes.grpo.regime import GRPORegime
from lit_reason.regimes.ppo.regime import PPORegime

VARIANTS = {
    "grpo": {
        "policy": {
            **{"ratio": "sequence", "average": "sequence", "kl": 0.1, "kl_estimate": "k2"},
            **{"importance": "token", "updates": 2},
        },
        "credit": {"rule": "reinforce_pp", "scale": "batch"},
    },
    "ppo": {
        "policy": {"truncated": "bootstrap", "ratio": "turn", "kl": 0.1, "kl_estimate": "k1", "kl_in": "reward"},
        "critic": {"trunk": "separate", "lr": 1.0e-2},
    },
}


def varied(name, smoke_folder, folder, **changes) -> Case:
    """The tiny recipe of a regime with other settings."""
    recipe = yaml.safe_load((ROOT / "smoke" / f"{name}.yaml").read_text())
    for key, values in (changes or VARIANTS[name]).items():
        recipe["model"]["init_args"].setdefault(key, {}).update(values)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return Case(name, {"grpo": GRPORegime, "ppo": PPORegime}[name], path, smoke_folder, folder / "none.json")


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("name", VARIANTS)
def test_two_processes_make_the_update_of_one(name, smoke_folder, tmp_path):
    promises.two_processes_equal_one(varied(name, smoke_folder, tmp_path), tmp_path)


@pytest.mark.slow
@pytest.mark.dist
def test_processes_resample_together_whichever_of_them_must(smoke_folder, tmp_path):
    """Passes over weights in shards are in step, also where one process has nothing to replace."""
    case = varied("grpo", smoke_folder, tmp_path, policy={"resample": 2})
    options = [promises.PLAIN, "--trainer.max_steps=2", "--data.batch_rows=2"]
    first, _ = two_ranks.run(promises.in_two_processes, tmp_path, case, options, ("fsdp2",))
    assert len(first["fsdp2"][0]) == 2
