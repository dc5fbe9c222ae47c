"""GRPO end to end on a tiny policy: its gradient against the formula on plain logits, rounds, resumes, references."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from made_rollouts import rollout

from lit_reason.cli.reason_cli import build
from lit_reason.core.metrics_log import read_metrics
from lit_reason.core.policy_config import PolicyConfig
from lit_reason.core.policy_loss import policy_loss
from lit_reason.core.run_folder import run_folder
from lit_reason.credit.group import credit_rule
from lit_reason.errors import UserError

RECIPE = "smoke/grpo"


def cli(folder, *options, verb="fit"):
    plain = ["--model.lm.overrides.attention_dropout=0.0", "--trainer.max_steps=2"]
    return build(verb, ["--config", RECIPE, f"--vars.folder={folder}", *plain, *options])


def played(folder, *options):
    """A built run, and the packs of its first round."""
    built = cli(folder, "--model.dialogue.turn_tokens=3", "--data.env.rungs=3", *options)
    kept = []

    class Stop(Exception):
        pass

    def keep(batch, *rest):
        kept.append(built.model.play_round(batch))
        raise Stop

    built.model.training_step = keep
    with pytest.raises(Stop):
        built.trainer.fit(built.model, datamodule=built.datamodule)
    return built.model, kept[0]


def by_the_formula(model, pack, config: PolicyConfig, temperature):
    """The loss of a pack from whole logits and plain autograd, term by term as the papers write it."""
    logp, entropy, weight, rollout, turn = [], [], [], [], []
    hf = model.lm.hf.train()
    before = -2
    for n, (start, stop) in enumerate(zip(pack.cu_seqlens[:-1].tolist(), pack.cu_seqlens[1:].tolist(), strict=True)):
        log_p = (hf(pack.ids[None, start:stop]).logits[0].float() / temperature).log_softmax(-1)
        for t in range(start + 1, stop):
            if pack.weight[t] == 0:
                continue
            row = log_p[t - 1 - start]
            logp.append(row[pack.ids[t]])
            entropy.append(-(row.exp() * row).sum())
            weight.append(pack.weight[t])
            rollout.append(n)
            turn.append((turn[-1] if turn else 0) + (t != before + 1))  # turns are what observations lie between
            before = t
    assert len(logp) == pack.index.numel()
    logp, entropy, weight = torch.stack(logp), torch.stack(entropy), torch.stack(weight)
    A, old = pack.advantage, pack.old_logp
    if config.importance != "none":
        w = pack.start_logp - old
        if config.importance == "sequence":
            w = torch.stack([w[[r == n for r in rollout]].sum() for n in rollout])
        w = w.exp()
        A = A * (
            w * (w <= config.importance_cap) if config.beyond_cap == "mask" else w.clamp(max=config.importance_cap)
        )
        old = pack.start_logp
    r = (logp - old).exp()
    if config.ratio != "token":
        spans = rollout if config.ratio == "sequence" else turn
        r = torch.stack([(logp - old)[[s == span for s in spans]].mean().exp() for span in spans])
    if config.loss == "ppo":
        term = -torch.min(r * A, r.clamp(1 - config.clip_low, 1 + config.clip_high) * A)
    elif config.loss == "cispo":
        term = -r.detach().clamp(max=1 + config.clip_high) * A * logp
    else:
        term = -A * logp
    if config.kl and config.kl_in == "loss":
        d = pack.ref_logp - logp
        term = term + config.kl * (0.5 * d**2 if config.kl_estimate == "k2" else d.exp() - d - 1)
    return (weight * (term - config.entropy * entropy)).sum() / pack.norm


@pytest.mark.parametrize(
    "config",
    [
        PolicyConfig(),
        PolicyConfig(average="sequence", entropy=0.1),
        PolicyConfig(loss="cispo", average="constant", kl=0.3, clip_high=0.05),
        PolicyConfig(loss="reinforce", kl=0.2, kl_estimate="k2"),
        PolicyConfig(ratio="sequence", average="sequence", clip_low=0.02, clip_high=0.05),
        PolicyConfig(ratio="turn", clip_low=0.05, clip_high=0.1, dual_clip=None),
        PolicyConfig(importance="token", importance_cap=1.1),
        PolicyConfig(importance="sequence", importance_cap=1.05, beyond_cap="mask", ratio="sequence"),
    ],
    ids=lambda c: f"{c.loss}-{c.ratio}-{c.average}-{c.importance}",
)
def test_the_gradient_is_that_of_the_formula_on_plain_logits(folder, config):
    fields = [f"--model.policy.{name}={value}" for name, value in vars(config).items() if value is not None]
    flat = ["--model.credit.rule=traj_mr"] if config.ratio == "sequence" else []  # one advantage a span
    model, (pack,) = played(folder, "--model.sampling.temperature=1.3", *fields, *flat)
    torch.manual_seed(1)
    pack = dataclasses.replace(pack, old_logp=pack.old_logp + 0.3 * torch.randn(pack.old_logp.shape))  # off-policy
    if pack.start_logp is not None:
        pack.start_logp = pack.start_logp + 0.1 * torch.randn(pack.old_logp.shape)
    assert pack.index.numel() > 50 and pack.advantage.any()
    hidden = model.lm.hidden(pack.ids, pack.positions, pack.cu_seqlens)
    with torch.no_grad():
        now = model.lm.head(hidden[pack.index], pack.targets, temperature=1.3).logp_S
    out = model.lm.head(
        hidden[pack.index], pack.targets, pack.target_weight, temperature=1.3,
        loss=policy_loss(model.policy, pack, now),
    )  # fmt: skip
    (out.loss_sum / pack.norm).backward()
    ours = [p.grad.clone() for p in model.lm.parameters()]
    model.zero_grad()
    theirs = by_the_formula(model, pack, config, 1.3)
    torch.testing.assert_close(out.loss_sum / pack.norm, theirs, rtol=1e-4, atol=1e-6)
    theirs.backward()
    for mine, p in zip(ours, model.lm.parameters(), strict=True):
        torch.testing.assert_close(mine, p.grad, rtol=1e-3, atol=1e-6)


def test_sampler_and_policy_agree_before_the_first_update(folder):
    model, (pack,) = played(folder)
    hidden = model.lm.hidden(pack.ids, pack.positions, pack.cu_seqlens)
    with torch.no_grad():
        out = model.lm.head(hidden[pack.index], pack.targets)
    torch.testing.assert_close(out.logp_S, pack.old_logp, rtol=0, atol=1e-5)


def test_what_the_environment_said_is_seen_but_not_trained(folder):
    """Released code masked tool results from attention along with the loss."""
    model, (pack,) = played(folder)
    trained = set((pack.index + 1).tolist())
    first_row = range(int(pack.cu_seqlens[1]))
    said = [t for t in first_row if t not in trained and min(trained) < t < max(t for t in trained if t in first_row)]
    assert said, "an observation between two turns"
    with torch.no_grad():
        before = model.lm.hidden(pack.ids, pack.positions, pack.cu_seqlens)[pack.index]
        changed = pack.ids.clone()
        changed[said[0]] = (changed[said[0]] + 1) % 40
        after = model.lm.hidden(changed, pack.positions, pack.cu_seqlens)[pack.index]
    moved = {int(i) for i, gap in zip(pack.index, (after - before).abs().amax(1), strict=True) if gap > 1e-6}
    assert moved and min(moved) >= said[0] and max(moved) < pack.cu_seqlens[1]


def figures(run):
    return {
        name: dict(read_metrics(run_folder(run.trainer) / "metrics.csv").points(f"train/{name}"))
        for name in ("loss", "reward", "ratio")
    }


def test_later_updates_of_a_round_are_off_policy_and_a_resume_between_them_is_exact(folder):
    save = [
        "--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps=1",
        "--trainer.callbacks.save_top_k=-1", "--model.policy.updates=3", "--trainer.max_steps=6",
    ]  # fmt: skip
    whole = cli(folder, *save, "--model.lm.overrides.attention_dropout=0.1")
    whole.run_verb()
    wanted = figures(whole)
    assert len(wanted["loss"]) == 6 and len(wanted["reward"]) == 2  # two rounds of three updates
    for step in (1, 2, 3):
        (saved,) = run_folder(whole.trainer).glob(f"checkpoints/*step={step}.ckpt")
        rest = cli(folder, *save, "--model.lm.overrides.attention_dropout=0.1", f"--ckpt_path={saved}")
        rest.run_verb()
        assert figures(rest)["loss"] == {s: v for s, v in wanted["loss"].items() if s >= step}
        for a, b in zip(rest.model.parameters(), whole.model.parameters(), strict=True):
            assert torch.equal(a, b)


def test_the_ratio_moves_from_one_only_after_an_update(folder):
    run = cli(folder, "--model.policy.updates=2", "--trainer.max_steps=2", "--model.optim.lr=0.01")
    run.run_verb()
    ratio = figures(run)["ratio"]
    assert ratio[0] == pytest.approx(1.0, abs=1e-5) and abs(ratio[1] - 1.0) > 1e-3


@pytest.mark.parametrize("adapter", [[], ["--model.lm.adapter.rank=4"]])
def test_the_reference_is_the_model_before_training(folder, adapter):
    run = cli(folder, *adapter, "--model.policy.kl=0.1", "--model.optim.lr=0.01", "--trainer.max_steps=4")
    run.run_verb()
    model, pack = run.model, run.model._packs[0]
    start = cli(folder, *adapter).model
    start.trainer = run.trainer
    start.configure_model()
    with torch.no_grad():
        hidden = start.lm.eval().hidden(pack.ids, pack.positions, pack.cu_seqlens)
        wanted = start.lm.head(hidden[pack.index], pack.targets).logp_S
    torch.testing.assert_close(pack.ref_logp, wanted, rtol=0, atol=1e-5)
    assert model.lm.training and not torch.allclose(pack.ref_logp, pack.old_logp, atol=1e-3)


def test_rollouts_are_compared_with_sound_ones_of_their_own_task(folder):
    model = cli(folder, "--model.credit.rule=traj_mr", "--model.credit.scale=none").model
    rollouts = [
        rollout([1.0, 0.0], 2.0, between=0),
        rollout([9.0], 9.0, between=0, failure="out of reach"),
        rollout([0.0], 1.0, between=0),
        rollout([5.0], 0.0, between=0, prompt=1),
    ]
    found = [c.advantage_T.tolist() for c in model.credited(rollouts)]
    assert found == [[0, 1, 1, 1, 1], [0, 0, 0], [0, -1, -1], [0, 0, 0]]
    assert float(model.round_meter.compute()["dead_groups"]) == 0.5
    model.record_round(model.round_meter, rollouts)
    means = model.round_meter.compute()
    assert float(means["failed"]) == 0.25 and float(means["reward"]) == pytest.approx((3 + 1 + 5) / 3)


def test_a_lone_rollout_teaches_nothing_where_the_group_is_the_baseline(folder):
    run = cli(folder, "--model.dialogue.group=1", "--model.credit.rule=traj_mr", "--model.policy.entropy=0.0")
    before = [p.detach().clone() for p in _weights(run)]
    run.run_verb()
    for a, b in zip(before, run.model.lm.parameters(), strict=True):
        assert torch.equal(a, b)


def _weights(run):
    run.model.trainer = run.trainer
    run.model.configure_model()
    return list(run.model.lm.parameters())


def test_settings_that_cannot_work_are_refused(folder):
    with pytest.raises(UserError, match="policy.updates is 0"):
        PolicyConfig(updates=0)
    with pytest.raises(UserError, match="reinforce.*set policy.updates to 1"):
        PolicyConfig(loss="reinforce", updates=2)
    with pytest.raises(UserError, match="credit.rule is 'turn_rtgs'.*did you mean 'turn_rtg'"):
        credit_rule("turn_rtgs")
