import math
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lit_reason.metrics import flops
from lit_reason.metrics.flops import ModelFlops, matmul_rate, model_flops, peak_memory

D, LAYERS, HEADS, V, FFN = 16, 3, 4, 50, 24


def tiny_llama(tied: bool = False, **fields):
    config = LlamaConfig(
        hidden_size=D,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        intermediate_size=FFN,
        vocab_size=V,
        tie_word_embeddings=tied,
        **fields,
    )
    return LlamaForCausalLM(config)


LAYER_WEIGHTS = LAYERS * (D * D * 2 + D * D // 2 * 2 + 3 * D * FFN + 2 * D) + D  # q o, k v (half the heads), mlp, norms


@pytest.mark.parametrize("tied", [False, True])
def test_flops_of_a_trained_model_follow_the_formula(tied):
    cost = model_flops(tiny_llama(tied))
    assert cost.per_token == 6 * LAYER_WEIGHTS
    assert cost.per_pair == 12 * LAYERS * D / 2
    assert cost.per_trained == 6 * V * D
    expected = 6 * LAYER_WEIGHTS * 12 + 12 * LAYERS * D * (7**2 + 5**2) / 2 + 6 * 4 * V * D
    assert cost.step((7, 5), 4) == expected


def test_flops_count_the_attention_width_not_the_model_width():
    assert model_flops(tiny_llama(head_dim=8)).per_pair == 12 * LAYERS * HEADS * 8 / 2


def test_frozen_weights_cost_two_thirds():
    model = tiny_llama().requires_grad_(False)
    assert model_flops(model).per_token == 4 * LAYER_WEIGHTS
    assert model_flops(model).per_trained == 4 * V * D


def test_an_adapter_adds_its_own_weights_to_a_frozen_base():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert model_flops(model).per_token == 4 * LAYER_WEIGHTS + 6 * LAYERS * 2 * (D + D)
    assert model_flops(model).per_trained == 4 * V * D


def test_packed_four_bit_weights_count_with_their_true_shape():
    class Packed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(4 * 6 // 2, 1, dtype=torch.uint8), requires_grad=False)
            self.weight.quant_state = SimpleNamespace(shape=(4, 6))

    assert flops._cost(Packed().weight) == 4 * 24


def test_expert_models_have_no_count():
    model = tiny_llama()
    model.config.num_local_experts = 4
    assert model_flops(model) is None


def test_the_best_of_growing_products_is_the_rate(monkeypatch):
    clock, sizes = SimpleNamespace(now=0.0), []

    def product(a, b):
        size = len(a)
        sizes.append(size)
        rate = 1e9 if size < 1024 else 4e9 if len(sizes) % 2 else 3e9  # larger products fill the device better
        clock.now += 2 * size**3 / rate

    monkeypatch.setattr(flops, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(flops.torch, "mm", product)
    before = torch.get_rng_state()
    assert math.isclose(matmul_rate(torch.device("cpu"), torch.float32, budget_s=6.0), 4e9)
    assert torch.equal(before, torch.get_rng_state())
    assert sizes[:4] == [256, 256, 512, 1024] and set(sizes[4:]) == {1024}  # 2048 would take longer than what is left
    assert 6.0 < clock.now < 7.0


def test_a_real_product_has_a_rate():
    assert 0 < matmul_rate(torch.device("cpu"), torch.float32, budget_s=0.01) < math.inf


def test_step_cost_is_by_document():
    cost = ModelFlops(1.0, 10.0, 100.0)
    assert cost.step((2, 3), 4) == 5 + 10 * 13 + 400


def test_peak_memory_of_the_process_is_in_bytes_and_never_falls():
    before = peak_memory(torch.device("cpu"))
    held = torch.ones(64 * 2**20 // 4)
    after = peak_memory(torch.device("cpu"))
    assert 20 * 2**20 < before <= after < 2**38
    del held
    assert peak_memory(torch.device("cpu")) >= after
