"""The reward model: sharing the prompt changes nothing, prefixes in one pass, attention as ABC has it."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from lit_reason.errors import UserError
from lit_reason.rewards.attribution.attributor import Attributor
from lit_reason.rewards.attribution.config import AttributionConfig
from lit_reason.rewards.attribution.token_credit import mixed
from lit_reason.rewards.classifier import ClassifierReward
from lit_reason.rewards.planted import PlantedReward

GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
LLAMA = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
BERT = {
    "model_type": "bert",
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
PROMPT, RESPONSE = list(range(3, 13)), [20, 21, 22, 23, 24, 25, 26, 27]


@pytest.fixture(scope="module", params=["gpt2", "llama", "bert"])
def folder(request, tmp_path_factory):
    family = {"gpt2": GPT2, "llama": LLAMA, "bert": BERT}[request.param]
    torch.manual_seed(0)
    common = {"vocab_size": 61, "num_labels": 2, "pad_token_id": 0, "initializer_range": 0.3}
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(**family, **common))
    path = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(path)
    return path


def causal(folder):
    if "bert" in folder.name:
        pytest.skip("an encoder")
    return str(folder)


def logits(folder, ids):
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))).logits[0]


def batch(*responses):
    longest = max(len(r) for r in responses)
    ids = torch.tensor([[*PROMPT, *r, *[0] * (longest - len(r))] for r in responses])
    seen = torch.tensor([[True] * (len(PROMPT) + len(r)) + [False] * (longest - len(r)) for r in responses])
    return ids, seen


def test_scores_are_the_models_logits_with_right_padding(folder):
    reward = ClassifierReward(str(folder), label=1)
    ids, seen = batch(RESPONSE, RESPONSE[:3], [40])
    found = reward(ids, seen)
    for score, response in zip(found, (RESPONSE, RESPONSE[:3], [40]), strict=True):
        torch.testing.assert_close(score, logits(folder, [*PROMPT, *response])[1], rtol=1e-4, atol=1e-5)


def test_a_shared_prompt_changes_no_score_and_saves_its_tokens(folder):
    path = causal(folder)
    shared, alone = ClassifierReward(path), ClassifierReward(path, share_prompt=False)
    present = torch.rand((12, len(RESPONSE)), generator=torch.Generator().manual_seed(0)) < 0.5
    present[3] = False  # scored at the last token of the prompt itself
    ids = torch.tensor([[*PROMPT, *RESPONSE]]).expand(12, -1)
    seen = torch.cat([torch.ones((12, len(PROMPT)), dtype=torch.bool), present], 1)
    torch.testing.assert_close(shared(ids, seen), alone(ids, seen), rtol=1e-4, atol=1e-5)
    assert shared.tokens <= len(PROMPT) + 12 * (len(RESPONSE) + 1) < alone.tokens
    before = shared.tokens
    shared(ids, seen)
    assert shared.tokens - before <= 12 * (len(RESPONSE) + 1)  # the prompt is still known
    other = ids.clone()
    other[:, 0] = 50
    torch.testing.assert_close(shared(other, seen), alone(other, seen), rtol=1e-4, atol=1e-5)  # and forgotten in time


def test_prefixes_in_one_pass_are_the_scores_of_the_shortened_responses(folder):
    reward = ClassifierReward(causal(folder))
    found = reward.prefixes(torch.tensor([*PROMPT, *RESPONSE]), len(PROMPT))
    expected = torch.stack([logits(folder, [*PROMPT, *RESPONSE[:t]])[0] for t in range(len(RESPONSE) + 1)])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    credit = Attributor(["prefix"], AttributionConfig()).explain(reward, PROMPT, RESPONSE).credit_KT[0]
    steps = expected.diff().double()
    steps[-1] += expected[0]
    torch.testing.assert_close(credit, steps, rtol=0, atol=1e-4)


@pytest.mark.parametrize("b", [0.0, 0.8, 1.0])
def test_attention_and_final_mixed_are_abc(folder, b):
    """ABC: `(1 - b) r` at the last token and `b alpha_t r` everywhere, alpha the last layer's mean attention."""
    stored = torch.rand((1, 2, 4, 18, 18), generator=torch.Generator().manual_seed(3))  # a forward pass's attentions

    class Stored(PlantedReward):
        def attention(self, ids_L, start):
            return stored[0, -1].mean(0)[-1, start:]

    reward = Stored(61)
    found = Attributor(["final", "attention"], AttributionConfig()).explain(reward, PROMPT, RESPONSE)
    alpha = stored[0, -1, :, -1, len(PROMPT) :].mean(0)
    alpha = alpha / alpha.sum()
    expected = b * alpha * found.reward
    expected[-1] += (1 - b) * found.reward
    torch.testing.assert_close(mixed(torch.tensor([1 - b, b]), found.credit_KT), expected.double(), rtol=0, atol=1e-5)


def test_attention_is_the_models_last_layers_mean(folder):
    reward = ClassifierReward(str(folder))
    ids = torch.tensor([*PROMPT, *RESPONSE])
    found = reward.attention(ids, len(PROMPT))
    model = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        weights = model(input_ids=ids[None], output_attentions=True).attentions[-1][0]
    torch.testing.assert_close(found, weights.mean(0)[-1, len(PROMPT) :])
    assert reward.model.config._attn_implementation != "eager"


def test_a_reward_without_attention_and_a_model_that_is_none_are_refused(tmp_path):
    with pytest.raises(UserError, match="needs a reward model that attends"):
        Attributor(["attention"], AttributionConfig()).explain(PlantedReward(61), PROMPT, RESPONSE)
    with pytest.raises(UserError, match="is no sequence classifier"):
        ClassifierReward(str(tmp_path)).load()


def test_a_label_that_is_none_is_refused(folder):
    with pytest.raises(UserError, match="label is 2"):
        ClassifierReward(str(folder), label=2).load()
