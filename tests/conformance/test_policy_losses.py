"""On-policy losses in two processes: what is known over all of a round is known over all processes."""

from __future__ import annotations

import promises
import pytest
import torch
import yaml
from dist import two_ranks
from promises import Case
from torch.distributed.tensor import DTensor

from lit_reason.cli.recipes import ROOT
from lit_reason.core.metrics_log import read_metrics
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


def resampled(case: Case, options: list[str]) -> tuple[list[float], list[torch.Tensor]]:
    """Share of replaced groups by step (on the first process), and the gradients of the first step."""
    done = promises.run(case, promises.PLAIN, "--trainer.max_steps=2", "--trainer.enable_checkpointing=false", *options)
    log = read_metrics(done.folder / "metrics.csv")
    gradients = [g.full_tensor() if isinstance(g, DTensor) else g for g in done.gradients[0]]
    return [value for _, value in log.points("train/resampled")], gradients


@pytest.mark.slow
@pytest.mark.dist
def test_processes_resample_together_whichever_of_them_must(smoke_folder, tmp_path):
    """Both make the update of one process; passes over shards are in step, also where one has nothing to replace."""
    case = varied("grpo", smoke_folder, tmp_path, policy={"resample": 2})
    shares, wanted = resampled(case, ["--data.batch_rows=4"])
    assert shares[0] > 0 and len(shares) == 2
    spread = ["--data.batch_rows=2", "--trainer.devices=2", "--trainer.strategy=fsdp2"]
    (first, of_first), (_, of_second) = two_ranks.run(resampled, tmp_path, case, spread)
    assert first == pytest.approx(shares)
    for found in (of_first, of_second):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6)
