"""Loading, counting, checkpointed and compiled layers of the language model that regimes use."""

import pytest
import torch
from tiny_models import VOCAB, documents, fields, pack, tiny

from lit_reason.errors import UserError
from lit_reason.models.adapters import decoder_layers
from lit_reason.models.config import AdapterConfig, ModelConfig
from lit_reason.models.language_model import LanguageModel


def loss_of(lm, docs):
    ids, positions, edges = pack(*docs)
    rows = torch.arange(len(ids) - 1)
    return lm(ids, positions, edges, rows, ids[1:], torch.ones(len(rows))).loss_sum


def test_parameter_counts_of_a_known_shape():
    counts = tiny("llama").parameter_counts()
    layer = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 40 + 2 * 32
    assert counts == (VOCAB * 32 + 2 * layer + 32, VOCAB * 32 + 2 * layer + 32, VOCAB * 32)
    untied = tiny("qwen3").parameter_counts()
    assert untied.embedding == 2 * VOCAB * 32
    assert sum(p.numel() for p in tiny("qwen3").parameters()) == untied.total


def test_lora_parameter_counts():
    counts = tiny("llama", adapter=AdapterConfig(rank=4, targets=["q_proj"])).parameter_counts()
    assert counts.trainable == 2 * (4 * 32 + 32 * 4)
    assert counts.total == tiny("llama").parameter_counts().total + counts.trainable


def test_token_ids_and_length():
    lm = tiny("llama")
    assert (lm.eos_ids, lm.pad_id, lm.max_length) == ((2,), 0, 64)
    lm.base.generation_config.eos_token_id = [2, 7]
    lm.base.generation_config.pad_token_id = lm.base.config.pad_token_id = None
    assert (lm.eos_ids, lm.pad_id) == ((2, 7), 2)


def test_load_returns_training_mode():
    assert LanguageModel.load(ModelConfig(config=fields("llama"))).training


@pytest.mark.parametrize("adapter", [None, AdapterConfig(rank=2)])
def test_weights_depend_on_the_seed_alone(adapter):
    def load(seed, drawn):
        torch.manual_seed(seed)
        torch.rand(drawn)
        return LanguageModel.load(ModelConfig(config=fields("llama"), adapter=adapter)).state_dict()

    one, two, other = load(3, 0), load(3, 10), load(4, 0)
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert not all(torch.equal(one[k], other[k]) for k in one)


def test_loading_leaves_the_random_stream_alone():
    torch.manual_seed(0)
    want = torch.rand(3)
    torch.manual_seed(0)
    LanguageModel.load(ModelConfig(config=fields("llama"), adapter=AdapterConfig(rank=2)))
    assert torch.equal(torch.rand(3), want)


@pytest.mark.parametrize("adapter", [None, AdapterConfig(rank=2)])
def test_gradient_checkpointing_recomputes_the_same_gradients(adapter):
    docs = documents(7, 5)
    plain = tiny("llama", adapter=adapter).train()
    saving = tiny("llama", adapter=adapter, gradient_checkpointing=True).train()
    calls = []
    decoder_layers(saving.base)[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    losses = [loss_of(lm, docs) for lm in (plain, saving)]
    assert len(calls) == 1
    for loss in losses:
        loss.backward()
    assert len(calls) == 2  # once forward, once more in the backward pass
    torch.testing.assert_close(losses[0], losses[1])
    pairs = list(zip(plain.parameters(), saving.parameters(), strict=True))
    assert any(p.grad is not None for p, _ in pairs)
    for p, q in pairs:
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad)


def test_compile_marks_every_decoder_layer():
    lm = tiny("llama", compile=True)
    assert [layer._compiled_call_impl is not None for layer in decoder_layers(lm.base)] == [True, True]


@pytest.mark.slow
def test_compiled_layers_give_the_same_loss_and_gradients():
    plain, compiled = tiny("llama").train(), tiny("llama", compile=True).train()
    for docs in (documents(7, 5), documents(3, 4, 9), documents(12)):
        losses = [loss_of(lm, docs) for lm in (plain, compiled)]
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-4)
        for loss in losses:
            loss.backward()
    for p, q in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-3)


def test_training_lowers_the_loss():
    lm, docs = tiny("llama").train(), documents(9, 7)
    optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        loss = loss_of(lm, docs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_bfloat16_model_trains_and_packs():
    lm = tiny("llama", dtype="bfloat16").train()
    assert lm.base.dtype == torch.bfloat16 and lm.attention == "documents"
    loss_of(lm, documents(5, 6)).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in lm.parameters())


def test_models_without_checkpointing_are_refused(monkeypatch):
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    with pytest.raises(UserError, match="gradient_checkpointing: LlamaForCausalLM"):
        tiny("llama", gradient_checkpointing=True)
