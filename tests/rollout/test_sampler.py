"""The sampler against models whose next-token distribution is known."""

from __future__ import annotations

import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from rigged_model import WORDS, as_lm, bigram_llama, chain_llama, ids_of, random_llama, word_tokenizer
from transformers import GenerationConfig

from lit_reason.errors import UserError
from lit_reason.rollout.config import SamplingConfig
from lit_reason.rollout.sampler import sample

EOS = WORDS.index("<eos>")
PROMPTS = [ids_of(p) for p in ("a b c d", "q", "r so try 1 2 3", "q 4", "b", "c 5 6")]


def run(model, prompts, stop_ids=(EOS,), **settings):
    settings = {"max_new_tokens": 12, "temperature": 0.0, "top_p": 1.0, **settings}
    return sample(
        as_lm(model), word_tokenizer(), prompts, SamplingConfig(**settings), stop_ids=stop_ids, progress=False
    )


def test_a_known_chain_is_written_to_its_end_token():
    model = chain_llama("q <think> try 1 wait </think> so 5", "r 6 7")
    done = run(model, [ids_of("a b q"), ids_of("r")])
    assert [c.text for c in done] == ["<think> try 1 wait </think> so 5", "6 7"]
    assert done[0].ids == ids_of("<think> try 1 wait </think> so 5 <eos>")
    assert done[1].ids == ids_of("6 7 <eos>")  # nothing of the padding that fills the longer neighbour's time
    assert [(c.prompt_index, c.sample_index, c.closed_eos) for c in done] == [(0, 0, True), (1, 0, True)]


def test_a_loop_runs_to_the_limit_and_is_not_closed():
    (done,) = run(chain_llama("q a b a"), [ids_of("q")], max_new_tokens=7)
    assert (done.text, done.closed_eos, len(done.ids)) == ("a b a b a b a", False, 7)


def test_any_of_several_end_tokens_ends_a_sequence():
    done = run(chain_llama("q 1 2 3", "r 4 8"), [ids_of("q"), ids_of("r")], stop_ids=(WORDS.index("2"), EOS))
    assert [c.ids for c in done] == [ids_of("1 2"), ids_of("4 8 <eos>")]
    assert [c.text for c in done] == ["1", "4 8"] and all(c.closed_eos for c in done)


def greedy_by_hand(model, prompt, limit):
    """Greedy decoding without cache, padding, or batch."""
    ids = list(prompt)
    while len(ids) < len(prompt) + limit:
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == EOS:
            break
    return ids[len(prompt) :]


@torch.no_grad()
def test_greedy_equals_decoding_one_by_one_without_cache_whatever_the_batch():
    model = random_llama()
    expected = [greedy_by_hand(model, p, 12) for p in PROMPTS]
    assert len({tuple(e) for e in expected}) == len(PROMPTS)  # else order mistakes would go unseen
    for batch_size in (1, 2, 4, 32):
        assert [c.ids for c in run(model, PROMPTS, batch_size=batch_size)] == expected


@pytest.mark.parametrize("settings", [{"top_p": 0.9, "temperature": 1.3}, {"top_k": 5, "temperature": 2.0}])
def test_samples_do_not_depend_on_batch_size_neighbours_or_order(settings):
    model = random_llama()
    reference = {(c.prompt_index, c.sample_index): c.ids for c in run(model, PROMPTS, samples=2, **settings)}
    assert reference[0, 0] != reference[0, 1]
    for batch_size in (1, 3):
        again = run(model, PROMPTS, samples=2, batch_size=batch_size, **settings)
        assert {(c.prompt_index, c.sample_index): c.ids for c in again} == reference
    backwards = run(model, PROMPTS[::-1], samples=2, **settings)
    assert {(len(PROMPTS) - 1 - c.prompt_index, c.sample_index): c.ids for c in backwards} == reference
    (alone,) = run(model, [PROMPTS[2]], **settings)
    assert alone.ids == reference[2, 0]
    longer = run(model, PROMPTS, samples=2, max_new_tokens=20, **settings)
    assert all(c.ids[:12] == reference[c.prompt_index, c.sample_index] for c in longer)
    other = run(model, PROMPTS, samples=2, seed=1, **settings)
    assert any(c.ids != reference[c.prompt_index, c.sample_index] for c in other)


def test_copies_of_a_prompt_count_as_more_samples_of_it():
    model = random_llama()
    four = run(model, [PROMPTS[0]], samples=4, temperature=1.5)
    twice_two = run(model, [PROMPTS[0], PROMPTS[1], PROMPTS[0]], samples=2, temperature=1.5)
    assert [c.ids for c in four] == [c.ids for c in twice_two if c.prompt_index != 1]


def test_frequencies_follow_the_model():
    shares = {"1": 0.5, "2": 0.3, "3": 0.15, "4": 0.05}
    n = 2000
    done = run(bigram_llama({"q": shares}), [ids_of("q")], samples=n, temperature=1.0, batch_size=500)
    counts = Counter(c.text for c in done)
    assert set(counts) == set(shares)
    for word, share in shares.items():
        assert abs(counts[word] - n * share) < 4 * math.sqrt(n * share * (1 - share))
    cold = Counter(
        c.text for c in run(bigram_llama({"q": shares}), [ids_of("q")], samples=n, temperature=0.5, batch_size=500)
    )
    share = 0.25 / (0.25 + 0.09 + 0.0225 + 0.0025)
    assert abs(cold["1"] - n * share) < 4 * math.sqrt(n * share * (1 - share))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_output_that_is_no_number_is_refused(temperature):
    model = bigram_llama({"q": {"1": 1.0}})
    with torch.no_grad():
        model.lm_head.weight[3, 0] = torch.nan
    with pytest.raises(UserError, match="prompt 0, sample 0, token 0: .*NaN or infinite; 1 of its"):
        run(model, [ids_of("q")], temperature=temperature)


def test_the_global_random_state_is_left_alone():
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    run(random_llama(), PROMPTS, temperature=1.0, samples=2)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (np.random.get_state()[1].tolist(), random.getstate())


def test_modes_and_generation_defaults_come_back_also_after_a_failure():
    model = random_llama()
    model.gradient_checkpointing_enable()
    model.train()
    model.model.layers[0].eval()  # a frozen part that someone holds in eval mode
    model.generation_config = GenerationConfig(repetition_penalty=3.0, max_length=5)
    model.config.use_cache = False
    defaults, modes = model.generation_config, [m.training for m in model.modules()]
    seen = []
    model.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(any(x.training for x in m.modules())), with_kwargs=True
    )
    run(model, PROMPTS)
    assert seen and not any(seen)

    def restored():
        return (
            [m.training for m in model.modules()] == modes
            and model.generation_config is defaults
            and model.config.use_cache is False
            and model.is_gradient_checkpointing
        )

    assert restored()
    handle = model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(ZeroDivisionError))
    with pytest.raises(ZeroDivisionError):
        run(model, PROMPTS)
    assert restored()
    handle.remove()


def test_the_models_own_generation_defaults_have_no_say():
    model = random_llama()
    expected = [c.ids for c in run(model, PROMPTS)]
    model.generation_config = GenerationConfig(
        repetition_penalty=50.0, num_beams=3, max_length=3, suppress_tokens=[4, 5, 6, 7, 8, 9], eos_token_id=2
    )
    assert [c.ids for c in run(model, PROMPTS)] == expected


def test_the_cache_is_used():
    model = random_llama()
    lengths = []
    model.register_forward_pre_hook(lambda m, a, kw: lengths.append(kw["input_ids"].shape[1]), with_kwargs=True)
    run(model, [PROMPTS[0]], stop_ids=(WORDS.index("<pad>"),), max_new_tokens=4)
    assert lengths == [4, 1, 1, 1]


def test_long_prompts_come_first_and_lengths_do_not_mix_more_than_they_must():
    model, shapes = random_llama(), []
    model.register_forward_pre_hook(lambda m, a, kw: shapes.append(tuple(kw["input_ids"].shape)), with_kwargs=True)
    run(model, [ids_of("q " * n) for n in (1, 9, 2, 8, 3)], batch_size=2, max_new_tokens=1)
    assert shapes == [(2, 9), (2, 3), (1, 1)]


def test_training_still_works_after_generating_in_inference_mode():
    model, made_for_inference = random_llama(), []
    model.register_forward_hook(lambda m, a, output: made_for_inference.append(output.logits.is_inference()))
    with torch.inference_mode():
        run(model, PROMPTS)
    assert made_for_inference and not any(made_for_inference)  # what the model may have kept is usable
    loss = model(torch.tensor([PROMPTS[0]]), labels=torch.tensor([PROMPTS[0]])).loss
    loss.backward()
    assert model.lm_head.weight.grad.abs().sum() > 0


def test_completions_end_where_the_context_ends_each_prompt_for_itself():
    model = chain_llama("q a b a", context=10)
    with pytest.warns(UserWarning, match="2 of 3 prompts leave less than max_new_tokens=6"):
        done = run(model, [ids_of("1 2 q"), ids_of("1 2 3 4 5 6 q"), ids_of("1 2 3 4 q")], max_new_tokens=6)
    assert [len(c.ids) for c in done] == [6, 3, 5]
    with pytest.raises(UserError, match="prompt 1 has 10 tokens and the model's context is 10"):
        run(model, [ids_of("q"), ids_of("q") * 10])


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_new_tokens", 0), ("temperature", -0.1), ("top_p", 0.0), ("top_p", 1.1), ("top_k", -1),
     ("samples", 0), ("batch_size", 0), ("seed", -1)],
)  # fmt: skip
def test_settings_out_of_range_are_named(name, value):
    with pytest.raises(UserError, match=f"sampling.{name} is {value}"):
        run(random_llama(), PROMPTS, **{name: value})


def test_nothing_to_continue_and_no_end_token():
    with pytest.raises(UserError, match="prompt 1 is empty"):
        run(random_llama(), [[1], []])
    with pytest.raises(UserError, match="no end token"):
        run(random_llama(), PROMPTS, stop_ids=())
    assert run(random_llama(), []) == []


def test_an_adapter_generates_with_the_adapter_and_keeps_its_modes():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(random_llama(), peft.LoraConfig(r=2, target_modules=["lm_head"], lora_dropout=0.5))
    with torch.no_grad():
        model.base_model.model.lm_head.lora_B["default"].weight.zero_()
    plain = [c.ids for c in run(model, PROMPTS)]
    assert plain == [c.ids for c in run(random_llama(), PROMPTS)]
    model.train()
    defaults = model.base_model.model.generation_config
    with torch.no_grad():
        model.base_model.model.lm_head.lora_B["default"].weight.normal_(
            std=3.0, generator=torch.Generator().manual_seed(0)
        )
    changed = [c.ids for c in run(model, PROMPTS)]
    assert changed != plain and changed == [c.ids for c in run(model.merge_and_unload(), PROMPTS)]
    assert model.base_model.model.generation_config is defaults


@pytest.mark.parametrize("attention", ["documents", "sdpa", "eager"])
def test_a_language_model_that_packs_rows_generates_and_packs_on(attention, tmp_path):
    from lit_reason.models.config import ModelConfig
    from lit_reason.models.language_model import LanguageModel

    plain = random_llama().float()
    plain.save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    config = ModelConfig(path=str(tmp_path), attention=attention, dtype="float32", gradient_checkpointing=True)
    lm = LanguageModel.load(config)
    lm.train()
    pack = torch.tensor(PROMPTS[0] + PROMPTS[2]), torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4, 5])
    cu_seqlens = torch.tensor([0, 4, 10], dtype=torch.int32)
    before = lm.hidden(*pack, cu_seqlens)
    config = SamplingConfig(max_new_tokens=8, temperature=0.0)
    done = sample(lm, word_tokenizer(), PROMPTS, config, stop_ids=(EOS,), progress=False)
    assert [c.ids for c in done] == [c.ids for c in run(plain, PROMPTS, max_new_tokens=8)]
    assert lm.hf.training and torch.equal(lm.hidden(*pack, cu_seqlens), before)
