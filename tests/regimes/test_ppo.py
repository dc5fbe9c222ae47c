"""MT-PPO on a tiny policy: what the critic expects, what tokens are credited with, the value loss in closed form."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from made_rollouts import rollout

from lit_reason.cli.reason_cli import build
from lit_reason.core.critic_config import CriticConfig
from lit_reason.core.metrics_log import read_metrics
from lit_reason.core.run_folder import run_folder
from lit_reason.errors import UserError
from lit_reason.rollout.policy_pack import policy_packs
from lit_reason.rollout.trajectory import NOT_SAMPLED, Trajectory


def run(folder, *options):
    plain = ["--model.lm.overrides.attention_dropout=0.0", "--trainer.max_steps=2"]
    return build("fit", ["--config", "smoke/ppo", f"--vars.folder={folder}", *plain, *options])


def model(folder, *options):
    built = run(folder, *options)
    built.model.trainer = built.trainer
    built.model.configure_model()
    return built.model.eval()


ROLLOUT = rollout([0.5, 0.0, 0.25], 1.0)


def test_a_critic_that_knows_nothing_leaves_the_return_to_go(folder):
    (found,) = model(folder, "--model.critic.whiten=false").credited([ROLLOUT])
    assert found.advantage_T.tolist() == [0, 1.75, 1.75, 0, 1.25, 1.25, 0, 1.25, 1.25, 0]
    assert found.value_T.tolist() == [0.0] * 10
    assert found.target_value_T[[1, 4, 7]].tolist() == [1.75, 1.25, 1.25]


def test_all_rewards_at_the_end_are_the_control(folder):
    (found,) = model(folder, "--model.critic.whiten=false", "--model.critic.placement=end").credited([ROLLOUT])
    assert found.advantage_T[[1, 2, 4, 5, 7, 8]].tolist() == [1.75] * 6


def test_advantages_are_whitened_over_sampled_tokens_of_sound_rollouts(folder):
    found = model(folder).credited([ROLLOUT, rollout([0.0], 0.0), rollout([9.0], 9.0, failure="gone")])
    sampled = torch.cat([c.advantage_T[torch.tensor(c.trajectory.turn_id) >= 0] for c in found[:2]])
    assert float(sampled.mean()) == pytest.approx(0, abs=1e-9) and float(sampled.std()) == pytest.approx(1)
    assert not found[2].advantage_T.any()
    assert found[0].target_value_T[1] == 1.75  # what the critic is taught is not whitened


@pytest.mark.parametrize("trunk", ["shared", "separate"])
def test_the_value_is_that_of_the_state_before_the_token(folder, trunk):
    ppo = model(folder, f"--model.critic.trunk={trunk}", "--model.critic.whiten=false")
    torch.nn.init.normal_(ppo.critic.value.weight)
    (found,) = ppo.credited([ROLLOUT])
    trunk_lm = ppo.critic.trunk or ppo.lm
    with torch.no_grad():
        states = trunk_lm.hf(torch.tensor([ROLLOUT.ids]), output_hidden_states=True).hidden_states[-1][0]
        value = (states @ ppo.critic.value.weight[0]).double()
    torch.testing.assert_close(found.value_T[1:], value[:-1], rtol=0, atol=1e-4)
    sampled = torch.tensor(ROLLOUT.turn_id) >= 0
    returns = torch.tensor([0, 1.75, 1.75, 0, 1.25, 1.25, 0, 1.25, 1.25, 0], dtype=torch.float64)
    torch.testing.assert_close(found.target_value_T[sampled], returns[sampled], rtol=0, atol=1e-4)
    torch.testing.assert_close(found.advantage_T[sampled], (returns - found.value_T)[sampled], rtol=0, atol=1e-4)


@pytest.mark.parametrize("clip", [None, 0.2])
def test_the_value_loss_in_closed_form(folder, clip):
    ppo = model(folder, "--model.critic.weight=0.7")
    ppo.critic_config = dataclasses.replace(ppo.critic_config, clip=clip)
    torch.nn.init.normal_(ppo.critic.value.weight, std=0.1)
    (pack,) = policy_packs(ppo.credited([ROLLOUT]), 1, 1.0)
    pack.value += torch.tensor([0.0, 0.5, -0.5, 0.1, 0.0, 0.3])  # as if the critic had moved since
    hidden = ppo.lm.hidden(pack.ids, pack.positions, pack.cu_seqlens)
    value = ppo.critic.value(hidden)[pack.index, 0]
    errors = (value - pack.target_value) ** 2
    if clip is not None:
        held = torch.minimum(torch.maximum(value, pack.value - clip), pack.value + clip)
        errors = torch.stack([errors, (held - pack.target_value) ** 2]).max(0).values
    torch.testing.assert_close(ppo.further_loss(hidden, pack), 0.7 * 0.5 * errors.sum())


def test_critic_and_policy_both_learn_and_a_separate_critic_leaves_the_trunk_alone(folder):
    done = run(folder, "--model.critic.trunk=separate", "--trainer.max_steps=6", "--model.optim.lr=0.003")
    done.run_verb()
    critic = done.model.critic
    assert critic.value.weight.abs().max() > 1e-3 and critic.trunk is not done.model.lm
    names = {n for n, p in done.model.named_parameters() if p.requires_grad}
    assert any(n.startswith("critic.trunk.") for n in names) and any(n.startswith("lm.") for n in names)
    log = read_metrics(run_folder(done.trainer) / "metrics.csv")
    assert len(log.points("train/reward")) == 6


def test_a_reward_due_for_a_turn_without_room_goes_to_the_turn_before(folder):
    cut = rollout([0.5, 0.25], 1.0)
    short = Trajectory(
        **{**vars(cut), "turn_id": [NOT_SAMPLED, 0, 0, NOT_SAMPLED, NOT_SAMPLED, NOT_SAMPLED, NOT_SAMPLED]}
    )
    (found,) = model(folder, "--model.critic.whiten=false").credited([short])
    assert found.advantage_T[1:3].tolist() == [1.75, 1.75]


def test_many_rollouts_are_scored_in_packs_with_the_values_of_one(folder, monkeypatch):
    ppo = model(folder, "--model.critic.whiten=false", "--trainer.accumulate_grad_batches=2")
    torch.nn.init.normal_(ppo.critic.value.weight)
    rollouts = [rollout([0.5] * n, 1.0) for n in (3, 1, 2, 4)]
    alone = [ppo.credited([t])[0].value_T for t in rollouts]
    passes, hidden = [], type(ppo.lm).hidden
    monkeypatch.setattr(
        type(ppo.lm), "hidden", lambda lm, ids, *rest: (passes.append(len(ids)), hidden(lm, ids, *rest))[1]
    )
    for one, wanted in zip(ppo.credited(rollouts), alone, strict=True):
        torch.testing.assert_close(one.value_T, wanted, rtol=0, atol=1e-5)
    assert len(passes) == 2 and sum(passes) == sum(len(t.ids) for t in rollouts)


@pytest.mark.parametrize("trunk", ["shared", "separate"])
def test_values_are_those_without_dropout(folder, trunk):
    dropout = ["--model.lm.overrides.attention_dropout=0.5", f"--model.critic.trunk={trunk}"]
    ppo = model(folder, *dropout)
    torch.nn.init.normal_(ppo.critic.value.weight)
    wanted = ppo.eval().credited([ROLLOUT])[0].value_T
    assert torch.equal(ppo.train().credited([ROLLOUT])[0].value_T, wanted)
    assert all(module.training for module in ppo.modules())


def test_what_was_cut_off_is_worth_what_the_critic_expects_of_it(folder):
    ppo = model(folder, "--model.critic.whiten=false", "--model.policy.truncated=bootstrap", "--model.critic.gamma=0.5")
    torch.nn.init.normal_(ppo.critic.value.weight)
    whole, cut = rollout([0.5, 0.25], 1.0, between=0), rollout([0.5, 0.25], 1.0, between=0, finished=False)
    plain, more = (ppo.credited([t])[0].target_value_T[1:] for t in (whole, cut))
    with torch.no_grad():
        states = ppo.lm.hf(torch.tensor([cut.ids]), output_hidden_states=True).hidden_states[-1][0]
        beyond = float(ppo.critic.value(states[-1]))
    assert abs(beyond) > 0.01
    wanted = [beyond * 0.5**n for n in (4, 3, 2, 1)]
    torch.testing.assert_close(more - plain, torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-5)


def test_the_critic_has_a_rate_of_its_own(folder):
    rate = ["--model.critic.lr=0.5", "--model.critic.warmup=0.75", "--model.optim.lr=0.25", "--trainer.max_steps=2"]
    done = run(folder, *rate)
    done.run_verb()
    rates = {
        id(p): (g["initial_lr"], g.get("warmup")) for g in done.trainer.optimizers[0].param_groups for p in g["params"]
    }
    for name, p in done.model.named_parameters():
        assert rates[id(p)] == ((0.5, 0.75) if name.startswith("critic.") else (0.25, None)), name
    assert len(rates) == len(list(done.model.parameters()))
    with pytest.raises(UserError, match="needs optim.optimizer adamw, not muon"):
        run(folder, "--model.critic.lr=0.5", "--model.optim.optimizer=muon").run_verb()


def test_discounts_outside_their_range_are_refused():
    with pytest.raises(UserError, match="critic.lam is 1.5"):
        CriticConfig(lam=1.5)
    with pytest.raises(UserError, match="critic.warmup is -0.1"):
        CriticConfig(warmup=-0.1)
