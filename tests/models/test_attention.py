"""Packed documents behave as if each were alone, for every family and back end that runs on a CPU."""

import pytest
import torch
from tiny_models import FAMILIES, documents, pack, tiny
from transformers import AutoModelForCausalLM

from lit_reason.errors import UserError
from lit_reason.models.attention import (
    _varlen,
    documents_attention,
    packed_rows,
    set_attention,
    varlen_attention,
)
from lit_reason.models.config import ModelConfig
from lit_reason.models.language_model import LanguageModel

CASES = [(f, b) for f in FAMILIES for b in ("documents", "sdpa", "eager") if (f, b) != ("gemma2", "sdpa")]
SOME = [("llama", "documents"), ("mistral", "documents"), ("gemma2", "documents"), ("gpt2", "documents")]
LENGTHS = (9, 1, 6, 13)  # longer and shorter than the sliding window of 4; one single token


def eager_twin(lm):
    """The same weights with transformers' own eager attention and no packing."""
    twin = AutoModelForCausalLM.from_config(lm.base.config, attn_implementation="eager")
    twin.load_state_dict(lm.base.state_dict())
    return twin.eval()


@pytest.mark.parametrize("family, backend", CASES)
def test_packed_equals_alone(family, backend):
    """Reference: each document by itself through transformers' plain eager model, logits included."""
    lm, docs = tiny(family, attention=backend), documents(*LENGTHS)
    assert lm.attention == backend
    twin = eager_twin(lm)
    assert twin.config._attn_implementation == "eager"
    with torch.no_grad():
        logits = lm.head(lm.hidden(*pack(*docs)))
        alone = torch.cat([twin(input_ids=torch.tensor([d])).logits[0] for d in docs])
    assert alone.std() > 0.1
    torch.testing.assert_close(logits, alone, rtol=1e-5, atol=1e-5 * float(alone.abs().max()))


@pytest.mark.parametrize("family, backend", [*SOME, ("llama", "sdpa"), ("mistral", "eager")])
def test_other_documents_never_leak_in(family, backend):
    lm, (a, b, c) = tiny(family, attention=backend), documents(7, 8, 5)
    with torch.no_grad():
        before = lm.hidden(*pack(a, b, c))
        after = lm.hidden(*pack([(t + 17) % 50 + 3 for t in a], b, c))
    changed, kept = (before[:7] - after[:7]).abs().max(), (before[7:] - after[7:]).abs().max()
    assert changed > 0.1
    assert kept == 0


def test_sliding_window_changes_the_result():
    """The window is really applied: with a window longer than the document the states differ."""
    lm, (doc,) = tiny("mistral"), documents(9)
    wide = tiny("mistral", changes={"sliding_window": 50})
    wide.load_state_dict(lm.state_dict())
    with torch.no_grad():
        near, far = lm.hidden(*pack(doc)), wide.hidden(*pack(doc))
    torch.testing.assert_close(near[:4], far[:4])
    assert (near[4:] - far[4:]).abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_gradients_equal_those_of_separate_documents(family):
    lm, docs = tiny(family), documents(*LENGTHS)
    twin = eager_twin(lm)
    probe = torch.randn(sum(LENGTHS), 61, generator=torch.Generator().manual_seed(0))
    (lm.head(lm.hidden(*pack(*docs))) * probe).sum().backward()
    start = 0
    for doc in docs:
        logits = twin(input_ids=torch.tensor([doc])).logits[0]
        (logits * probe[start : start + len(doc)]).sum().backward()
        start += len(doc)
    ours, theirs = dict(lm.base.named_parameters()), dict(twin.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, p in theirs.items():
        torch.testing.assert_close(ours[name].grad, p.grad, rtol=1e-4, atol=1e-5 * float(p.grad.abs().max()), msg=name)


@pytest.mark.parametrize("family, backend", SOME)
def test_generation_with_left_padding_equals_unpadded(family, backend):
    lm, (long, short) = tiny(family, attention=backend), documents(11, 4)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ids = torch.tensor([long, [0] * 7 + short])
    mask = torch.tensor([[1] * 11, [0] * 7 + [1] * 4])
    both = lm.hf.generate(input_ids=ids, attention_mask=mask, **options)[:, 11:]
    twin = eager_twin(lm)
    for row, prompt in zip(both, (long, short), strict=True):
        by_hand = list(prompt)  # no cache, no padding
        for _ in range(5):
            with torch.no_grad():
                by_hand.append(int(twin(input_ids=torch.tensor([by_hand])).logits[0, -1].argmax()))
        assert row.tolist() == by_hand[len(prompt) :]


def test_padded_batch_without_packing():
    """An ordinary batched call on the same object, with a key/value cache switched off and on."""
    lm, (long, short) = tiny("llama"), documents(11, 4)
    ids, mask = torch.tensor([long, short + [0] * 7]), torch.tensor([[1] * 11, [1] * 4 + [0] * 7])
    with torch.no_grad():
        rows = lm.hf(input_ids=ids, attention_mask=mask).logits
        alone = lm.hf(input_ids=torch.tensor([short])).logits
    torch.testing.assert_close(rows[1, :4], alone[0])


def test_missing_boundaries_are_an_error_not_a_leak():
    class Layer(torch.nn.Module):
        is_causal = True

    q = torch.randn(1, 2, 6, 4)
    with packed_rows(), pytest.raises(UserError, match="Layer does not hand document boundaries"):
        documents_attention(Layer(), q, q, q, None)
    out, _ = documents_attention(Layer(), q, q, q, None)
    assert out.shape == (1, 6, 2, 4)


def test_unknown_attention_inputs_are_refused():
    layer, q = torch.nn.Module(), torch.randn(1, 2, 6, 4)
    edges = torch.tensor([0, 6])
    with pytest.raises(UserError, match="s_aux"):
        documents_attention(layer, q, q, q, None, cu_seq_lens_q=edges, s_aux=torch.zeros(2))
    layer.config, layer.layer_idx = type("C", (), {"layer_types": ["sliding_attention"]}), 0
    with pytest.raises(UserError, match="does not pass its sliding window"):
        documents_attention(layer, q, q, q, None, cu_seq_lens_q=edges)


@pytest.mark.parametrize("backend, reason", [("varlen", "needs a CUDA device"), ("flex", "needs a CUDA device")])
@pytest.mark.skipif(torch.cuda.is_available(), reason="these run where there is a GPU")
def test_gpu_back_ends_are_refused_on_a_cpu(backend, reason):
    with pytest.raises(UserError, match=rf"attention '{backend}': .*{reason}; usable here: documents, sdpa, eager"):
        tiny("llama", attention=backend)


def test_sdpa_is_refused_where_scores_are_softcapped():
    with pytest.raises(
        UserError, match="attention 'sdpa': (Gemma2ForCausalLM does not support it|has no score softcap)"
    ):
        tiny("gemma2", attention="sdpa")


def test_auto_takes_masks_where_layers_need_them():
    lm = tiny("llama")
    lm.base.config.layer_types = ["chunked_attention", "full_attention"]
    assert set_attention(lm.base, "auto") == "sdpa"
    with pytest.raises(UserError, match="chunked_attention"):
        set_attention(lm.base, "documents")


def test_recurrent_models_are_refused():
    """A state-space model carries its state from one document into the next; that must not pass silently."""
    config = {
        "model_type": "mamba",
        "vocab_size": 61,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "state_size": 4,
    }
    with pytest.raises(UserError, match="mixes documents"):
        LanguageModel.load(ModelConfig(config=config))


def reference_varlen(q, k, v, edges, scale, left, causal):
    """Flash attention's contract on [T, H, d] by an explicit loop; `left` tokens to the left are seen."""
    out = torch.empty_like(q)
    for start, stop in zip(edges.tolist(), edges.tolist()[1:], strict=False):
        i = torch.arange(stop - start)
        seen = (i[:, None] >= i) if causal else torch.ones(stop - start, stop - start, dtype=torch.bool)
        if left >= 0:
            seen &= i[:, None] - i <= left
        scores = torch.einsum("ihd,jhd->hij", q[start:stop], k[start:stop]) * scale
        p = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        out[start:stop] = torch.einsum("hij,jhd->ihd", p, v[start:stop])
    return out


def newer_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    assert max_q == int(cu_seq_q.diff().max()) and torch.equal(cu_seq_q, cu_seq_k)
    return reference_varlen(query, key, value, cu_seq_q, scale, window_size[0], window_size[1] == 0)


def older_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
    return reference_varlen(query, key, value, cu_seq_q, query.shape[-1] ** -0.5, -1, is_causal)


@pytest.mark.parametrize("kernel", [newer_varlen, older_varlen])
@pytest.mark.parametrize("window", [None, 3, 50])
@pytest.mark.parametrize("causal", [True, False])
def test_varlen_call_matches_documents(kernel, window, causal, monkeypatch):
    """The arguments given to torch's kernel, in both of its forms, against the document loop."""
    from torch.nn.attention import varlen

    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 12, 8, generator=g) for heads in (4, 2, 2))
    edges, layer = torch.tensor([0, 7, 8, 12], dtype=torch.int32), torch.nn.Module()
    layer.is_causal = causal
    if kernel is older_varlen and window == 3:
        with pytest.raises(UserError, match="no sliding window"):
            _varlen(q, k, v, edges, 7, window, causal, 0.2)
        return
    want, _ = documents_attention(
        layer, q, k, v, None, scaling=0.2, cu_seq_lens_q=edges, sliding_window=window if causal else None
    )
    torch.testing.assert_close(_varlen(q, k, v, edges, 7, window, causal, 0.2), want)


def test_varlen_of_a_model_still_on_the_cpu():
    q = torch.randn(1, 2, 6, 4)
    edges, layer = torch.tensor([0, 4, 6]), torch.nn.Module()
    ours, _ = varlen_attention(layer, q, q, q, None, cu_seq_lens_q=edges, max_length_q=4)
    torch.testing.assert_close(ours, documents_attention(layer, q, q, q, None, cu_seq_lens_q=edges)[0])
    with packed_rows(), pytest.raises(UserError, match="does not hand document boundaries"):
        varlen_attention(layer, q, q, q, None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_varlen_on_a_gpu_equals_documents(family):
    heads = {"hidden_size": 128, "head_dim": 32}
    fast = tiny(family, attention="varlen", dtype="bfloat16", changes=heads).cuda()
    slow = tiny(family, attention="documents", dtype="bfloat16", changes=heads).cuda()
    ids, positions, edges = pack(*documents(*LENGTHS))
    with torch.no_grad():
        ours, theirs = (lm.hidden(ids.cuda(), positions.cuda(), edges) for lm in (fast, slow))
    assert (ours - theirs).abs().max() < 0.05 * theirs.abs().max()
