"""What is exported is what was trained, in a folder that plain transformers reads."""

import json

import pytest
import torch
from peft import PeftModel
from tiny_gguf import write_gguf
from tiny_models import FAMILIES, documents, pack, tiny, word_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_reason.errors import UserError
from lit_reason.models.config import AdapterConfig, ModelConfig
from lit_reason.models.export import export_model, plain_model
from lit_reason.models.language_model import LanguageModel
from lit_reason.models.loading import load_tokenizer

(DOC,) = documents(10)


def logits(model, doc=DOC):
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([doc])).logits[0]


def stir(lm):
    """Give the adapter (or all weights) new values, as training would."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in lm.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=g) * 0.1)
    return lm


@pytest.mark.parametrize("family", FAMILIES)
def test_full_model_round_trip(family, tmp_path):
    lm = stir(tiny(family))
    export_model(lm, word_tokenizer(), tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.config._attn_implementation in ("sdpa", "eager")
    torch.testing.assert_close(logits(again), logits(lm.hf))
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in lm.hf.state_dict().items()}
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, lm.hf.state_dict()[name]), name


def test_tokenizer_template_and_generation_settings(tmp_path):
    lm = tiny()
    lm.base.generation_config.eos_token_id = [2, 9]
    export_model(lm, word_tokenizer(), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("w5 w6").input_ids == [5, 6]
    messages = [{"role": "user", "content": "w5"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "w5 "
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config.eos_token_id == [2, 9]
    export_model(lm, None, tmp_path / "bare")
    assert {p.name for p in (tmp_path / "bare").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }


def test_tied_embeddings_stay_tied_and_are_written_once(tmp_path):
    from safetensors import safe_open

    lm = stir(tiny("llama"))
    for dtype in (None, "bfloat16"):
        export_model(lm, None, tmp_path / "out", dtype=dtype)
        with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
            assert "lm_head.weight" not in file.keys() and "model.embed_tokens.weight" in file.keys()
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert again.lm_head.weight is again.model.embed_tokens.weight


def test_merged_adapter_equals_the_trained_model(tmp_path):
    lm = stir(tiny(adapter=AdapterConfig(rank=4)))
    want, base = logits(lm.hf), logits(tiny().hf)
    assert (want - base).abs().max() > 0.1
    before = {k: v.clone() for k, v in lm.state_dict().items()}
    export_model(lm, None, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(again), want, rtol=1e-4, atol=1e-4)
    after = lm.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    torch.testing.assert_close(logits(lm.hf), want)


def test_an_export_leaves_the_base_frozen(tmp_path):
    lm = tiny(adapter=AdapterConfig(rank=4))
    before = {name: p.requires_grad for name, p in lm.named_parameters()}
    export_model(lm, None, tmp_path / "out")
    assert {name: p.requires_grad for name, p in lm.named_parameters()} == before
    assert not all(before.values())


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_merged_adapter_of_other_families(family, tmp_path):
    lm = stir(tiny(family, adapter=AdapterConfig(rank=4)))
    export_model(lm, None, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(again), logits(lm.hf), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_an_adapter_on_the_output_layer_is_merged_into_it_alone(family, tmp_path):
    """The output layer of the first is tied to the embedding, which must not get the update."""
    lm = stir(tiny(family, adapter=AdapterConfig(rank=4, targets=["q_proj", "lm_head"])))
    export_model(lm, None, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(again), logits(lm.hf), rtol=1e-4, atol=1e-4)
    assert torch.equal(again.get_input_embeddings().weight, lm.base.get_input_embeddings().weight)
    assert not torch.allclose(again.lm_head.weight, lm.head.weight)


def test_adapter_alone(tmp_path):
    lm = stir(tiny(adapter=AdapterConfig(rank=4)))
    export_model(lm, word_tokenizer(), tmp_path / "out", merge=False)
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("w5").input_ids == [5]
    again = PeftModel.from_pretrained(tiny().hf, tmp_path / "out")
    torch.testing.assert_close(logits(again), logits(lm.hf))


def test_a_trained_copy_of_the_output_layer_is_exported(tmp_path):
    from peft import LoraConfig, get_peft_model

    plain = tiny("qwen3")
    adapter = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    lm = stir(LanguageModel(get_peft_model(plain.hf, adapter), plain.config))
    export_model(lm, None, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(again), logits(lm.hf), rtol=1e-4, atol=1e-4)
    assert torch.equal(again.lm_head.weight, lm.head.weight)


@pytest.mark.parametrize("kind, tolerance", [("nf4", 1e-4), ("int8", 0.1)])
def test_quantised_base_is_dequantised_then_merged(kind, tolerance, tmp_path):
    """nf4 training multiplies by the dequantised weight, so the export agrees; int8 also rounds activations."""
    lm = stir(tiny(adapter=AdapterConfig(rank=4, quantize=kind)))
    export_model(lm, None, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "float32"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    want = logits(lm.hf)
    assert (logits(again) - want).abs().max() <= tolerance * want.abs().max()
    exact = stir(tiny(adapter=AdapterConfig(rank=4)))
    assert (logits(exact.hf) - want).abs().max() > 1e-3  # quantisation itself is visible


def test_quantised_base_exports_in_the_dtype_of_the_products(tmp_path):
    lm = tiny(adapter=AdapterConfig(rank=4, quantize="nf4"), dtype="bfloat16")
    export_model(lm, None, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}


def test_dtype_option(tmp_path):
    lm = tiny()
    export_model(lm, None, tmp_path / "out", dtype="bfloat16")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.dtype == torch.bfloat16 and lm.base.dtype == torch.float32
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, lm.base.state_dict()[name].bfloat16()), name
    with pytest.raises(UserError, match="dtype is 'int4'"):
        export_model(lm, None, tmp_path / "out", dtype="int4")


def test_gguf_model_exports_as_a_plain_folder(tmp_path):
    write_gguf(tmp_path / "m.gguf")
    config = ModelConfig(path=str(tmp_path / "m.gguf"))
    lm, tokenizer = LanguageModel.load(config), load_tokenizer(config)
    export_model(lm, tokenizer, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.gguf"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again), logits(lm.hf))
    reread = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "<|im_start|>the t é\n<|im_end|>"
    assert reread(text).input_ids == tokenizer(text).input_ids
    assert reread.chat_template == tokenizer.chat_template
    assert reread.eos_token == "<|im_end|>"


def test_an_earlier_export_is_replaced_whole(tmp_path):
    out = tmp_path / "out"
    export_model(tiny(seed=1), word_tokenizer(), out)
    (out / "stale.bin").write_text("old")
    lm = tiny(seed=2)
    assert export_model(lm, None, out) == out
    assert not (out / "stale.bin").exists() and not (out / "tokenizer.json").exists()
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(out)), logits(lm.hf))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_foreign_folders_are_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"holds files that are no model export \(thesis.txt\)"):
        export_model(tiny(), None, tmp_path)
    with pytest.raises(UserError, match="is a file"):
        export_model(tiny(), None, tmp_path / "thesis.txt")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_failed_export_leaves_the_old_one(tmp_path, monkeypatch):
    out, old = tmp_path / "out", tiny(seed=1)
    export_model(old, None, out)

    class Broken:
        def save_pretrained(self, folder):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        export_model(tiny(seed=2), Broken(), out)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(out)), logits(old.hf))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_plain_model_shares_weights_and_generates():
    lm = tiny()
    plain = plain_model(lm)
    assert plain.model.layers[0].mlp.up_proj.weight.data_ptr() == lm.base.model.layers[0].mlp.up_proj.weight.data_ptr()
    ids, positions, edges = pack(DOC)
    with torch.no_grad():
        lm.hidden(ids, positions, edges)
    assert lm.attention == lm.base.config._attn_implementation == "documents"
