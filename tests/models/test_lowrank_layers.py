"""Low-rank layers in place of dense ones: every family, both ways in, both ways out."""

import json
import math

import pytest
import torch
from tiny_models import FAMILIES, documents, pack, save_tiny, tiny, word_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM

from lit_reason.errors import UserError
from lit_reason.models.config import AdapterConfig, LowRankConfig, ModelConfig
from lit_reason.models.export import export_model
from lit_reason.models.language_model import LanguageModel
from lit_reason.models.lowrank import LowRankLinear, lowrank_layers

PLAIN = LowRankConfig(rank=4, alpha=8.0)
SPARSE = LowRankConfig(rank=4, alpha=8.0, sparse_density=0.1)


def loss_of(lm, doc):
    ids, positions, edges = pack(doc)
    rows = torch.arange(len(ids) - 1)
    return lm(ids, positions, edges, rows, ids[1:], torch.ones(len(rows))).loss_sum


def logits(hf, ids):
    with torch.no_grad():
        return hf.eval()(input_ids=torch.tensor([ids])).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_and_mlp_of_every_family_are_replaced_and_train(family):
    lm, dense = tiny(family, lowrank=PLAIN), tiny(family)
    linear = {
        name for name, m in dense.base.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"
    } - {"lm_head", "embed_out"}
    assert {name for name, _ in lowrank_layers(lm.base)} == linear and len(linear) >= 8
    kept = dict(dense.base.named_parameters())
    for name, parameter in lm.base.named_parameters():
        assert parameter.requires_grad
        if name in kept and not name.endswith("bias"):
            assert torch.equal(parameter, kept[name])  # embeddings and norms are those of the dense model
    loss_of(lm, documents(9)[0]).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in lm.named_parameters() if "position" not in n)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", [PLAIN, SPARSE], ids=["plain", "sparse"])
def test_export_is_an_ordinary_model_with_the_same_logits(tmp_path, family, settings):
    lm = tiny(family, lowrank=settings)
    for _, layer in lowrank_layers(lm.base):
        nn.init.normal_(layer.out_factor, std=0.3)
        if layer.bias is not None:
            nn.init.normal_(layer.bias)
    export_model(lm, word_tokenizer(), tmp_path / "out")
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())  # no key missing, none too many
    ids = documents(12)[0]
    torch.testing.assert_close(logits(again, ids), logits(lm.hf, ids), rtol=1e-4, atol=1e-4)
    assert not list(lowrank_layers(again)) and list(lowrank_layers(lm.base))


def test_export_in_bfloat16_is_rounded_once(tmp_path):
    lm = tiny(lowrank=PLAIN)
    export_model(lm, None, tmp_path / "out", dtype="bfloat16")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    for name, layer in lowrank_layers(lm.base):
        exact = layer.scale * layer.out_factor.detach().double() @ layer.in_factor.detach().double().t()
        assert torch.equal(again.get_submodule(name).weight, exact.float().bfloat16())


@pytest.mark.parametrize("settings", [PLAIN, SPARSE], ids=["plain", "sparse"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_factored_folder_is_read_back_exactly_and_refused_by_dense_loaders(tmp_path, family, settings):
    lm = tiny(family, lowrank=settings)
    export_model(lm, word_tokenizer(), tmp_path / "out", merge=False)
    torch.manual_seed(7)
    again = LanguageModel.load(ModelConfig(path=str(tmp_path / "out")))
    assert again.config.lowrank.rank == 4 and again.config.lowrank.alpha == 8.0
    assert again.state_dict().keys() == lm.state_dict().keys()
    for name, value in lm.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    ids = documents(12)[0]
    assert torch.equal(logits(again.hf, ids), logits(lm.hf, ids))
    half = LanguageModel.load(ModelConfig(path=str(tmp_path / "out"), dtype="bfloat16"))
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    with pytest.raises(OSError):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_factored_folder_that_does_not_fit_is_refused(tmp_path):
    out = export_model(tiny(lowrank=PLAIN), None, tmp_path / "out", merge=False)
    with pytest.raises(UserError, match="lowrank.rank is 5, but .* holds factors with 4"):
        LanguageModel.load(ModelConfig(path=str(out), lowrank=LowRankConfig(rank=5, alpha=8.0)))
    settings = json.loads((out / "lowrank.json").read_text())
    (out / "lowrank.json").write_text(json.dumps(settings | {"targets": settings["targets"][1:]}))
    with pytest.raises(UserError, match="does not hold the weights of its own config"):
        LanguageModel.load(ModelConfig(path=str(out)))
    (out / "lowrank.json").write_text(json.dumps(settings | {"rank": 3}))
    with pytest.raises(UserError, match="size mismatch"):
        LanguageModel.load(ModelConfig(path=str(out)))
    (out / "factors.safetensors").unlink()
    with pytest.raises(UserError, match="factors.safetensors is missing"):
        LanguageModel.load(ModelConfig(path=str(out)))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_dense_checkpoint_becomes_its_best_approximation(tmp_path, family):
    dense = save_tiny(tmp_path / family, family)
    for density, full in ((0.0, 8), (0.2, 8), (0.0, 16)):
        settings = LowRankConfig(rank=full, alpha=3.0, sparse_density=density)
        lm = LanguageModel.load(ModelConfig(path=str(tmp_path / family), lowrank=settings))
        for name, layer in lowrank_layers(lm.base):
            weight = dense.base.get_submodule(name).weight.detach().double()
            u, s, vh = torch.linalg.svd(weight, full_matrices=False)
            best = u[:, :full] * s[:full] @ vh[:full]
            if density:
                at = torch.zeros(weight.numel(), dtype=torch.bool)
                at[layer.positions.long()] = True
                at = at.view(layer.out_features, layer.in_features)
                at = at.t() if layer.transposed else at
                best = torch.where(at, weight, best)
            torch.testing.assert_close(layer.dense_weight().double(), best, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(
                layer.out_factor.t() @ layer.out_factor, layer.in_factor.t() @ layer.in_factor, rtol=1e-3, atol=1e-4
            )


def test_full_rank_factors_of_a_checkpoint_give_its_logits(tmp_path):
    dense = save_tiny(tmp_path / "m", "qwen2")
    targets = ["q_proj", "o_proj", "mlp"]  # key and value projections are narrower
    lm = LanguageModel.load(ModelConfig(path=str(tmp_path / "m"), lowrank=LowRankConfig(rank=32, targets=targets)))
    ids = documents(12)[0]
    torch.testing.assert_close(logits(lm.hf, ids), logits(dense.hf, ids), rtol=1e-3, atol=1e-3)


def test_first_weights_follow_the_papers():
    changes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    for settings, zero in ((PLAIN, False), (SPARSE, True), (LowRankConfig(rank=4, init="zero"), True)):
        lm = tiny(lowrank=settings, changes=changes)
        for _, layer in lowrank_layers(lm.base):
            a, b = layer.in_factor, layer.out_factor
            assert a.abs().max() <= layer.in_features**-0.5
            assert a.std().item() == pytest.approx(layer.in_features**-0.5 / 3**0.5, rel=0.2)
            assert (b == 0).all() if zero else b.std().item() == pytest.approx(0.5 / 3**0.5, rel=0.2)
            if settings.sparse_density:
                assert layer.values.numel() == math.floor(0.1 * layer.in_features * layer.out_features)
                assert layer.values.abs().max() <= layer.in_features**-0.5 and layer.values.std() > 0
    assert next(lowrank_layers(lm.base))[1].scale == 8.0


def test_the_seed_decides_and_layers_differ():
    one, two, other = tiny(lowrank=SPARSE), tiny(lowrank=SPARSE), tiny(lowrank=SPARSE, seed=1)
    for (name, a), (_, b), (_, c) in zip(*(lowrank_layers(m.base) for m in (one, two, other)), strict=True):
        assert torch.equal(a.in_factor, b.in_factor) and torch.equal(a.positions, b.positions), name
        assert not torch.equal(a.in_factor, c.in_factor) and not torch.equal(a.positions, c.positions)
    layers = [layer for name, layer in lowrank_layers(one.base) if name.endswith("q_proj")]
    assert not torch.equal(layers[0].in_factor, layers[1].in_factor)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    LanguageModel.load(one.config)
    assert torch.equal(torch.get_rng_state(), before)


def test_positions_come_from_a_loaded_state(monkeypatch):
    monkeypatch.setattr("lit_reason.kernels.lowrank.BLOCK_ROWS", 4)  # several blocks, whose edges must be found anew
    one, other = tiny(lowrank=SPARSE), tiny(lowrank=SPARSE, seed=1)
    doc = documents(9)[0]
    with torch.no_grad():
        loss_of(other, doc)  # remembers where its own blocks begin
        other.load_state_dict(one.state_dict())
        assert torch.equal(loss_of(other, doc), loss_of(one, doc))


def test_on_the_meta_device_nothing_is_allocated():
    with torch.device("meta"):
        lm = LanguageModel.load(ModelConfig(config=tiny().base.config.to_dict(), lowrank=SPARSE))
    assert all(p.is_meta for p in lm.parameters()) and len(list(lowrank_layers(lm.base))) == 14


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"rank": 0}, "rank is 0; it must be at least 1"),
        ({"rank": 17}, r"rank is 17, but model.layers.0.self_attn.k_proj is 16 x 32: the rank may be at most 16"),
        ({"rank": 33, "targets": ["q_proj"]}, "at most 32 there; lower it, or leave the layer out"),
        ({"alpha": 0.0}, "alpha is 0.0; it must be positive"),
        ({"sparse_density": 1.0}, "sparse_density is 1.0; it is a share"),
        ({"targets": ["q_prj"]}, r"no linear layer has 'q_prj' in its path \(did you mean 'q_proj'\?\)"),
        ({"targets": ["mlp", "atn"]}, "no linear layer has 'atn' in its path"),
        ({"targets": []}, "targets: empty"),
        ({"targets": "lm_head"}, "matches the output layer, which stays dense"),
    ],
)
def test_settings_that_cannot_work_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        tiny("qwen2", lowrank=LowRankConfig(**{"rank": 4, **settings}))


def test_tied_layers_and_adapters_are_refused(monkeypatch):
    model = tiny("qwen2").hf
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    monkeypatch.setattr("lit_reason.models.language_model.load_model", lambda *_: model)
    tied = "layers.0.mlp.up_proj shares its weight with model.layers.1.mlp.up_proj; a tied layer"
    with pytest.raises(UserError, match=tied):
        tiny("qwen2", lowrank=PLAIN)
    assert not list(lowrank_layers(model))  # nothing was changed
    with pytest.raises(UserError, match="both given"):
        tiny("qwen2", lowrank=PLAIN, adapter=AdapterConfig())


def test_targets_choose_layers_by_words_of_their_path():
    lm = tiny("qwen2", lowrank=LowRankConfig(rank=4, targets=["self_attn", "layers.1.mlp.up_proj"]))
    names = [name for name, _ in lowrank_layers(lm.base)]
    assert len(names) == 9 and "model.layers.1.mlp.up_proj" in names
    assert isinstance(lm.base.model.layers[0].mlp.up_proj, nn.Linear)
    assert isinstance(lm.base.model.layers[0].self_attn.q_proj, LowRankLinear)
