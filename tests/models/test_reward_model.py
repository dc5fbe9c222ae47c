"""Reward models: their score is that of plain transformers, wherever it is padded; adapters share one frozen base."""

from __future__ import annotations

import pytest
import torch
from tiny_models import fields, pack, tiny, word_tokenizer
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lit_reason.errors import UserError
from lit_reason.models.config import AdapterConfig, ModelConfig
from lit_reason.models.export import export_reward
from lit_reason.models.reward import RewardModel, use_adapter

END, PAD = 2, 5
TEXTS = [[7, 8, 9, 10, END], [11, 12, END], [13, 14, 15, 16, 17, 18, 19]]


def made(family: str = "llama", shared: bool = False, **changes) -> RewardModel:
    adapter = AdapterConfig(rank=4) if shared else None
    policy = tiny(family, changes=changes, adapter=adapter)
    reward = RewardModel.beside(policy, policy.config)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:  # adapters begin at zero; these have moved
                weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))) * 0.3)
    reward.lm.eval()
    return reward


def by_transformers(folder, texts, side):
    """Scores of a padded batch by plain transformers, ids alone told apart from padding."""
    longest = max(len(t) for t in texts)
    rows = [[PAD] * (longest - len(t)) + t if side == "left" else t + [PAD] * (longest - len(t)) for t in texts]
    ids = torch.tensor(rows)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    mask = (ids != PAD).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, 0]


@pytest.mark.parametrize(
    ("family", "shared"), [("llama", False), ("llama", True), ("qwen2", False), ("gpt2", False), ("gpt_neox", True)]
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_export_scores_as_we_do_on_either_side_of_padding(tmp_path, family, shared, side):
    reward = made(family, shared, pad_token_id=END)  # the model pads with its end token: the usual trap
    reward.mean, reward.std = 0.5, 2.0
    with torch.no_grad():
        ours = reward(*pack(*TEXTS))
    export_reward(reward, word_tokenizer(), tmp_path / "out", pad_id=PAD)
    torch.testing.assert_close(by_transformers(tmp_path / "out", TEXTS, side), ours, rtol=1e-4, atol=1e-4)
    assert ours.std() > 0.1
    again = RewardModel.load(ModelConfig(path=str(tmp_path / "out")))
    again.lm.eval()
    with torch.no_grad():
        torch.testing.assert_close(again(*pack(*TEXTS)), ours, rtol=1e-5, atol=1e-5)
    assert (again.mean, again.std) == (0.5, 2.0)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").pad_token_id == PAD


def test_neighbours_in_a_pack_change_nothing():
    reward = made()
    with torch.no_grad():
        together = reward(*pack(*TEXTS))
        alone = torch.cat([reward(*pack(text)) for text in TEXTS])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_token_rewards_are_differences_of_prefixes_and_sum_to_the_score():
    reward = made()
    with torch.no_grad():
        rewards = reward.token_rewards(*pack(*TEXTS))
        whole = reward(*pack(*TEXTS))
        prefixes = torch.cat([reward(*pack(TEXTS[0][: n + 1])) for n in range(len(TEXTS[0]))])
    ends = torch.tensor([0, 5, 8, 15])
    sums = torch.stack([rewards[a:b].sum() for a, b in zip(ends[:-1], ends[1:], strict=True)])
    torch.testing.assert_close(sums, whole, rtol=0, atol=1e-5)
    torch.testing.assert_close(rewards[:5], torch.diff(prefixes, prepend=torch.zeros(1)), rtol=0, atol=1e-5)


def test_policy_reward_and_reference_are_three_models_on_one_base():
    reward = made(shared=True)
    lm = reward.lm
    base = {name: w.clone() for name, w in lm.named_parameters() if "lora_" not in name}
    with torch.no_grad():
        policy = lm.hidden(*pack(*TEXTS))
        with reward.active():
            scored = lm.hidden(*pack(*TEXTS))
        with lm.as_reference() as reference:
            before = reference.hidden(*pack(*TEXTS))
        after = lm.hidden(*pack(*TEXTS))
    assert (policy - scored).abs().max() > 0.1 and (policy - before).abs().max() > 0.1
    assert (scored - before).abs().max() > 0.1
    assert torch.equal(policy, after)
    use_adapter(lm, "default")  # what a regime does: leaving the reference has frozen the reward's adapter
    reward(*pack(*TEXTS)).sum().backward()
    moved = {name for name, w in lm.named_parameters() if w.grad is not None and w.grad.abs().sum() > 0}
    assert moved and all(".reward." in name for name in moved)
    assert all(torch.equal(w, base[name]) and not w.requires_grad for name, w in lm.named_parameters() if name in base)
    assert all(w.requires_grad for name, w in lm.named_parameters() if "lora_" in name)


@pytest.mark.parametrize("shared", [False, True])
def test_a_restart_gives_back_the_first_weights_with_a_new_head(shared):
    reward = made(shared=shared)
    fresh = made(shared=shared)
    for model in (reward, fresh):
        model.restart(3)
    first = fresh(*pack(*TEXTS)).detach()
    with torch.no_grad():
        for name, weight in reward.lm.named_parameters():
            if not shared or ".reward." in name:
                weight.add_(0.5)
        reward.score.weight.add_(1.0)
    reward.mean = 7.0
    assert (reward(*pack(*TEXTS)) - first).abs().max() > 0.1
    reward.restart(3)
    assert torch.equal(reward(*pack(*TEXTS)), first) and reward.mean == 0.0
    reward.restart(4)
    assert not torch.equal(reward(*pack(*TEXTS)), first)


def test_the_first_head_has_the_deviation_of_the_paper():
    reward = made("qwen2", hidden_size=512, num_attention_heads=4, head_dim=128)
    assert float(reward.score.weight.detach().std()) == pytest.approx(513**-0.5, rel=0.15)
    assert not reward.lm.head.layer.weight.requires_grad, "an output layer that nothing reads would never be trained"


def test_a_classifier_of_several_labels_is_refused(tmp_path):
    from transformers import AutoConfig

    changes = fields("llama")
    config = AutoConfig.for_model(changes.pop("model_type"), **changes, num_labels=3)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="3 labels"):
        RewardModel.load(ModelConfig(path=str(tmp_path)))
