"""The head over two processes: sharded weights, a sharded vocabulary, adapters on it, and a process without tokens."""

from __future__ import annotations

import os

import pytest
import torch
import two_ranks
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lit_reason.errors import UserError
from lit_reason.kernels import epilogues
from lit_reason.kernels.divergence import linear_divergence
from lit_reason.kernels.head_loss import linear_token_loss
from lit_reason.kernels.token_logprobs import token_logprobs
from lit_reason.kernels.vocab_parallel import sharded_token_logprobs
from lit_reason.models.config import AdapterConfig, ModelConfig
from lit_reason.models.language_model import LanguageModel
from lit_reason.strategies.sharding import shard

pytestmark = [pytest.mark.dist, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]

S, D, V, CUT = 9, 4, 13, 8  # the first process holds 8 tokens of the vocabulary, the second 5
SPLITS = {"both": 5, "one": 9}  # rows of the first process; with "one" the second has none
MODELS = {
    "full": {},
    "tied": {"tie_word_embeddings": True},
    "adapted": {"adapter": ["q_proj", "lm_head"]},
    "adapted and tied": {"adapter": ["q_proj", "lm_head"], "tie_word_embeddings": True},
}


def numbers():
    """Rows, head, bias, targets and weights of the operations' tests; two columns tie for the largest logit."""
    g = torch.Generator().manual_seed(7)
    hidden, weight, bias = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((S, D), (V, D), (V,)))
    targets = torch.tensor([0, 7, 8, 12, 3, 9, 2, 10, 6])
    hidden[3], hidden[5], bias[12], bias[2] = 0.0, 0.0, 9.0, 9.0  # the hit of row 3 is column 2, in the first shard
    return hidden, weight, bias, targets, torch.linspace(-1, 2, S, dtype=torch.float64)


def losses(hidden, weight, rows):
    """One loss of each operation, over some rows."""
    _, _, bias, targets, w = numbers()
    targets, w = targets[rows], w[rows]
    out = token_logprobs(hidden[rows], weight, targets, bias=bias, chunk_rows=2)
    yield (w * out.logp_S.exp() + out.entropy_S).sum()
    loss = epilogues.total(epilogues.dft, epilogues.entropy_bonus(0.3))
    yield linear_token_loss(hidden[rows], weight, targets, w, bias=bias, loss=loss, chunk_rows=2).loss_sum
    yield linear_divergence(hidden[rows], weight, hidden[rows].roll(1, 1), weight, w, kind="rkl", chunk_rows=2).loss_sum


def of_whole_weights():
    """Gradients of hidden and weight, of all rows in one process, operation by operation."""
    hidden, weight, *_ = numbers()
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    return [torch.autograd.grad(loss, (hidden, weight)) for loss in losses(hidden, weight, slice(0, S))]


def of_sharded_weights(rank, split):
    mesh = init_device_mesh("cpu", (2,))
    hidden, weight, *_ = numbers()
    hidden = hidden.requires_grad_()
    weight = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
    rows = slice(0, split) if rank == 0 else slice(split, S)
    found = []
    for loss in losses(hidden, weight, rows):
        d_hidden, d_weight = torch.autograd.grad(loss, (hidden, weight))
        assert isinstance(d_weight, DTensor)
        found.append((d_hidden, d_weight.full_tensor()))
    return found


def of_a_sharded_vocabulary(rank):
    hidden, weight, bias, targets, w = numbers()
    part = slice(0, CUT) if rank == 0 else slice(CUT, V)
    hidden, weight, bias = (t.requires_grad_() for t in (hidden, weight[part].clone(), bias[part].clone()))
    out = sharded_token_logprobs(hidden, weight, targets, bias_shard=bias, temperature=0.7, softcap=8.0, chunk_rows=4)
    (w * out.logp_S.exp() + out.entropy_S).sum().backward()
    none = sharded_token_logprobs(hidden[:0], weight, targets[:0])
    with pytest.raises(UserError, match=r"sharded_token_logprobs: targets_S is in \[0, 13\]; it must be in \[0, 13\)"):
        sharded_token_logprobs(hidden[:2], weight, torch.tensor([0, V]))
    return [t.detach() for t in out], [hidden.grad, weight.grad, bias.grad], none.logp_S.shape


def of_a_model(name, mesh=None, rank=0, silent=False):
    """Gradients of a language model whose head is used by three losses; a silent process trains no token."""
    settings = dict(MODELS[name])
    targets = settings.pop("adapter", None)
    adapter = None if targets is None else AdapterConfig(rank=2, targets=targets)
    torch.manual_seed(3)
    lm = LanguageModel.load(ModelConfig(config=two_ranks.TINY | settings, adapter=adapter))
    for up in (p for n, p in lm.named_parameters() if "lora_B" in n):
        torch.nn.init.normal_(up)
    if mesh is not None:
        shard(lm, mesh)
    total = None
    for own in [0, 1] if mesh is None else [rank]:
        ids = torch.arange(7) * (5 if own == 0 else 3) % 40
        index = torch.tensor([], dtype=torch.long) if own == 1 and silent else torch.tensor([1, 2, 5])
        hidden = lm.hidden(ids, torch.arange(7), torch.tensor([0, 7]))
        loss = lm.head(hidden[index], ids[index + 1], loss=epilogues.dft).loss_sum
        loss = loss + lm.head.token_logprobs(hidden, ids[index + 1], index_S=index).entropy_S.sum()
        total = loss if total is None else total + loss
    assert total is not None
    total.backward()
    whole = lambda g: 2 * g.full_tensor() if isinstance(g, DTensor) else g  # noqa: E731  # fsdp2 takes the mean
    return {n: whole(p.grad) for n, p in lm.named_parameters() if p.grad is not None}


def in_both():
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    return {
        "weights": {name: of_sharded_weights(rank, split) for name, split in SPLITS.items()},
        "vocabulary": of_a_sharded_vocabulary(rank),
        "models": {(name, silent): of_a_model(name, mesh, rank, silent) for name in MODELS for silent in (False, True)},
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each of two processes found."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = two_ranks.run(in_both, tmp_path_factory.mktemp("head"))
    torch.set_num_threads(threads)
    return found


@pytest.mark.parametrize("name", SPLITS)
def test_a_weight_in_shards_gets_the_gradient_of_one_process(results, name):
    for of_op, first, second in zip(of_whole_weights(), *(r["weights"][name] for r in results), strict=True):
        torch.testing.assert_close(first[0] + second[0], of_op[0])
        for found in (first, second):
            torch.testing.assert_close(found[1], of_op[1])


def test_a_vocabulary_in_shards_gives_the_numbers_of_a_whole_one(results):
    hidden, weight, bias, targets, w = numbers()
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    want = token_logprobs(hidden, weight, targets, bias=bias, temperature=0.7, softcap=8.0)
    (w * want.logp_S.exp() + want.entropy_S).sum().backward()
    assert want.hit_S.any() and not want.hit_S.all() and not want.hit_S[3]
    for rank, found in enumerate(results):
        stats, (d_hidden, d_weight, d_bias), empty = found["vocabulary"]
        for got, expected in zip(stats, want, strict=True):
            torch.testing.assert_close(got, expected.detach())
        part = slice(0, CUT) if rank == 0 else slice(CUT, V)
        torch.testing.assert_close(d_hidden, leaves[0].grad)
        torch.testing.assert_close(d_weight, leaves[1].grad[part])
        torch.testing.assert_close(d_bias, leaves[2].grad[part])
        assert empty == (0,)


@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_in_shards_gets_the_gradients_of_one_process(results, name, silent):
    want = of_a_model(name, silent=silent)
    assert ("adapted" not in name) or any("lm_head.lora_A" in n and g.abs().sum() > 0 for n, g in want.items())
    for found in results:
        got = found["models"][name, silent]
        assert got.keys() == want.keys()
        for parameter, gradient in want.items():
            torch.testing.assert_close(got[parameter], gradient, rtol=1e-4, atol=1e-5, msg=parameter)
