"""A round in whole runs: resampling, rewards of the recipe and of a subclass, the alarm, whitening over the batch."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import pytest
import torch
from made_rollouts import rollout

from lit_reason.cli.reason_cli import build
from lit_reason.core.metrics_log import read_metrics
from lit_reason.core.run_folder import run_folder
from lit_reason.errors import UserError
from lit_reason.metrics.means import Means
from lit_reason.regimes.grpo.regime import GRPORegime
from lit_reason.rollout.trajectory import NOT_SAMPLED, read_ledger
from lit_reason.rollout.verify import inconsistencies


def run(folder, *options):
    plain = ["--model.lm.overrides.attention_dropout=0.0", "--trainer.max_steps=2", "--model.dialogue.keep_every=1"]
    done = build("fit", ["--config", "smoke/grpo", f"--vars.folder={folder}", *plain, *options])
    done.run_verb()
    return done


def ledger(done):
    return list(read_ledger(run_folder(done.trainer) / "rollouts.jsonl"))


def figure(done, name):
    return [value for _, value in read_metrics(run_folder(done.trainer) / "metrics.csv").points(f"train/{name}")]


def groups(rollouts, size=8):
    return [rollouts[i : i + size] for i in range(0, len(rollouts), size)]


def test_groups_without_spread_are_replaced_by_other_tasks_up_to_a_cap(folder):
    options = ["--data.batch_rows=4", "--trainer.max_steps=1"]  # an untrained student is rarely right
    plain, once, often = (run(folder, *options, f"--model.policy.resample={n}") for n in (0, 1, 6))
    dead = [figure(done, "dead_groups")[0] for done in (plain, once, often)]
    assert dead[0] > dead[2] and dead[0] >= dead[1] >= dead[2]
    assert figure(plain, "resampled") == [0.0]
    assert figure(once, "resampled") == [dead[0]]  # each dead group is tried once
    assert figure(often, "resampled")[0] > dead[0]
    before, after = groups(ledger(plain)), groups(ledger(once))
    assert len(after) == 4
    for n, (old, new) in enumerate(zip(before, after, strict=True)):
        assert {t.prompt for t in new} == {n}  # a group of its own, in the old one's place
        alive = len({(tuple(t.turn_rewards), t.outcome) for t in old}) > 1
        assert ([t.ids for t in old] == [t.ids for t in new]) == alive


def test_groups_that_stay_without_spread_count_in_the_divisor(folder):
    done = run(folder, "--data.env.rung_reward=0.0", "--data.env.outcome_reward=0.0", "--model.policy.resample=2")
    assert figure(done, "dead_groups") == [1.0, 1.0] and figure(done, "resampled") == [2.0, 2.0]
    (pack,) = done.model._packs
    assert pack.norm == sum(t.sampled for t in ledger(done)[64:])


def test_divergence_in_the_reward_is_paid_by_turn_and_recorded_by_name(folder):
    done = run(
        folder, "--model.policy.kl=0.5", "--model.policy.kl_in=reward", "--model.policy.kl_estimate=k1",
        "--model.optim.lr=0.05",
    )  # fmt: skip
    first, second = ledger(done)[:64], ledger(done)[64:]
    paid = [[terms["kl"] for t in rollouts for terms in t.turn_terms] for rollouts in (first, second)]
    assert max(map(abs, paid[0])) < 1e-4  # the policy is its own reference
    assert max(map(abs, paid[1])) > 0.01
    reference = build("fit", ["--config", "smoke/grpo", f"--vars.folder={folder}"]).model
    reference.trainer = done.trainer
    reference.configure_model()
    t = second[0]
    with torch.no_grad():
        log_p = reference.lm.eval().hf(torch.tensor([t.ids])).logits[0].log_softmax(-1)
    for k, terms in enumerate(t.turn_terms):
        at = [i for i, turn in enumerate(t.turn_id) if turn == k]
        kl = sum(t.logprob[i] - float(log_p[i - 1, t.ids[i]]) for i in at)
        assert terms["kl"] == pytest.approx(-0.5 * kl, abs=1e-4)
    assert (done.model._packs[0].ref_logp is None) and len(figure(done, "kl")) == 2


class Shorter(GRPORegime):
    """A method with a reward of its own: turns are paid for the first token's number."""

    def rewarded(self, rollouts):
        return [
            dataclasses.replace(t, turn_terms=[{"own": float(t.ids[t.turn_id.index(k)])} for k in range(len(t.stops))],
                                outcome_terms={})
            for t in rollouts
        ]  # fmt: skip


def test_a_subclass_brings_its_own_reward_and_figures_ledger_and_credit_see_it(folder):
    done = run(folder, "--model=test_policy_rounds.Shorter", "--trainer.max_steps=1", "--model.credit.scale=none")
    rollouts = ledger(done)
    assert all(set(terms) == {"own"} for t in rollouts for terms in t.turn_terms) and not rollouts[0].outcome_terms
    total = [sum(t.turn_rewards) for t in rollouts]
    assert figure(done, "reward") == [pytest.approx(sum(total) / 64)]
    t, others = rollouts[0], rollouts[1:8]
    wanted = t.turn_rewards[1] - sum(o.turn_rewards[1] for o in others) / 7
    pack = done.model._packs[0]
    row = int(pack.rollout[pack.turn == pack.turn[1]][0])
    assert row == 0 and float(pack.advantage[1]) == pytest.approx(wanted, abs=1e-4)


def test_wrong_weights_in_the_sampler_raise_an_alarm_and_sound_ones_do_not(folder, monkeypatch):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*differ from the sampler's")
        sound = run(folder, "--trainer.max_steps=1")
    assert figure(sound, "logprob_gap")[0] < 1e-4
    from lit_reason.rollout.engine import Engine

    draw = Engine._draw
    monkeypatch.setattr(Engine, "_draw", lambda engine, logits, at: draw(engine, 0.2 * logits.roll(1, -1), at))
    with pytest.warns(UserWarning, match="trainer's log-probabilities differ from the sampler's by"):
        broken = run(folder, "--trainer.max_steps=1")
    assert figure(broken, "logprob_gap")[0] > 0.25


def test_the_trainers_own_probabilities_are_without_dropout(folder):
    done = run(
        folder, "--model.policy.importance=token", "--model.lm.overrides.attention_dropout=0.5",
        "--trainer.max_steps=1",
    )  # fmt: skip
    pack = done.model._packs[0]
    torch.testing.assert_close(pack.start_logp, pack.old_logp, rtol=0, atol=1e-5)
    assert done.model.lm.training


def test_the_return_whitened_over_the_batch(folder):
    """REINFORCE++: no groups; mean 0 and deviation 1 over all sampled tokens of sound rollouts."""
    options = ["--model.credit.rule=reinforce_pp", "--model.credit.scale=batch"]
    done = run(folder, *options, "--trainer.max_steps=1")
    advantage = done.model._packs[0].advantage
    assert float(advantage.mean()) == pytest.approx(0, abs=1e-5) and float(advantage.std()) == pytest.approx(
        1, abs=1e-4
    )
    rollouts = [
        rollout([1.0, 2.0], 3.0), rollout([0.0], 1.0, prompt=1), rollout([9.0], 9.0, prompt=1, failure="gone")
    ]  # fmt: skip
    found = done.model.credited(rollouts)
    raw = torch.tensor([6.0, 6.0, 5.0, 5.0, 1.0, 1.0], dtype=torch.float64)
    sampled = torch.cat([c.advantage_T[torch.tensor(c.trajectory.turn_id) != NOT_SAMPLED] for c in found[:2]])
    torch.testing.assert_close(sampled, (raw - raw.mean()) / raw.std(), rtol=1e-6, atol=0)
    assert not found[2].advantage_T.any()
    with pytest.raises(UserError, match="set credit.scale to batch"):
        run(folder, "--model.credit.rule=reinforce_pp")


def test_what_needs_a_critic_is_refused_without_one(folder):
    with pytest.raises(UserError, match="bootstrap asks a critic"):
        run(folder, "--model.policy.truncated=bootstrap")


def test_validation_plays_as_many_tasks_as_there_are_whatever_a_round_has(folder):
    done = run(
        folder, "--data.batch_rows=2", "--data.val_count=5", "--trainer.val_check_interval=1",
        "--trainer.check_val_every_n_epoch=null", "--trainer.num_sanity_val_steps=0",
    )  # fmt: skip
    log = read_metrics(run_folder(done.trainer) / "metrics.csv")
    assert len(log.points("val/reward")) == 2 and {t.rollout for t in ledger(done)} == set(range(8))


def test_every_reward_is_logged_by_its_name_as_a_mean_over_rollouts(folder):
    done = run(folder, "--data.env.coin_reward=0.25", "--trainer.max_steps=1")
    played = ledger(done)
    for name in ("right", "coin", "all_right"):
        paid = [sum(d.get(name, 0.0) for d in (*t.turn_terms, t.outcome_terms)) for t in played]
        assert figure(done, f"paid/{name}") == [pytest.approx(sum(paid) / 64, abs=1e-5)]


def test_a_reward_counts_with_nothing_where_it_was_not_paid():
    here, there = Means(("reward",)), Means(("reward",))
    for meter, terms in ((here, [None, "late", None]), (there, ["first"])):
        for term in terms:
            meter.also([term] if term else [], like="reward")
            meter.update("reward", [1.0, 1.0])
            for name in meter.names[1:]:
                meter.update(name, [3.0 if name == term else 0.0] * 2)
    for meter in (here, there):
        meter.also({*here.names, *there.names}, like="reward")  # as before figures of two processes are added up
    assert here.names == there.names == ("reward", "first", "late")
    assert {n: float(v) for n, v in here.compute().items()} == {"reward": 1.0, "first": 0.0, "late": 1.0}
    assert {n: float(v) for n, v in there.compute().items()} == {"reward": 1.0, "first": 3.0, "late": 0.0}
    here.reset()
    here.update("late", [5.0])
    assert {n: float(v) for n, v in here.compute().items()} == {"late": 5.0}


def test_the_test_verb_plays_tasks_of_its_own_and_keeps_the_rollouts(folder):
    done = build("test", ["--config", "smoke/grpo", f"--vars.folder={folder}", "--data.test_count=10",
                          "--model.sampling.temperature=0", "--model.dialogue.turn_tokens=3"])  # fmt: skip
    for _ in range(2):  # the second writes the file anew
        (figures,) = done.run_verb()
    played = list(read_ledger(run_folder(done.trainer) / "test-rollouts.jsonl"))
    assert [t.row_id for t in played] == [f"test-{i}" for i in range(256, 266)]  # 256 to train on, none to validate on
    right = [sum(terms["right"] for terms in t.turn_terms) for t in played]
    assert figures["test/paid/right"] == pytest.approx(sum(right) / 10)
    assert [inconsistencies(t) for t in played] == [[]] * 10


def test_coefficients_of_a_recipe_reach_the_advantages(folder):
    """Released code took weights of turn and outcome rewards and did not use them."""
    plain, doubled = (
        run(folder, "--model.credit.rule=mt_grpo", "--model.credit.scale=none", "--trainer.max_steps=1",
            f"--model.credit.turn_coef={c}")
        for c in (1.0, 2.0)
    )  # fmt: skip
    one, two = plain.model._packs[0], doubled.model._packs[0]
    rollouts = [t for t in ledger(plain)]
    turn = torch.tensor([sum(t.turn_rewards) for t in rollouts])
    gain = (turn - turn.view(-1, 8).mean(1).repeat_interleave(8))[torch.unique_consecutive(one.rollout)]
    first = [int((one.rollout == r).nonzero()[0]) for r in range(64)]
    lengths = sorted(range(64), key=lambda i: -len(rollouts[i].ids))  # the order in which rollouts are packed
    torch.testing.assert_close((two.advantage - one.advantage)[first], gain[lengths], rtol=0, atol=1e-5)
    assert gain.any()


def test_the_rule_of_the_docs_trains(folder, tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "regimes" / "grpo.md").read_text()
    code = page.split("```python\n# my_rules.py\n")[1].split("```")[0]
    assert len(code.splitlines()) <= 10
    (tmp_path / "my_rules.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    done = run(folder, "--model.credit.rule=my_rules:halved", "--trainer.max_steps=1")
    t, group = ledger(done)[0], ledger(done)[:8]
    own = t.turn_rewards[0] - sum(g.turn_rewards[0] for g in group) / 8
    wanted = own + 0.5 * (t.outcome - sum(g.outcome for g in group) / 8)
    assert float(done.model._packs[0].advantage[0]) == pytest.approx(wanted, abs=1e-5)
