"""Shaping end to end on a tiny policy: what tokens are paid, searches that are killed and go on, runs that go wrong."""

from __future__ import annotations

import multiprocessing

import pytest
import torch
from lightning.pytorch import Callback

from lit_reason.cli.reason_cli import build
from lit_reason.core.metrics_log import read_metrics
from lit_reason.core.run_folder import run_folder
from lit_reason.errors import UserError
from lit_reason.regimes.shaping.trial_store import TrialStore
from lit_reason.rollout.trajectory import NOT_SAMPLED

FIXED = ("--model.search=null", "--trainer.max_steps=2")
SEARCH = (
    *(
        "--model.search.trials=4",
        "--model.search.initial=2",
        "--model.search.rounds=2",
        "--model.search.final_rounds=3",
    ),
    *(
        "--model.search.stop_early=1.0",
        "--model.search.reruns=1",
        "--trainer.max_steps=-1",
        "--data.batch_rows=4",
        "--data.val_count=8",
    ),
)


def cli(folder, *options):
    plain = ["--model.lm.overrides.attention_dropout=0.0"]
    return build("fit", ["--config", "smoke/shaping", f"--vars.folder={folder}", *plain, *options])


def run(folder, *options, callback=None):
    built = cli(folder, *options)
    built.trainer.callbacks += [callback] if callback else []
    built.run_verb()
    return built


class Rollouts(Callback):
    """Keeps what was paid."""

    def setup(self, trainer, pl_module, stage):
        self.kept, credited = [], pl_module.credited
        pl_module.credited = lambda rollouts: self.keep(credited, rollouts)

    def keep(self, credited, rollouts):
        found = credited(rollouts)
        self.kept += list(zip(rollouts, found, strict=True))
        return found


def trials(done):
    return TrialStore(run_folder(done.trainer) / "trials.sqlite", done.model.digest).trials()


def losses(done):
    return dict(read_metrics(run_folder(done.trainer) / "metrics.csv").points("train/loss"))


# ---- what tokens are paid ----


def test_token_rewards_sum_to_the_score_and_reach_every_tokens_advantage(folder):
    seen = Rollouts()
    weights = "--model.shaping.weights=[0.25,0.75]"
    run(folder, *FIXED, weights, "--model.credit.scale=none", callback=seen)
    assert len(seen.kept) == 64
    for t, credited in seen.kept:
        sampled = torch.tensor(t.turn_id) != NOT_SAMPLED
        paid = torch.tensor(t.token_rewards, dtype=torch.float64)
        assert float(paid.sum()) == pytest.approx(t.outcome, abs=1e-5) and not paid[~sampled].any()
        first = int(sampled.nonzero()[0])
        group = [o for o, _ in seen.kept if (o.prompt, o.policy_version) == (t.prompt, t.policy_version) and o is not t]
        assert float(credited.advantage_T[first]) == pytest.approx(
            t.outcome - sum(o.outcome for o in group) / len(group), abs=1e-5
        )  # the reward to go from the first token on is the whole
    assert any(len(set(t.token_rewards)) > 3 for t, _ in seen.kept)


@pytest.fixture(scope="module")
def dense(folder):
    """A run on Shapley credit alone, and its rollouts."""
    seen = Rollouts()
    return run(folder, *FIXED, "--model.shaping.weights=[0,1]", callback=seen), seen


def test_planted_worths_are_paid_where_they_are_earned(dense):
    done, seen = dense
    worth = done.model.token_rewards.reward.token_V
    for t, _ in seen.kept:
        at = [i for i, k in enumerate(t.turn_id) if k != NOT_SAMPLED]
        for i in at[:-1]:
            assert t.token_rewards[i] == pytest.approx(float(worth[t.ids[i]]), abs=1e-6)


def test_the_full_return_makes_all_shapings_equal_to_the_sparse_reward(folder, dense):
    sparse, shaped = losses(run(folder, *FIXED, "--model.shaping.weights=[1,0]")), losses(dense[0])
    full = losses(run(folder, *FIXED, "--model.shaping.weights=[0,1]", "--model.shaping.credit=return"))
    assert full == pytest.approx(sparse, rel=1e-6) and shaped[0] != pytest.approx(sparse[0], rel=1e-3)


def test_a_critic_sees_token_rewards(folder):
    seen = Rollouts()
    critic = ["--model.critic.trunk=shared", "--model.critic.whiten=false", "--model.critic.lam=1.0"]
    run(folder, "--model.search=null", "--trainer.max_steps=1", *critic, callback=seen)
    for t, credited in seen.kept:  # the critic knows nothing yet: advantages are rewards to go
        to_go = torch.tensor(t.token_rewards, dtype=torch.float64).flip(0).cumsum(0).flip(0)
        sampled = torch.tensor(t.turn_id) != NOT_SAMPLED
        torch.testing.assert_close(credited.advantage_T[sampled], to_go[sampled], rtol=0, atol=1e-5)


def test_without_a_reward_the_environment_pays_and_is_explained(folder):
    """A ladder of one rung pays for the first word alone."""
    seen = Rollouts()
    ladder = ["--data.env=Ladder", '--data.env.symbols=[" a"," b"]', '--data.env.words=["1","2","3"]',
              "--data.env.rungs=1", "--data.env.coin_reward=0", "--data.env.outcome_reward=1"]  # fmt: skip
    options = ["--model.reward=null", "--model.shaping.weights=[0,1]", "--model.attribution.masking=delete"]
    run(
        folder,
        "--model.search=null",
        "--trainer.max_steps=1",
        *ladder,
        *options,
        "--model.dialogue.group=16",
        callback=seen,
    )
    paid = [t for t, _ in seen.kept if t.outcome > 0]
    assert paid and all(t.outcome == pytest.approx(1.7) for t in paid)
    alone = [t for t in paid if sum(r != 0 for r in t.token_rewards) >= 1]
    first = [next(r for r, k in zip(t.token_rewards, t.turn_id, strict=True) if k != NOT_SAMPLED) for t in alone]
    assert sum(first) / len(first) > 0.5


def test_answers_of_several_turns_are_refused(folder):
    ladder = ["--data.env=Ladder", '--data.env.symbols=[" a"]', "--data.env.rungs=2", "--model.dialogue.max_turns=2"]
    with pytest.raises(UserError, match="answers of one turn, and a rollout has 2"):
        run(folder, *FIXED, *ladder)


def test_weights_off_the_simplex_are_refused_by_name(folder):
    with pytest.raises(UserError, match="sum to 1.1"):
        cli(folder, "--model.shaping.weights=[0.5,0.6]")


# ---- searches ----


@pytest.fixture(scope="module")
def searched(folder):
    pytest.importorskip("botorch", reason="the extra shaping is not installed")
    saver = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps=1",
             "--trainer.callbacks.save_top_k=-1"]  # fmt: skip
    return run(folder, *SEARCH, *saver)


def test_a_search_runs_its_trials_a_rerun_and_the_final_run_from_the_start(searched):
    found = trials(searched)
    assert [t.kind for t in found] == ["search"] * 4 + ["rerun", "final"]
    assert [t.facts["rounds"] for t in found] == [2] * 5 + [3]
    assert searched.trainer.global_step == 13
    assert found[0].weights == (1.0, 0.0) and len({t.weights for t in found[:4]}) == 4
    assert found[4].weights in {t.weights for t in found[:4]} and found[5].weights in {t.weights for t in found[:4]}
    for t in found:
        assert t.status in ("finished", "stopped") and t.variance > 0
        assert {"score", "kl", "length", "seconds", "reward_calls", "sampled_tokens", "outer_seconds"} <= t.facts.keys()
        assert len(t.curve) == t.facts["rounds"]
    assert sum(t.facts["reward_calls"] for t in found) > 13 * 16


def test_every_inner_run_starts_from_the_initial_policy_and_an_optimizer_that_has_seen_nothing(folder):
    class Starts(Callback):
        """Whether each step begins with the first weights, and with how many states the optimizer."""

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            start = pl_module.inner._start
            same = all(torch.equal(p, start[name]) for name, p in pl_module.named_parameters())
            self.seen = [*getattr(self, "seen", []), (same, len(optimizer.state), optimizer.param_groups[0]["lr"])]

    watch = Starts()
    linear = ["--model.optim.schedule=linear", "--model.optim.warmup=0", "--model.optim.final_lr=0"]
    random = ["--model.search.propose=random", "--model.search.trials=2", "--model.search.reruns=0"]
    run(folder, *SEARCH, *random, *linear, callback=watch)
    assert [same for same, _, _ in watch.seen] == [True, False, True, False, True, False, False]
    assert [bool(states) for _, states, _ in watch.seen] == [False, True, False, True, False, True, True]
    assert [lr / 3e-3 for _, _, lr in watch.seen] == pytest.approx([1, 0, 1, 0, 1, 0.5, 0])  # a schedule for each


@pytest.mark.parametrize("step", [5, *(pytest.param(step, marks=pytest.mark.slow) for step in (6, 12))])
def test_a_search_that_was_killed_goes_on_bit_for_bit(folder, searched, step):
    """In the middle of a trial, behind its last round, and in the final run; in a folder without the old store."""
    (saved,) = run_folder(searched.trainer).glob(f"checkpoints/*step={step}.ckpt")
    rest = run(folder, *SEARCH, f"--ckpt_path={saved}")
    assert losses(rest) == {at: loss for at, loss in losses(searched).items() if at >= step}
    for ours, theirs in zip(rest.model.parameters(), searched.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    again = [(t.number, t.kind, t.weights, t.objective) for t in trials(rest)]
    assert again == [(t.number, t.kind, t.weights, t.objective) for t in trials(searched)]


@pytest.mark.slow
def test_a_killed_process_repeats_in_the_old_store_what_came_after_its_checkpoint(folder, searched, tmp_path):
    store = tmp_path / "trials.sqlite"
    store.write_bytes((run_folder(searched.trainer) / "trials.sqlite").read_bytes())
    (saved,) = run_folder(searched.trainer).glob("checkpoints/*step=5.ckpt")
    rest = run(folder, *SEARCH, f"--ckpt_path={saved}", f"--model.search.store={store}")
    assert losses(rest) == {at: loss for at, loss in losses(searched).items() if at >= 5}
    assert len(TrialStore(store, rest.model.digest).trials()) == 6


def test_one_explainer_goes_straight_to_the_final_run(folder):
    options = ["--model.shaping.explainers=[shap]", "--model.search.final_rounds=2", "--trainer.max_steps=-1"]
    done = run(folder, *options)
    assert [(t.kind, t.weights) for t in trials(done)] == [("final", (1.0,))] and done.trainer.global_step == 2


def test_a_diverged_inner_run_is_recorded_and_the_search_goes_on(folder):
    class Spoil(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 1:
                with torch.no_grad():
                    next(pl_module.parameters()).fill_(float("nan"))

    options = ["--model.search.trials=2", "--model.search.initial=2", "--model.search.rounds=2"]
    options += ["--model.search.final_rounds=1", "--model.search.propose=random", "--trainer.max_steps=-1"]
    done = run(folder, *options, callback=Spoil())
    found = trials(done)
    assert [t.status for t in found] == ["diverged", "finished", "finished"] and found[0].objective is None
    assert found[2].weights == found[1].weights and found[0].facts["rounds"] == 1
    assert all(p.isfinite().all() for p in done.model.parameters())


def _in_a_process(folder, store):
    options = (*SEARCH, "--model.search.propose=random", f"--model.search.store={store}")
    return run_folder(run(folder, *options).trainer)


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_share_a_search(folder, tmp_path):
    store = tmp_path / "shared.sqlite"
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        folders = pool.starmap(_in_a_process, [(folder, store)] * 2)
    digest = cli(folder, *SEARCH, "--model.search.propose=random").model.digest
    found = TrialStore(store, digest).trials()
    assert [t.kind for t in found] == ["search"] * 4 + ["rerun", "final"]
    assert all(t.status != "running" for t in found)
    steps = [max(dict(read_metrics(f / "metrics.csv").points("train/loss"))) + 1 for f in set(folders)]
    assert len(steps) == 2 and sum(steps) == 13  # no trial was run twice


def test_a_search_without_held_out_prompts_is_refused(folder):
    with pytest.raises(UserError, match="0 held-out tasks"):
        run(folder, *SEARCH, "--data.val_count=0")
