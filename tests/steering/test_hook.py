"""Directions are added where they should be and nowhere else, whatever way the model is run."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from tiny_steering import NORM, directions, llama, unit
from torch import nn

from lit_reason.errors import UserError
from lit_reason.models.config import AdapterConfig, ModelConfig
from lit_reason.models.language_model import LanguageModel
from lit_reason.steering.collect import collected
from lit_reason.steering.config import SteerConfig
from lit_reason.steering.direction_file import model_facts
from lit_reason.steering.hook import SteeringHook

STEER = SteerConfig(mix={"a": 1.0}, strength=0.8)
IDS = torch.tensor([[5, 9, 13, 2, 30], [7, 7, 21, 8, 1]])


@pytest.fixture(scope="module")
def model():
    return llama()


def logits(model, ids=IDS, **inputs):
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


def greedy(model, ids, n=6, **settings):
    return model.generate(
        input_ids=ids, max_new_tokens=n, do_sample=False, pad_token_id=0, output_logits=True,
        return_dict_in_generate=True, **settings,
    )  # fmt: skip


def test_a_token_direction_raises_its_logit_by_the_square_of_its_length():
    """Blocks that do nothing, no final norm, a tied head: h + alpha E[t] gives logit t more by alpha |E[t]|^2."""
    model = llama(tie_word_embeddings=True)
    for name, weight in model.named_parameters():
        if "o_proj" in name or "down_proj" in name:
            weight.data.zero_()
    model.model.norm = nn.Identity()
    embedding = model.get_input_embeddings().weight.detach()
    there = directions(model, layer=2)
    there = replace(there, vectors={"t": embedding[17].float()})
    hook = SteeringHook(model, there, SteerConfig(mix={"t": 1.0}, strength=0.3, unit="raw"))
    bare = logits(model)
    with hook:
        gain = logits(model) - bare
    torch.testing.assert_close(
        gain[..., 17], torch.full((2, 5), 0.3 * float(embedding[17] @ embedding[17])).double(), rtol=1e-6, atol=1e-6
    )


def test_no_strength_and_no_hook_are_bit_equal_to_the_bare_model(model):
    bare = logits(model)
    with SteeringHook(model, directions(model), replace(STEER, strength=0.0)):
        assert torch.equal(logits(model), bare)
    hook = SteeringHook(model, directions(model), STEER)
    with hook:
        assert not torch.equal(logits(model), bare)
    assert torch.equal(logits(model), bare)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(ZeroDivisionError), hook:
        raise ZeroDivisionError
    assert torch.equal(logits(model), bare)


@pytest.mark.parametrize("pieces", [None, 3])
@pytest.mark.parametrize("keep_norm", [False, True])
def test_a_cache_changes_nothing(model, pieces, keep_norm):
    with SteeringHook(model, directions(model, pieces=pieces, first=1), replace(STEER, keep_norm=keep_norm)):
        cached, plain = greedy(model, IDS, use_cache=True), greedy(model, IDS, use_cache=False)
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        STEER,
        replace(STEER, first_position=1, last_position=3),
        replace(STEER, phases="prompt"),
        replace(STEER, phases="generation"),
    ],
    ids=["all", "positions", "prompt", "generation"],
)
@pytest.mark.parametrize("pieces", [None, 2])
def test_left_padded_prompts_are_as_if_alone(model, config, pieces):
    rows = [[5, 9, 13, 2, 30], [7, 21], [8, 1, 3]]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    with SteeringHook(model, directions(model, pieces=pieces), config):
        together = greedy(model, ids, attention_mask=mask)
        for n, row in enumerate(rows):
            alone = greedy(model, torch.tensor([row]))
            assert torch.equal(alone.sequences[0, len(row) :], together.sequences[n, width:])
            torch.testing.assert_close(
                torch.stack(alone.logits)[:, 0], torch.stack(together.logits)[:, n], rtol=1e-5, atol=1e-5
            )


@pytest.mark.parametrize("config", [STEER, replace(STEER, first_position=1, last_position=2)], ids=["all", "positions"])
@pytest.mark.parametrize("pieces", [None, 2])
def test_packed_rows_are_as_if_alone(tmp_path, config, pieces):
    model = llama()
    model.float().save_pretrained(tmp_path)
    lm = LanguageModel.load(ModelConfig(path=str(tmp_path), dtype="float32")).eval()
    rows = [[5, 9, 13, 2, 30], [7, 21], [8, 1, 3]]
    flat, at = torch.tensor([i for r in rows for i in r]), torch.tensor([i for r in rows for i in range(len(r))])
    hook = SteeringHook(lm.base, directions(lm.base, pieces=pieces), config)
    mixes = [{"a": 1.0}, {"b": -0.5}, {"a": 0.3, "b": 1.0}]
    with torch.no_grad(), hook:
        packed = lm.hidden(flat, at, torch.tensor([0, 5, 7, 10]))
        alone = [lm.base.model(input_ids=torch.tensor([r])).last_hidden_state[0] for r in rows]
        torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-4, atol=1e-4)
        hook.set_rows(mixes)
        packed = lm.hidden(flat, at, torch.tensor([0, 5, 7, 10]))
        for r, mix, got in zip(rows, mixes, packed.split([5, 2, 3]), strict=True):
            hook.set_mix(mix)
            torch.testing.assert_close(
                lm.base.model(input_ids=torch.tensor([r])).last_hidden_state[0], got, rtol=1e-4, atol=1e-4
            )


def test_rows_have_mixes_of_their_own(model):
    hook, mixes = SteeringHook(model, directions(model), STEER), [{"a": 1.0}, {"b": 2.0, "a": -0.5}]
    with hook:
        hook.set_rows(mixes)
        together, texts = logits(model), greedy(model, IDS).sequences
        for n, mix in enumerate(mixes):
            hook.set_mix(mix)
            torch.testing.assert_close(logits(model, IDS[n : n + 1])[0], together[n])
            assert torch.equal(greedy(model, IDS[n : n + 1]).sequences[0], texts[n])
        hook.set_rows(mixes)
        with pytest.raises(UserError, match="2 mixes were set for rows"):
            logits(model, IDS[:1])


def test_a_sum_of_directions_is_two_hooks(model):
    there = directions(model)
    both = SteeringHook(model, there, replace(STEER, mix={"a": 0.7, "b": -0.4}))
    one, two = (SteeringHook(model, there, replace(STEER, mix=m)) for m in ({"a": 0.7}, {"b": -0.4}))
    with both:
        summed = logits(model)
    with one, two:
        torch.testing.assert_close(logits(model), summed, rtol=1e-6, atol=1e-6)


def test_a_constant_is_the_bias_of_the_block_s_last_layer(model):
    there, other = directions(model), llama(mlp_bias=True)
    other.load_state_dict(model.state_dict(), strict=False)
    for name, weight in other.named_parameters():
        if name.endswith("bias"):
            weight.data.zero_()
    other.model.layers[1].mlp.down_proj.bias.data += 0.8 * NORM * unit(there.vectors["a"])
    with SteeringHook(model, there, STEER):
        torch.testing.assert_close(logits(model), logits(other), rtol=1e-5, atol=1e-5)


def added(model, config, there=None, **inputs):
    """What a hook adds at each position of its layer."""
    there = there or directions(model)
    inputs = {"input_ids": IDS, **inputs}
    with torch.no_grad(), collected(model, [there.layer]) as states:
        model(**inputs)
    before = states[there.layer]
    with torch.no_grad(), SteeringHook(model, there, config), collected(model, [there.layer]) as states:
        model(**inputs)
    return states[there.layer] - before, before


def test_units(model):
    there = directions(model)
    gap, _ = added(model, STEER)
    torch.testing.assert_close(
        gap, (0.8 * NORM * unit(there.vectors["a"])).double().expand_as(gap), rtol=1e-5, atol=1e-5
    )
    raw, _ = added(model, replace(STEER, unit="raw"))
    torch.testing.assert_close(raw, (0.8 * there.vectors["a"]).double().expand_as(raw), rtol=1e-5, atol=1e-5)
    capped, _ = added(model, replace(STEER, max_norm=0.25))
    torch.testing.assert_close(
        capped, (0.25 * NORM * unit(there.vectors["a"])).double().expand_as(gap), rtol=1e-5, atol=1e-5
    )
    assert torch.equal(added(model, replace(STEER, max_norm=9.0))[0], gap)


def test_the_file_s_strength_is_meant_where_none_is_given_and_only_in_its_unit(model):
    there = directions(model, strength=0.4, unit="residual_norm")
    silent = replace(STEER, strength=None)
    torch.testing.assert_close(added(model, silent, there)[0], added(model, STEER, there)[0] / 2)
    for file, config in ((there, replace(silent, unit="raw")), (directions(model, strength=None), silent)):
        with pytest.raises(UserError, match=f"strength is missing, .* none of its own in the unit {config.unit}"):
            SteeringHook(model, file, config)


def test_lengths_are_kept_where_asked(model):
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    gap, before = added(model, replace(STEER, keep_norm=True), attention_mask=mask)
    torch.testing.assert_close((before + gap).norm(dim=-1), before.norm(dim=-1), rtol=1e-6, atol=1e-6)
    assert gap[0, 0].abs().max() == 0 and gap[0, 1].abs().max() > 0.01


def test_a_segment_lies_on_the_positions_it_came_from(model):
    there = directions(model, pieces=2, first=2)
    gap, _ = added(model, STEER, there)
    wanted = 0.8 * NORM * there.vectors["a"] * 2**0.5 / there.vectors["a"].norm()
    torch.testing.assert_close(gap[0, 2:4], wanted.double(), rtol=1e-5, atol=1e-5)
    assert gap[:, [0, 1, 4]].abs().max() == 0


@pytest.mark.parametrize(("phase", "moved"), [("prompt", True), ("generation", False)])
def test_a_prompt_of_one_token_is_a_prompt(model, phase, moved):
    ids = torch.tensor([[7]])
    bare = greedy(model, ids).logits[0]
    with SteeringHook(model, directions(model), replace(STEER, phases=phase)):
        first = greedy(model, ids).logits[0]
    assert torch.equal(bare, first) != moved


def test_without_a_cache_phases_must_be_told(model):
    hook = SteeringHook(model, directions(model), replace(STEER, phases="generation"))
    with hook:
        with pytest.raises(UserError, match="nothing says which tokens of this pass are generated"):
            logits(model, use_cache=False)
        hook.generated_BT = torch.tensor([[False, False, False, True, True]])
        with collected(model, [1]) as steered:
            logits(model, use_cache=False)
    with collected(model, [1]) as bare:
        logits(model)
    gap = (steered[1] - bare[1]).abs().amax(-1)
    assert gap[:, :3].max() == 0 and gap[:, 3:].min() > 0.01


@pytest.mark.parametrize(
    "adapter", [AdapterConfig(rank=2), AdapterConfig(rank=2, quantize="nf4")], ids=["lora", "4-bit"]
)
def test_adapters_and_four_bits(tmp_path, adapter):
    llama(hidden_size=64, intermediate_size=64).float().save_pretrained(tmp_path)
    lm = LanguageModel.load(ModelConfig(path=str(tmp_path), dtype="bfloat16", adapter=adapter)).eval()
    there = directions(lm.base)
    gap, before = added(lm.base, STEER, there)
    assert gap.dtype == before.dtype
    torch.testing.assert_close(
        gap.float(),
        (0.8 * NORM * unit(there.vectors["a"])).expand_as(gap).float(),
        rtol=0,
        atol=0.05 * float(before.abs().max()),
    )
    with SteeringHook(lm.base, there, STEER) as hook, torch.no_grad():
        lm.hf(input_ids=IDS)
    assert hook.passes == 1


@pytest.mark.parametrize(
    ("vectors", "mix", "told"),
    [
        ({"a": [1, 0], "b": [-1, 1e-3]}, {"a": 1.0, "b": 1.0}, "the sum of a, b is 0% as long"),
        ({"a": [1, 0], "b": [1, 0]}, {"a": 1.0, "b": -0.6}, "the sum of a, b is 34% as long"),  # .4 / sqrt(1.36)
        ({"a": [1, 0], "b": [-0.5, 0.87], "c": [-0.5, -0.87]}, {"a": 1.0, "b": 1.0, "c": 1.0}, "of a, b, c is 0%"),
        ({"a": [1, 0], "b": [-0.45, 0.89], "c": [0, 1]}, {"a": 1.0, "b": 1.0, "c": 0.0}, None),
        ({"a": [1, 0], "b": [-1, 0]}, {"a": 1.0, "b": -1.0}, None),
        ({"a": [1, 0]}, {"a": 0.0}, None),
    ],
    ids=["opposite", "opposite weights", "three at 120 degrees", "cosine -0.45", "one wish", "no weight"],
)
def test_wishes_that_cancel_are_told(vectors, mix, told):
    model = llama(hidden_size=2, num_attention_heads=1)
    there = replace(directions(model), vectors={n: torch.tensor(v).float() for n, v in vectors.items()})
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        SteeringHook(model, there, replace(STEER, mix=mix)).set_rows([{"a": 1.0}, mix])
    assert [told in str(w.message) for w in heard] == [True, True] if told else not heard


def test_a_pass_whose_padding_nothing_tells_is_refused(model):
    with SteeringHook(model, directions(model), STEER), pytest.raises(UserError, match="none of rows and tokens"):
        logits(model, attention_mask=torch.ones(2, 1, 5, 5, dtype=torch.bool).tril())


def test_act_add_lies_at_the_front_wherever_texts_were_read(model):
    gap, _ = added(model, STEER, directions(model, pieces=2, first=3, method="act_add"))
    assert gap[:, :2].abs().min() > 0 and gap[:, 2:].abs().max() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mix": {"aa": 1.0}}, r"no direction is called 'aa' \(did you mean 'a'\?\); the file has: a, b"),
        ({"strength": float("nan")}, "strength is nan"),
        ({"max_norm": 0.0}, "max_norm is 0.0; it must be above 0"),
        ({"first_position": 3, "last_position": 2}, "positions 3 to 2 are no range"),
    ],
)
def test_wrong_settings_are_named(model, change, message):
    with pytest.raises(UserError, match=message):
        SteeringHook(model, directions(model), replace(STEER, **change))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {"hidden_size": 16, "intermediate_size": 16},
            "the directions are 32 wide and belong to tiny; this model is 16 wide",
        ),
        ({"num_hidden_layers": 4}, "another model, tiny: its num_hidden_layers is 3, here it is 4"),
        ({"vocab_size": 41}, "another model, tiny: its vocab_size is 40, here it is 41"),
        ({"seed": 1}, "other weights of this shape.*other_weights"),
    ],
)
def test_directions_of_another_model_are_refused(model, other, message):
    there, stranger = directions(model), llama(**other)
    with pytest.raises(UserError, match=message):
        SteeringHook(stranger, there, STEER)
    if "seed" in other:
        SteeringHook(stranger, there, replace(STEER, other_weights=True))


def test_a_model_in_half_precision_is_the_same_model(model):
    half = llama().to(torch.bfloat16)
    assert model_facts(half)["sketch"] != model_facts(model)["sketch"]
    SteeringHook(half, directions(model), STEER)


FAMILIES = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "mistral": {"num_key_value_heads": 1, "head_dim": 16},
    "gemma2": {"num_key_value_heads": 1, "head_dim": 16, "pad_token_id": None},
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_other_families(kind):
    """Of the paper's models: padded and cached generation is as if alone and without a cache, and it is steered."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    fields = {"model_type": kind, "vocab_size": 40, "bos_token_id": None, "eos_token_id": None}
    fields |= FAMILIES[kind] if kind == "gpt2" else sizes | FAMILIES[kind]
    lm = LanguageModel.load(ModelConfig(config=fields, dtype="float32")).eval()
    ids, mask = torch.tensor([[0, 0, 5, 9, 3], [1, 7, 2, 4, 8]]), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    bare = greedy(lm.hf, ids, attention_mask=mask)
    with SteeringHook(lm.base, directions(lm.base), STEER) as hook:
        cached = greedy(lm.hf, ids, attention_mask=mask)
        plain = greedy(lm.hf, ids, attention_mask=mask, use_cache=False)
        alone = greedy(lm.hf, ids[:1, 2:])
    assert hook.passes == 18
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.stack(cached.logits)[:, 0], torch.stack(alone.logits)[:, 0], rtol=1e-4, atol=1e-5)
    assert (cached.logits[0] - bare.logits[0]).abs().max() > 1e-3
