"""The outer problem without training: points, the surrogate, what comes next, and the store that processes share."""

from __future__ import annotations

import dataclasses
import sqlite3
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lit_reason.errors import UserError
from lit_reason.regimes.shaping import surrogate
from lit_reason.regimes.shaping.config import SearchConfig, ShapingConfig
from lit_reason.regimes.shaping.simplex import initial_points, on_simplex, sobol_points
from lit_reason.regimes.shaping.trial_store import TrialStore
from lit_reason.regimes.shaping.trials import Trial, best, hopeless, next_trial, observations, over

THREE = ("final", "uniform", "shap")


def made(weights, objective, status="finished", kind="search", number=0, variance=0.01, curve=()):
    return Trial(number, kind, tuple(weights), status, objective, variance, tuple(curve))


# ---- points ----


def test_sobol_points_lie_evenly_on_the_simplex():
    points = sobol_points(256, 4, 0)
    torch.testing.assert_close(points.sum(1), torch.ones(256).double())
    assert points.min() >= 0
    torch.testing.assert_close(points.mean(0), torch.full((4,), 0.25).double(), rtol=0, atol=0.02)
    assert not torch.equal(points, sobol_points(256, 4, 1)) and torch.equal(points, sobol_points(256, 4, 0))


def test_the_search_begins_at_the_vertices_that_cost_nothing():
    points = initial_points(("shap", "final", "lime", "uniform"), 4, 0)
    assert points[:2].tolist() == [[0, 1, 0, 0], [0, 0, 0, 1]]
    assert torch.equal(points[2:], sobol_points(2, 4, 0))


def test_a_point_past_the_edge_is_brought_back():
    assert on_simplex(torch.tensor([0.7, 0.5, -1e-9])).tolist() == pytest.approx([0.7 / 1.2, 0.5 / 1.2, 0.0])


# ---- the surrogate ----


def search(seed, K, trials=20, noise=0.05):
    """A planted optimum: `1 - 4 |w - w0|^2`, observed with noise. The true regret of the point that is chosen."""
    pytest.importorskip("botorch", reason="the extra shaping is not installed")
    g = torch.Generator().manual_seed(seed)
    optimum = sobol_points(8, K, 100 + seed)[seed]
    config = SearchConfig(trials=trials, initial=5, reruns=0, seed=seed)
    explainers = ("final", "uniform", "shap", "lime")[:K]
    found = []
    for number in range(trials):
        kind, w = next_trial(found, config, explainers)
        value = float(1 - 4 * ((w - optimum) ** 2).sum()) + noise * float(torch.randn((), generator=g))
        found.append(made(w.tolist(), value, number=number, variance=noise**2))
    kind, w = next_trial(found, config, explainers)
    assert kind == "final" and tuple(w.tolist()) in {t.weights for t in found}
    return float(4 * ((w - optimum) ** 2).sum())


@pytest.mark.parametrize("K", [3, 4])
def test_a_planted_optimum_is_found_within_the_gate(K):
    assert search(0, K) < 0.03


@pytest.mark.slow
@pytest.mark.parametrize("K", [3, 4])
@pytest.mark.parametrize("seed", range(1, 4))
def test_a_planted_optimum_is_found_with_other_seeds(seed, K):
    assert search(seed, K) < 0.03


def test_a_constant_objective_does_not_crash_and_random_state_is_left_alone():
    pytest.importorskip("botorch", reason="the extra shaping is not installed")
    points, before = sobol_points(5, 3, 0), torch.get_rng_state()
    flat, none = torch.full((5,), 2.0).double(), torch.zeros(5).double()
    proposed = surrogate.propose(points, flat, none, seed=3)
    assert float(proposed.sum()) == pytest.approx(1) and torch.equal(torch.get_rng_state(), before)
    mean, _ = surrogate.posterior(points, flat, none)
    torch.testing.assert_close(mean, flat, rtol=0, atol=1e-3)
    assert torch.equal(proposed, surrogate.propose(points, flat, none, seed=3))


def test_the_order_of_the_explainers_does_not_matter():
    pytest.importorskip("botorch", reason="the extra shaping is not installed")
    points, order = sobol_points(10, 3, 0), [1, 2, 0]
    values, noise = 1 - 4 * (points - sobol_points(1, 3, 1)).square().sum(1), torch.full((10,), 1e-3).double()
    at = sobol_points(20, 3, 2)
    mean, deviation = surrogate.posterior(points, values, noise, at)
    again = surrogate.posterior(points[:, order], values, noise, at[:, order])
    torch.testing.assert_close(again, (mean, deviation), rtol=0, atol=0.01)


def test_inner_runs_that_scatter_more_than_their_answers_are_not_taken_for_detail():
    """Pairs at one point that differ by 20 standard errors of their answers, on a plain slope."""
    pytest.importorskip("botorch", reason="the extra shaping is not installed")
    points = sobol_points(8, 3, 0).repeat(2, 1)
    slope = 4 * points[:, 0]
    values = slope + torch.tensor([0.5] * 8 + [-0.5] * 8).double()
    mean, deviation = surrogate.posterior(points, values, torch.full((16,), 0.05**2).double(), points[:8])
    torch.testing.assert_close(mean, slope[:8], rtol=0, atol=0.5)
    assert deviation.min() > 0.1  # two answers at a point tell its mean to within 0.35, not to within 0.035


def test_the_choice_is_by_the_posterior_mean_and_not_by_the_luckiest_observation():
    pytest.importorskip("botorch", reason="the extra shaping is not installed")
    line = torch.linspace(0, 1, 9)
    trials = [made((x, 1 - x), float(1 - 4 * (x - 0.5) ** 2), variance=1e-4) for x in line.tolist()]
    trials[0] = made((0.0, 1.0), 1.2, variance=4.0)  # the best that was seen, and all noise
    assert best(trials, SearchConfig())[0][0] == pytest.approx(0.5, abs=0.13)


# ---- what comes next ----


def test_a_search_goes_from_trials_to_reruns_to_the_final_run():
    config = SearchConfig(trials=3, initial=2, reruns=2, propose="random", rounds=4)
    found, kinds = [], []
    while (chosen := next_trial(found, config, THREE)) is not None:
        kind, w = chosen
        kinds.append(kind)
        value = [0.1, 0.9, 0.4][len(found)] if len(found) < 3 else 0.5
        found.append(made(w.tolist(), value, kind=kind, number=len(found)))
    assert kinds == ["search"] * 3 + ["rerun"] * 2 + ["final"] and over(found)
    assert found[0].weights == (1, 0, 0) and found[1].weights == (0, 1, 0)
    assert [t.weights for t in found[3:5]] == [found[1].weights, found[2].weights]
    assert found[5].weights == found[1].weights  # (0.9 + 0.5) / 2 against (0.4 + 0.5) / 2 and 0.1


def test_nothing_is_decided_while_other_processes_are_at_work():
    config = SearchConfig(trials=2, initial=2, reruns=1, propose="random")
    running = made((0, 1, 0), None, "running", number=1)
    assert next_trial([made((1, 0, 0), 1.0)], config, THREE)[0] == "search"
    assert next_trial([made((1, 0, 0), 1.0), running], config, THREE) is None
    assert not over([running])


def test_one_explainer_needs_no_search():
    config = SearchConfig()
    kind, w = next_trial([], config, ("shap",))
    assert kind == "final" and w.tolist() == [1.0]
    assert next_trial([made((1.0,), None, "running", "final")], config, ("shap",)) is None


def test_points_under_way_are_not_proposed_again():
    pytest.importorskip("botorch", reason="the extra shaping is not installed")
    config = SearchConfig(trials=9, initial=5)
    ended = [
        made((x, 1 - x), 1 - 4 * (x - 0.4) ** 2, number=i, variance=1e-4) for i, x in enumerate([0, 0.2, 0.5, 0.7, 1])
    ]
    (_, first) = next_trial(ended, config, ("final", "shap"))
    going = made(first.tolist(), None, "running", number=5)
    (_, second) = next_trial([*ended, going], config, ("final", "shap"))
    assert abs(float(first[0] - second[0])) > 0.01


def test_a_diverged_run_counts_as_worse_than_the_worst_and_uncertain():
    trials = [made((1, 0), 3.0), made((0, 1), 1.0), made((0.5, 0.5), None, "diverged", variance=None)]
    points, values, variances = observations(trials)
    spread = torch.tensor([3.0, 1.0]).std().item()
    assert values.tolist() == pytest.approx([3.0, 1.0, 1.0 - spread]) and len(points) == 3
    assert variances.tolist() == pytest.approx([0.01, 0.01, spread**2])
    alone = observations([made((1, 0), None, "diverged", variance=None)])
    assert alone[1].tolist() == [-1.0] and alone[2].tolist() == [1.0]


def test_the_median_rule():
    config = SearchConfig(rounds=4, stop_early=0.5)
    earlier = [made((1, 0), 0.0, curve=[level] * 4) for level in (1.0, 2.0, 3.0)]
    assert hopeless([1.5, 1.5], earlier, config)
    assert not hopeless([1.5], earlier, config)  # too early to tell
    assert not hopeless([2.5, 2.5], earlier, config)
    assert not hopeless([1.5, 1.5], earlier[:2], config)  # too few to compare with
    assert not hopeless([1.5, 1.5], earlier, dataclasses.replace(config, stop_early=None))
    assert not hopeless([1.5, 1.5], [dataclasses.replace(t, status="running") for t in earlier], config)


@pytest.mark.parametrize("wrong", [{"trials": 0}, {"stop_early": 0.0}, {"kl": -1.0}, {"reruns": -1}])
def test_settings_outside_their_range_are_refused(wrong):
    with pytest.raises(UserError, match="search." + next(iter(wrong))):
        SearchConfig(**wrong)


@pytest.mark.parametrize(
    ("weights", "says"), [((0.5, 0.6), "sum to 1.1"), ((1.0,), "1 numbers for 2"), ((1.5, -0.5), "sum to 1")]
)
def test_weights_that_are_off_the_simplex_are_refused(weights, says):
    with pytest.raises(UserError, match=says):
        ShapingConfig(("final", "shap"), weights)


# ---- the store ----


def numbered(trials):
    return ("search", [len(trials) / 10, 1 - len(trials) / 10])


def test_claims_of_many_processes_are_all_different(tmp_path):
    def work(i):
        store = TrialStore(tmp_path / "trials.sqlite", "d")
        return [store.claim(f"p{i}", [], lambda trials: numbered(trials), 600).number if n == 0 else
                store.claim(f"p{i}-{n}", [], numbered, 600).number for n in range(5)]  # fmt: skip

    with ThreadPoolExecutor(6) as pool:
        numbers = [n for part in pool.map(work, range(6)) for n in part]
    assert sorted(numbers) == list(range(30))
    assert [t.number for t in TrialStore(tmp_path / "trials.sqlite", "d").trials()] == list(range(30))


def test_a_process_repeats_what_it_had_not_finished_with_the_same_weights(tmp_path):
    store = TrialStore(tmp_path / "trials.sqlite", "d")
    first = store.claim("me", [], numbered, 600)
    store.record(dataclasses.replace(first, status="finished", objective=1.0), "me")
    second = store.claim("me", [0], numbered, 600)
    again = store.claim("me", [], lambda trials: pytest.fail("nothing new is chosen"), 600)
    assert again.number == 0 and again.weights == first.weights and again.status == "running"
    assert store.claim("me", [0], numbered, 600).number == second.number == 1


def test_a_trial_that_was_left_goes_to_another_process_after_its_lease(tmp_path):
    store = TrialStore(tmp_path / "trials.sqlite", "d")
    left = store.claim("gone", [], numbered, 600)
    assert store.claim("me", [], numbered, 600).number == 1
    with sqlite3.connect(store.path) as db:
        db.execute("UPDATE trials SET heard = heard - 700 WHERE number = 0")
    taken = store.claim("me", [1], numbered, 600)
    assert taken.number == 0 and taken.weights == left.weights
    store.heard(0)
    assert store.claim("third", [], numbered, 600).number == 2


def test_a_failed_claim_leaves_the_file_as_it_was(tmp_path):
    store = TrialStore(tmp_path / "trials.sqlite", "d")
    store.claim("me", [], numbered, 600)
    with pytest.raises(ZeroDivisionError):
        store.claim("you", [], lambda trials: 1 / 0, 600)
    assert len(store.trials()) == 1 and store.claim("you", [], numbered, 600).number == 1


def test_a_checkpoint_brings_back_what_the_file_lacks_and_no_more(tmp_path):
    store = TrialStore(tmp_path / "trials.sqlite", "d")
    store.record(made((1, 0), 5.0, number=0), "me")
    store.restore([made((1, 0), 9.0, number=0), made((0, 1), 2.0, number=1)], "me")
    assert [t.objective for t in store.trials()] == [5.0, 2.0]


def test_a_store_of_another_search_or_none_at_all_is_refused(tmp_path):
    TrialStore(tmp_path / "trials.sqlite", "d")
    with pytest.raises(UserError, match="trials of another recipe"):
        TrialStore(tmp_path / "trials.sqlite", "e")
    (tmp_path / "text").write_text("no database, but long enough to be read as one" * 50)
    with pytest.raises(UserError, match="no store of trials"):
        TrialStore(tmp_path / "text", "d")
