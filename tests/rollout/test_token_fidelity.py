"""Ids are the truth: what was sampled is trained as sampled, whatever its text, its template or its padding."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lit_reason.envs.environment import Environment, Step
from lit_reason.models.config import ModelConfig
from lit_reason.models.language_model import LanguageModel
from lit_reason.rollout.backend import Backend, Turn
from lit_reason.rollout.config import DialogueConfig, SamplingConfig
from lit_reason.rollout.engine import Engine
from lit_reason.rollout.observations import ObservationEncoder
from lit_reason.rollout.play import Player
from lit_reason.rollout.trajectory import NOT_SAMPLED

BODY = "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>NEWLINE{% endfor %}"
ASK = "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
CHATML, TIGHT = BODY.replace("NEWLINE", "{{ '\\n' }}") + ASK, BODY.replace("NEWLINE", "") + ASK
OPEN = (  # a template that writes no end behind the assistant's turn but begins the next message
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}{% if m.role != 'assistant' %}<|end|>{% endif %}"
    "{% endfor %}" + ASK
)


def tokenizer_with(template):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(["abab abab"] * 5, BpeTrainer(initial_alphabet=alphabet, vocab_size=262))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>"]})
    tokenizer.chat_template = template
    return tokenizer


TOKENIZER = tokenizer_with(CHATML)
A, B, END = TOKENIZER.convert_tokens_to_ids(["a", "b", "<|end|>"])


class Told(Environment):
    """Says `said`, and ends after two turns."""

    said = "ok"

    def reset(self, task, seed, rollout=0):
        self.turns = 0
        return [{"role": "user", "content": "go"}]

    def step(self, action):
        self.turns += 1
        return Step(self.said, 1.0, self.turns == 2, False, {})

    def outcome(self):
        return {}


class Writes(Backend):
    """An engine that writes given ids, turn by turn."""

    sampler = "script"

    def __init__(self, turns):
        self.turns = iter(turns)

    def open(self, prompts, names):
        self.row = list(prompts[0])

    def anyone(self, busy):
        return busy

    def fork(self, copies):
        pass

    def keep(self, rows):
        pass

    def ids(self, row):
        return list(self.row)

    def append(self, row, ids):
        self.row += ids

    def step(self, limits, stops=()):
        ids = next(self.turns)
        self.row += ids
        return [Turn(ids, [-1.0] * len(ids), TOKENIZER.decode(ids), "end" if ids[-1] == END else "length")]


def played(turns, tokenizer=TOKENIZER):
    config = DialogueConfig(group=1, turn_tokens=50, answer_tokens=8, total_tokens=400)
    observations = ObservationEncoder(tokenizer, [END])
    (done,) = Player(Writes(turns), observations, Told, config).play([{}])
    return done


def test_a_pair_of_tokens_whose_text_is_one_token_stays_a_pair():
    assert len(TOKENIZER("ab").input_ids) == 1 and TOKENIZER.decode([A, B]) == "ab"
    done = played([[A, B, END], [A, B, A, END]])
    assert [i for i, k in zip(done.ids, done.turn_id, strict=True) if k == 0] == [A, B, END]
    assert [i for i, k in zip(done.ids, done.turn_id, strict=True) if k == 1] == [A, B, A, END]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 255), min_size=1, max_size=12), min_size=2, max_size=2))
def test_any_ids_come_out_as_they_went_in(turns):
    """Bytes that are no text at all, halves of characters, pairs that merge: text would lose them."""
    done = played(turns)
    for k in (0, 1):
        assert [i for i, turn in zip(done.ids, done.turn_id, strict=True) if turn == k] == turns[k]
    row = done.token_row()
    assert row.ids.tolist() == done.ids and row.weight.sum() == sum(map(len, turns))


SAID = "<|start|>user\nok<|end|>"
NEXT = "<|start|>assistant\n"


@pytest.mark.parametrize(
    ("template", "ended", "cut"),
    [
        (CHATML, f"\n{SAID}\n{NEXT}", f"<|end|>\n{SAID}\n{NEXT}"),
        (TIGHT, SAID + NEXT, f"<|end|>{SAID}{NEXT}"),
        (OPEN, SAID + NEXT, SAID + NEXT),
    ],
    ids=["newline behind the end", "nothing behind the end", "no end at all"],
)
def test_what_stands_between_two_turns_token_by_token(template, ended, cut):
    """The end is the model's where it sampled one, the template's otherwise; only the former is trained."""
    tokenizer = tokenizer_with(template)
    for turn, wanted in (([A, END], ended), ([A, A], cut)):
        done = played([turn, [B, END]], tokenizer)
        first = [k == 0 for k in done.turn_id]
        start = first.index(True)
        between = done.turn_id[start + 2 :].index(1)
        ids = done.ids[start + 2 : start + 2 + between]
        assert tokenizer.decode(ids) == wanted
        assert done.token_row().weight[start : start + 2 + between].tolist() == [1.0, 1.0] + [0.0] * between


def policy():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENIZER), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512,
    )  # fmt: skip
    return LanguageModel(LlamaForCausalLM(config).eval(), ModelConfig())


def by_the_policy(tokenizer, lm):
    engine = Engine(lm, tokenizer, SamplingConfig(temperature=1.0, top_p=1.0), [END])
    config = DialogueConfig(group=3, max_turns=2, turn_tokens=20, answer_tokens=8, total_tokens=200)
    return Player(engine, ObservationEncoder(tokenizer, [END]), Told, config).play([{}, {}])


def test_an_end_token_is_trained_though_it_pads_too():
    lm, padded = policy(), tokenizer_with(CHATML)
    padded.pad_token = "<|end|>"
    with torch.no_grad():
        lm.head.layer.weight[END] += 4.0 * lm.head.layer.weight.abs().mean()
    plain, same = by_the_policy(TOKENIZER, lm), by_the_policy(padded, lm)
    assert [t.ids for t in plain] == [t.ids for t in same]
    for t in same:
        row = t.token_row()
        assert row.weight.tolist() == [float(k != NOT_SAMPLED) for k in t.turn_id]
        for k, stop in enumerate(t.stops):
            last = max(i for i, turn in enumerate(t.turn_id) if turn == k)
            assert (stop == "end") == (t.ids[last] == END)


def test_nobody_sleeps(monkeypatch):
    """Released code slept for up to a second a step, at random."""
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"slept for {seconds} s"))
    assert len(by_the_policy(TOKENIZER, policy())) == 6
