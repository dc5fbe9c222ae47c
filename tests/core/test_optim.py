"""Parameter groups and what an optimizer is given."""

import pytest
import torch
from models.tiny_models import tiny
from torch import nn

from lit_reason.core.config import OptimConfig, SubspaceConfig
from lit_reason.core.optim import build_optimizer, hidden_matrices
from lit_reason.errors import UserError
from lit_reason.models.config import LowRankConfig
from lit_reason.models.lowrank import lowrank_layers


def test_vectors_are_not_decayed_and_frozen_weights_are_left_out():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    model[2].weight.requires_grad_(False)
    optimizer = build_optimizer(model, OptimConfig(lr=0.1, weight_decay=0.5))
    decayed, plain = optimizer.param_groups
    assert [p.shape for p in decayed["params"]] == [(4, 3)] and decayed["weight_decay"] == 0.5
    assert len(plain["params"]) == 4 and plain["weight_decay"] == 0.0


def test_nothing_to_train_is_refused():
    model = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(UserError, match="no trainable parameter"):
        build_optimizer(model, OptimConfig())


def test_eight_bit_states_are_bytes():
    pytest.importorskip("bitsandbytes", reason="extra quant is not installed")
    model = nn.Linear(128, 128)
    optimizer = build_optimizer(model, OptimConfig(optimizer="adamw8bit"))
    model(torch.randn(2, 128)).sum().backward()
    optimizer.step()
    assert optimizer.state[model.weight]["state1"].dtype == torch.uint8


class Toy(nn.Module):
    """A model with an embedding, a hidden layer, a norm and an output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.hidden = nn.Linear(4, 6)
        self.norm = nn.LayerNorm(6)
        self.lm = nn.Module()
        self.lm.head = nn.Linear(6, 7, bias=False)

    def forward(self, ids):
        return self.lm.head(self.norm(self.hidden(self.embed(ids))))


@pytest.mark.parametrize("name", ["muon", "galore", "fira", "apollo", "apollo_mini"])
def test_hidden_matrices_are_treated_apart_and_everything_learns(name):
    torch.manual_seed(0)
    model = Toy()
    config = OptimConfig(optimizer=name, lr=0.01, weight_decay=0.1, subspace=SubspaceConfig(rank=2))
    optimizer = build_optimizer(model, config)
    assert hidden_matrices(model) == [model.hidden.weight] == optimizer.param_groups[0]["params"]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert all(decays[id(p)] == (0.1 if p.ndim == 2 else 0.0) for p in model.parameters())
    before = [p.detach().clone() for p in model.parameters()]
    ids = torch.arange(7)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(ids), (ids + 1) % 7)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("name", ["adamw", "muon", "galore", "fira", "apollo", "apollo_mini"])
def test_hidden_matrices_may_have_a_rate_of_their_own(name):
    config = OptimConfig(optimizer=name, lr=0.01, hidden_lr=0.25, subspace=SubspaceConfig(rank=2))
    model = Toy()
    optimizer = build_optimizer(model, config)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates == {id(p): 0.0025 if p is model.hidden.weight else 0.01 for p in model.parameters()}


def test_factors_may_have_a_rate_of_their_own():
    for name in ("adamw", "loro"):
        lm = tiny(lowrank=LowRankConfig(rank=4))
        optimizer = build_optimizer(lm, OptimConfig(optimizer=name, lr=0.01, hidden_lr=0.25))
        factors = {id(f) for _, layer in lowrank_layers(lm) for f in (layer.out_factor, layer.in_factor)}
        slow = {id(p) for group in optimizer.param_groups if group["lr"] == 0.0025 for p in group["params"]}
        assert slow == factors, name


@pytest.mark.parametrize("name, scale", [("galore", 0.25), ("fira", 0.25), ("apollo", 1.0), ("apollo_mini", 128.0)])
def test_the_scale_is_the_literatures_unless_given(name, scale):
    groups = build_optimizer(Toy(), OptimConfig(optimizer=name, subspace=SubspaceConfig(rank=2))).param_groups
    assert groups[0]["scale"] == scale and groups[0]["rank"] == (1 if name == "apollo_mini" else 2)
    given = SubspaceConfig(rank=2, scale=0.5, refresh_steps=7)
    groups = build_optimizer(Toy(), OptimConfig(optimizer=name, subspace=given)).param_groups
    assert groups[0]["scale"] == 0.5 and groups[0]["refresh_steps"] == 7


def test_loro_pairs_the_factors_of_low_rank_layers():
    lm = tiny(lowrank=LowRankConfig(rank=4, alpha=8.0))
    optimizer = build_optimizer(lm, OptimConfig(optimizer="loro", subspace=SubspaceConfig(refresh_steps=9)))
    pairs, *rest = optimizer.param_groups
    layers = [layer for _, layer in lowrank_layers(lm)]
    assert [id(p) for p in pairs["params"]] == [id(p) for la in layers for p in (la.out_factor, la.in_factor)]
    assert pairs["scales"] == [2.0] * len(layers) and pairs["exact_steps"] == 9
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(lm.parameters()))


def test_optimizers_that_do_not_fit_the_model_are_refused():
    with pytest.raises(UserError, match="set lm.lowrank"):
        build_optimizer(Toy(), OptimConfig(optimizer="loro"))
    with pytest.raises(UserError, match="no trainable matrix in a hidden layer"):
        build_optimizer(nn.Embedding(4, 4), OptimConfig(optimizer="muon"))
    with pytest.raises(UserError, match="rank is 128, but a trained matrix is 6 x 4"):
        build_optimizer(Toy(), OptimConfig(optimizer="galore"))


def test_optimizers_that_need_whole_matrices_refuse_shards(monkeypatch):
    monkeypatch.setattr("lit_reason.core.optim.DTensor", nn.Parameter)
    for name in ("galore", "fira", "apollo", "apollo_mini"):
        with pytest.raises(UserError, match=f"{name} needs whole matrices.*strategy ddp.*or optim.optimizer adamw"):
            build_optimizer(Toy(), OptimConfig(optimizer=name, subspace=SubspaceConfig(rank=2)))
    with pytest.raises(UserError, match=r"loro needs whole matrices.*strategy ddp"):
        build_optimizer(tiny(lowrank=LowRankConfig(rank=4)), OptimConfig(optimizer="loro"))
    build_optimizer(Toy(), OptimConfig(optimizer="muon"))
