"""Token pruning by likelihood, and likelihoods read in windows, against plain references."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_reason.data.condensation.likelihood import load_scorer, prune_tokens, window_nll
from lit_reason.data.condensation.teacher import load_teacher
from lit_reason.data.conversation import Trace


def trace_of(*thoughts):
    return Trace(thoughts, tuple(range(len(thoughts))), len(thoughts))


def test_gaps_go_with_the_token_before_them():
    trace = trace_of("aa bb\n\n", "cc dd")
    spans = [(0, 2, 1.0), (3, 5, 4.0), (7, 9, 3.0), (10, 12, 2.0)]
    assert prune_tokens(trace, spans, 0.5) == Trace(("bb\n\n", "cc "), (0, 1), 2)
    assert prune_tokens(trace, spans, 0.25) == Trace(("bb\n\n",), (0,), 2)
    assert prune_tokens(trace, spans, 0.25, whole_tail=1) == Trace(("bb\n\n", "cc dd"), (0, 1), 2)
    assert prune_tokens(trace, spans, 1.0) == trace
    assert prune_tokens(trace, [], 0.5) == trace


def test_the_first_of_equal_tokens_stays():
    assert prune_tokens(trace_of("abcd"), [(i, i + 1, 0.0) for i in range(4)], 0.5).text == "ab"


def test_pieces_of_one_character_are_one_token():
    # A byte-level tokenizer gives both halves of a character the same start.
    spans = [(0, 1, 0.0), (1, 2, 1.0), (1, 2, 9.0), (2, 3, 5.0)]
    assert prune_tokens(trace_of("aéb"), spans, 0.5).text == "éb"


def test_a_token_across_two_thoughts_is_divided():
    assert prune_tokens(trace_of("ab", "cd"), [(0, 1, 0.0), (1, 3, 9.0), (3, 4, 0.0)], 0.3).thoughts == ("b", "c")


@given(
    st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=6),
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40), st.floats(0, 9)), max_size=20),
    st.floats(0.01, 1.0),
    st.integers(0, 7),
)
def test_pruned_text_is_a_subsequence(thoughts, spans, tau, whole_tail):
    trace = trace_of(*thoughts)
    done = prune_tokens(trace, spans, tau, whole_tail)
    assert len(done.thoughts) == len(done.origin) and all(done.thoughts)
    for thought, place in zip(done.thoughts, done.origin, strict=True):
        rest = iter(thoughts[place])
        assert all(character in rest for character in thought)
    kept = dict(zip(done.origin, done.thoughts, strict=True))
    for place in range(max(len(thoughts) - whole_tail, 0), len(thoughts)):
        assert kept[place] == thoughts[place]


class Counting:
    """Next-token logits that depend on the last three ids alone, so that windows see enough."""

    def __init__(self, vocabulary):
        self.table = torch.randn(vocabulary, vocabulary, vocabulary, generator=torch.Generator().manual_seed(0))
        self.longest = 0

    def __call__(self, ids_W):
        self.longest = max(self.longest, len(ids_W))
        before = torch.cat([ids_W[:1], ids_W[:-1]])
        return self.table[before, ids_W]


@pytest.mark.parametrize("length", [1, 2, 5, 16, 17, 40, 64])
@pytest.mark.parametrize("limit", [6, 16, 100])
def test_windows_give_the_likelihoods_of_one_pass(length, limit):
    model = Counting(7)
    ids = torch.randint(0, 7, (length,), generator=torch.Generator().manual_seed(length))
    nll = window_nll(model, ids, limit)
    assert nll[0] == 0 and nll.shape == (length,)
    for at in range(1, length):
        logits = model.table[ids[max(at - 2, 0)], ids[at - 1]]
        expected = math.log(logits.exp().sum()) - logits[ids[at]]
        assert nll[at] == pytest.approx(float(expected), abs=1e-5)
    assert model.longest <= limit


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory, tokenizer_of):
    """Folder of a random Llama with a chat template."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = tokenizer_of("chatml", eos="<|im_end|>")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=512, eos_token_id=5, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder), tokenizer


def test_scores_of_a_model_are_its_losses(tiny_model):
    from transformers import AutoModelForCausalLM

    folder, tokenizer = tiny_model
    prefix, body = "user: the colour?", "Wait, é 12 + 30 is 42.\n\nSo"
    spans = load_scorer(folder)(prefix, body)
    assert spans[0][0] == 0 and max(end for _, end, _ in spans) == len(body)
    before, after = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (prefix, body))
    ids = torch.tensor([before + after])
    labels = torch.tensor([[-100] * len(before) + after])
    loss = AutoModelForCausalLM.from_pretrained(folder)(ids, labels=labels).loss.item()
    assert sum(nll for _, _, nll in spans) / len(spans) == pytest.approx(loss, rel=1e-4)
    assert len(load_scorer(folder)("", body)) == len(spans)


def test_a_teacher_model_writes_at_most_twice_the_tokens(tiny_model):
    folder, tokenizer = tiny_model
    teacher = load_teacher(folder)
    text = teacher("what?", "Let me think. Wait", 4)
    assert text == teacher("what?", "Let me think. Wait", 4)
    assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) <= 8 + 2
