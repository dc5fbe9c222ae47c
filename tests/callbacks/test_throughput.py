import csv
import math
import time
from types import SimpleNamespace

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from lit_reason.callbacks import throughput
from lit_reason.callbacks.throughput import ModelFlops, Throughput, Totals, matmul_rate, model_flops
from lit_reason.errors import UserError

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


LAYER_WEIGHTS = (
    LAYERS * (D * D * 2 + D * D // 2 * 2 + 3 * D * FFN + 2 * D) + D
)  # q o, k v (half the heads), mlp, norms


@pytest.mark.parametrize("tied", [False, True])
def test_flops_of_a_trained_model_follow_the_formula(tied):
    flops = model_flops(tiny_llama(tied))
    assert flops.per_token == 6 * LAYER_WEIGHTS
    assert flops.per_pair == 12 * LAYERS * D / 2
    assert flops.per_trained == 6 * V * D
    expected = 6 * LAYER_WEIGHTS * 12 + 12 * LAYERS * D * (7**2 + 5**2) / 2 + 6 * 4 * V * D
    assert flops.step((7, 5), 4) == expected


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
            self.weight = torch.nn.Parameter(
                torch.zeros(4 * 6 // 2, 1, dtype=torch.uint8), requires_grad=False
            )
            self.weight.quant_state = SimpleNamespace(shape=(4, 6))

    assert throughput._cost(Packed().weight) == 4 * 24


def test_expert_models_have_no_count():
    model = tiny_llama()
    model.config.num_local_experts = 4
    assert model_flops(model) is None


def test_measured_rate_is_of_the_order_of_a_timed_product_and_leaves_the_random_state():
    before = torch.get_rng_state()
    start = time.perf_counter()
    rate = matmul_rate(torch.device("cpu"), torch.float32, budget_s=0.1)
    assert time.perf_counter() - start < 2
    assert torch.equal(before, torch.get_rng_state())
    a = torch.randn(512, 512)
    begin = time.perf_counter()
    torch.mm(a, a)
    once = 2 * 512**3 / (time.perf_counter() - begin)
    assert 0.02 < once / rate < 50


class Packs(torch.utils.data.Dataset):
    """Pack k has documents of k + 1 and 3 tokens and k trained ones."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, k):
        return SimpleNamespace(
            ids=torch.zeros(k + 4, dtype=torch.long), index=torch.zeros(k), lengths=(k + 1, 3)
        )


class Toy(L.LightningModule):
    def __init__(self, step_s=0.0, val_s=0.0):
        super().__init__()
        self.lm = SimpleNamespace(hf=tiny_llama())
        self.w = torch.nn.Parameter(torch.ones(1))
        self.step_s, self.val_s = step_s, val_s

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return batch

    def training_step(self, batch, batch_idx):
        time.sleep(self.step_s)
        return (self.w**2).sum()

    def validation_step(self, batch, batch_idx):
        time.sleep(self.val_s)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(tmp_path, callback, module=None, *, packs=6, val=0, name="run", **kwargs):
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        log_every_n_steps=kwargs.pop("log_every_n_steps", 2),
        callbacks=[callback],
        logger=CSVLogger(tmp_path, name=name, version=0),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        default_root_dir=tmp_path,
        **kwargs,
    )
    loader = DataLoader(Packs(packs), batch_size=None)
    trainer.fit(module or Toy(), loader, DataLoader(Packs(val), batch_size=None) if val else None)
    with open(tmp_path / name / "version_0" / "metrics.csv") as file:
        return trainer, [row for row in csv.DictReader(file) if row["perf/tokens_per_s"]]


def test_counts_and_rows_of_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(throughput, "matmul_rate", lambda device, dtype: 1e9)
    callback = Throughput()
    trainer, rows = run(tmp_path, callback, packs=5)
    assert [int(r["step"]) for r in rows] == [1, 3, 4]  # two windows, and what was left over
    assert [float(r["perf/total_tokens"]) for r in rows] == [4 + 5, 4 + 5 + 6 + 7, 4 + 5 + 6 + 7 + 8]
    assert float(rows[-1]["perf/total_trained_tokens"]) == 0 + 1 + 2 + 3 + 4
    totals, flops = callback.totals, model_flops(tiny_llama())
    assert (totals.steps, totals.tokens, totals.trained_tokens) == (5, 30, 10)
    assert totals.flops == sum(flops.step((k + 1, 3), k) for k in range(5))
    last, before = rows[-1], float(rows[-2]["perf/total_seconds"])
    seconds = float(last["perf/total_seconds"]) - before
    assert math.isclose(float(last["perf/tokens_per_s"]), 8 / seconds, rel_tol=1e-4)
    assert math.isclose(float(last["perf/trained_tokens_per_s"]), 4 / seconds, rel_tol=1e-4)
    assert math.isclose(float(last["perf/step_s"]), seconds, rel_tol=1e-4)
    assert math.isclose(float(last["perf/mfu"]), flops.step((5, 3), 4) / seconds / 1e9, rel_tol=1e-4)
    assert 0.01 < float(last["perf/peak_memory_gb"]) < 100


def test_accumulated_micro_batches_are_one_step(tmp_path):
    callback = Throughput()
    _, rows = run(tmp_path, callback, packs=6, accumulate_grad_batches=3, log_every_n_steps=1)
    assert callback.totals.steps == 2
    assert [float(r["perf/total_tokens"]) for r in rows] == [4 + 5 + 6, 4 + 5 + 6 + 7 + 8 + 9]


def test_validation_is_not_training_time(tmp_path):
    callback = Throughput()
    run(tmp_path, callback, Toy(step_s=0.02, val_s=0.2), packs=4, val=2, val_check_interval=2)
    assert 0.08 <= callback.totals.seconds < 0.4  # the four validation batches alone took 0.8


def test_totals_continue_after_a_resume(tmp_path):
    first = Throughput()
    trainer, _ = run(tmp_path, first, packs=4)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"]["Throughput"]
    second = Throughput()
    second.load_state_dict(state)
    assert second.totals == first.totals
    run(tmp_path, second, packs=2, name="again")
    assert second.totals.tokens == first.totals.tokens + 9
    assert second.totals.steps == 6
    assert second.totals.seconds > first.totals.seconds


def test_tokens_of_all_ranks_add_up_and_tensor_parallel_copies_do_not(monkeypatch):
    other = Totals(steps=3, tokens=70, trained_tokens=10, seconds=9.0, flops=2.0)
    monkeypatch.setattr(throughput, "from_all_ranks", lambda value: [value, other])
    callback = Throughput()
    callback._own = Totals(steps=3, tokens=30, trained_tokens=20, seconds=8.0, flops=4.0)
    assert callback.totals == Totals(3, 100, 30, 9.0, 6.0)
    callback._copies = 2.0
    assert callback.totals == Totals(3, 50, 15, 9.0, 3.0)


def test_other_batches_are_refused():
    callback = Throughput()
    with pytest.raises(UserError, match="packs.*list"):
        callback.on_train_batch_end(SimpleNamespace(global_step=0), None, None, [1], 0)


def test_step_cost_is_by_document():
    flops = ModelFlops(1.0, 10.0, 100.0)
    assert flops.step((2, 3), 4) == 5 + 10 * 13 + 400
