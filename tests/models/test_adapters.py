"""Low-rank adapters over plain and quantised bases."""

import sys

import pytest
import torch
from tiny_gguf import write_gguf
from tiny_models import documents, fields, pack, save_tiny, tiny

from lit_reason.errors import UserError
from lit_reason.models.config import AdapterConfig, ModelConfig
from lit_reason.models.language_model import LanguageModel


def loss_of(lm, doc):
    ids, positions, edges = pack(doc)
    rows = torch.arange(len(ids) - 1)
    return lm(ids, positions, edges, rows, ids[1:], torch.ones(len(rows))).loss_sum


def train(lm, doc, steps=8):
    lm.train()
    optimizer = torch.optim.AdamW([p for p in lm.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = loss_of(lm, doc)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_fresh_adapter_changes_nothing_and_trains_alone():
    (doc,) = documents(12)
    lm = tiny(adapter=AdapterConfig(rank=4))
    with torch.no_grad():
        torch.testing.assert_close(loss_of(lm, doc), loss_of(tiny(), doc))
    trained = {n for n, p in lm.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in n for n in trained)
    assert {n.split(".")[-4] for n in trained} == set("q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split())
    frozen = {n: p.detach().clone() for n, p in lm.named_parameters() if n not in trained}
    losses = train(lm, doc)
    assert losses[-1] < losses[0] - 1
    assert all(torch.equal(p, frozen[n]) for n, p in lm.named_parameters() if n in frozen)


def test_scale_is_alpha_over_rank():
    lm = tiny(adapter=AdapterConfig(rank=4, alpha=12.0, targets=["q_proj"]))
    layer = lm.base.model.layers[0].self_attn.q_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.nn.init.normal_(b)
    torch.testing.assert_close(layer.get_delta_weight("default"), 3.0 * b @ a)


def test_targets_are_checked():
    with pytest.raises(UserError, match="no linear layer 'q_prj'; this model has .*did you mean 'q_proj'"):
        tiny(adapter=AdapterConfig(targets=["q_prj", "v_proj"]))
    assert tiny(adapter=AdapterConfig(targets="q_proj")).parameter_counts().trainable > 0
    layers = [n for n, p in tiny("gpt2", adapter=AdapterConfig(rank=2)).named_parameters() if p.requires_grad]
    assert layers and not any("lm_head" in n for n in layers)


def test_continue_from_a_folder(tmp_path):
    (doc,) = documents(12)
    lm = tiny(adapter=AdapterConfig(rank=4))
    train(lm, doc)
    lm.hf.save_pretrained(tmp_path / "adapter")
    again = tiny(adapter=AdapterConfig(rank=99, folder=str(tmp_path / "adapter")))
    assert again.parameter_counts() == lm.eval().parameter_counts()
    with torch.no_grad():
        torch.testing.assert_close(loss_of(again, doc), loss_of(lm, doc))
    before = loss_of(again, doc).item()
    assert train(again, doc)[-1] < before


def test_adapter_folder_errors(tmp_path):
    tiny(adapter=AdapterConfig(rank=4)).hf.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="adapter.folder: .*adaptr does not exist.*did you mean 'adapter'"):
        tiny(adapter=AdapterConfig(folder=str(tmp_path / "adaptr")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no adapter_config.json"):
        tiny(adapter=AdapterConfig(folder=str(tmp_path / "empty")))
    with pytest.raises(UserError, match="does not fit this base model"):
        tiny(changes={"hidden_size": 64}, adapter=AdapterConfig(folder=str(tmp_path / "adapter")))


def test_a_saved_output_layer_is_used_by_the_head():
    """peft's `modules_to_save` trains a copy of the output layer; loss and logits must use the copy."""
    from peft import LoraConfig, get_peft_model

    plain, (doc,) = tiny("qwen3"), documents(8)
    adapter = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    lm = LanguageModel(get_peft_model(plain.hf, adapter), plain.config)
    assert lm.head.weight.requires_grad
    with torch.no_grad():
        lm.head.weight.mul_(0.5)
    logits = lm.hf(input_ids=torch.tensor([doc])).logits[0]
    hidden = lm.hidden(*pack(doc))
    torch.testing.assert_close(lm.head(hidden), logits)
    want = torch.log_softmax(logits, -1).gather(1, torch.tensor(doc)[:, None])[:, 0]
    out = lm.head(hidden, torch.tensor(doc))
    torch.testing.assert_close(out.logp_S, want, rtol=1e-5, atol=1e-5)
    out.loss_sum.backward()
    assert lm.head.weight.grad is not None


def adapted_head(family="qwen3", **changes):
    """A model with a LoRA on the output layer (and one other) whose update is not zero, and rows with targets."""
    lm, (doc,) = tiny(family, adapter=AdapterConfig(rank=3, targets=["q_proj", "lm_head"], **changes)), documents(9)
    for up in lm.head.layer.lora_B.values():
        torch.nn.init.normal_(up.weight, std=0.3)
    return lm, lm.hidden(*pack(doc)).detach(), torch.tensor(doc)


@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma2"])  # separate output layer, tied, tied with a softcap
def test_an_adapter_on_the_output_layer_joins_the_loss_and_its_gradient(family):
    lm, hidden, targets = adapted_head(family)
    weights = torch.linspace(-1, 2, len(targets))
    adapter = {n: p for n, p in lm.head.layer.named_parameters() if "lora_" in n}
    assert len(adapter) == 2 and all(p.requires_grad for p in adapter.values())
    hidden.requires_grad_()
    logp = torch.log_softmax(lm.head(hidden), -1).gather(1, targets[:, None])[:, 0]
    want = torch.autograd.grad(-(weights * logp).sum(), [hidden, *adapter.values()])
    for out in (
        lm.head(hidden, targets, weights).loss_sum,
        -(weights * lm.head.token_logprobs(hidden, targets).logp_S).sum(),
    ):
        for name, got, expected in zip(
            ["hidden", *adapter], torch.autograd.grad(out, [hidden, *adapter.values()]), want, strict=True
        ):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5, msg=name)
    assert not torch.allclose(logp, lm.head.token_logprobs(hidden[:, :].roll(1, 0), targets).logp_S)


def test_the_reference_of_an_adapted_head_is_the_head_without_it():
    lm, hidden, targets = adapted_head()
    got = lm.head(hidden, targets, hidden_ref_SD=hidden).metrics["ref_logp"]
    with lm.hf.disable_adapter():
        want = lm.head(hidden, targets).logp_S
        torch.testing.assert_close(want, torch.log_softmax(lm.head(hidden), -1).gather(1, targets[:, None])[:, 0])
    torch.testing.assert_close(got, want)
    assert not torch.allclose(got, lm.head(hidden, targets).logp_S)


def test_dropout_of_an_adapter_on_the_output_layer_acts_in_training_alone():
    lm, hidden, targets = adapted_head(dropout=0.5)
    lm.eval()
    assert torch.equal(lm.head(hidden, targets).logp_S, lm.head(hidden, targets).logp_S)
    lm.train()
    assert not torch.equal(lm.head(hidden, targets).logp_S, lm.head(hidden, targets).logp_S)


def test_other_adapters_on_the_output_layer_are_refused():
    from peft import LoraConfig, get_peft_model

    plain = tiny("qwen3")
    with pytest.raises(UserError, match="not a plain LoRA"):
        LanguageModel(
            get_peft_model(plain.hf, LoraConfig(r=2, target_modules=["lm_head"], use_dora=True)), plain.config
        )


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("source", ["folder", "gguf", "config"])
def test_quantised_base_trains(kind, source, tmp_path):
    if source == "folder":
        save_tiny(tmp_path / "m")
        where = {"path": str(tmp_path / "m")}
    elif source == "gguf":
        write_gguf(tmp_path / "m.gguf")
        where = {"path": str(tmp_path / "m.gguf")}
    else:
        where = {"config": fields("llama")}
    (doc,) = documents(12)
    lm = LanguageModel.load(ModelConfig(**where, adapter=AdapterConfig(rank=4, quantize=kind)))
    inner = lm.base.model.layers[0].self_attn.q_proj.base_layer
    assert inner.weight.dtype == (torch.uint8 if kind == "nf4" else torch.int8)
    assert lm.head.weight.dtype == torch.float32
    counts = lm.parameter_counts()
    plain = LanguageModel.load(ModelConfig(**where, adapter=AdapterConfig(rank=4))).parameter_counts()
    assert counts == plain
    losses = train(lm, doc)
    assert losses[-1] < losses[0] - 1


def test_gradient_checkpointing_over_a_quantised_base():
    (doc,) = documents(12)
    lm = tiny(adapter=AdapterConfig(rank=4, quantize="nf4"), gradient_checkpointing=True)
    losses = train(lm, doc)
    assert losses[-1] < losses[0] - 1


def test_quantisation_without_bitsandbytes(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"nf4 needs bitsandbytes: pip install 'lit-reason\[quant\]'"):
        tiny(adapter=AdapterConfig(quantize="nf4"))
