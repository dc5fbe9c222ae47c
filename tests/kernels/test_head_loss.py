"""What the one-pass token loss promises beyond the operator table: memory, products, dtypes, slopes."""

import math

import pytest
import torch
from torch.nn import functional as F
from watching import Sizes

from lit_reason.kernels.head_loss import linear_token_loss

GRADS = ("hidden", "weight", "token_weight", "bias")


def make(S, D, V, dtype=torch.float64, *, seed=0, bias=True, scale=1.0, shift=0.0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    targets = torch.randint(0, V, (S,), generator=g)
    if S > 1:
        targets[0], targets[-1] = 0, V - 1
    weights = draw(S)
    weights[::3] = 0.0
    return {
        "hidden": (draw(S, D) * scale).to(dtype),
        "weight": draw(V, D).to(dtype),
        "targets": targets,
        "token_weight": weights if dtype == torch.float64 else weights.float(),
        "bias": (draw(V) + shift).to(dtype) if bias else None,
    }


def run(case, **options):
    """Outputs and the gradients of hidden, weight, token_weight and bias, as a flat dict."""
    leaves = {k: None if case[k] is None else case[k].detach().clone().requires_grad_() for k in GRADS}
    out = linear_token_loss(
        leaves["hidden"],
        leaves["weight"],
        case["targets"],
        leaves["token_weight"],
        bias=leaves["bias"],
        **options,
    )
    out.loss_sum.backward()
    result = {"loss": out.loss_sum.detach(), "logp": out.logp_S, "entropy": out.entropy_S, "hit": out.hit_S}
    return result | {"d_" + k: v.grad for k, v in leaves.items() if v is not None}


def exact(case, **options):
    """The same through materialised float64 logits and autograd."""
    wide = {k: v.double() if v is not None and v.is_floating_point() else v for k, v in case.items()}
    return run(wide, backend="reference", **options)


def assert_close(ours, theirs, tolerance):
    assert torch.equal(ours["hit"], theirs["hit"])
    for name, want in theirs.items():
        if name == "hit":
            continue
        gap = (ours[name].double() - want).norm()
        assert gap <= tolerance * max(float(want.norm()), 1e-3), (name, float(gap), float(want.norm()))


def test_reference_backend_is_weighted_cross_entropy():
    case = make(11, 5, 13)
    hidden, weight, bias = (case[k].clone().requires_grad_() for k in ("hidden", "weight", "bias"))
    nll = F.cross_entropy(hidden @ weight.T + bias, case["targets"], reduction="none")
    loss = (nll * case["token_weight"]).sum()
    want = torch.autograd.grad(loss, (hidden, weight, bias))
    ours = run(case, backend="reference")
    torch.testing.assert_close(ours["loss"], loss.detach())
    torch.testing.assert_close(ours["logp"], -nll.detach())
    for name, grad in zip(("hidden", "weight", "bias"), want, strict=True):
        torch.testing.assert_close(ours["d_" + name], grad)
    p = (hidden @ weight.T + bias).softmax(-1)
    torch.testing.assert_close(ours["entropy"], torch.distributions.Categorical(probs=p).entropy().detach())


def test_large_vocabulary_uses_several_row_blocks(monkeypatch):
    monkeypatch.setattr("lit_reason.kernels.row_passes.SCRATCH_BYTES_ON_CPU", 3 * 4 * 1000)  # three rows
    case = make(37, 8, 1000, torch.float32)
    assert_close(run(case, chunk_rows=20, softcap=3.0), exact(case, softcap=3.0), 2e-6)


def test_row_of_minus_infinity_is_not_nan():
    hidden = torch.zeros(2, 4)
    out = linear_token_loss(hidden, torch.ones(6, 4), torch.tensor([1, 2]), torch.ones(2), bias=torch.full((6,), -1e38))
    torch.testing.assert_close(out.logp_S, torch.full((2,), -math.log(6)))
    out = linear_token_loss(
        hidden, torch.ones(6, 4), torch.tensor([1, 2]), torch.ones(2), bias=torch.full((6,), -math.inf)
    )
    assert not torch.isnan(out.logp_S).any() and not torch.isnan(out.entropy_S).any()


def test_first_of_equal_maxima_is_the_hit():
    weight = torch.tensor([[1.0], [2.0], [2.0], [0.0]])
    out = linear_token_loss(torch.ones(2, 1), weight, torch.tensor([1, 2]), torch.ones(2))
    assert out.hit_S.tolist() == [True, False]


def test_a_certain_token_has_no_entropy():
    out = linear_token_loss(torch.full((1, 1), 1e4), torch.eye(5)[:, :1], torch.tensor([0]), torch.ones(1))
    assert float(out.entropy_S) == 0.0 and float(out.logp_S) == 0.0


def test_every_gradient_entry_equals_a_central_difference():
    case, step = make(5, 4, 7), 1e-6
    options = {"temperature": 0.7, "softcap": 3.0, "chunk_rows": 2}
    grads = run(case, **options)
    for name in GRADS:
        slopes = torch.empty_like(case[name])
        for i in range(slopes.numel()):
            ends = []
            for sign in (step, -step):
                moved = case[name].clone()
                moved.view(-1)[i] += sign
                ends.append(run(case | {name: moved}, **options)["loss"])
            slopes.view(-1)[i] = (ends[0] - ends[1]) / (2 * step)
        torch.testing.assert_close(grads["d_" + name], slopes, rtol=1e-6, atol=1e-8)


def test_directional_derivative():
    case = make(37, 8, 129)
    grads, step = run(case, chunk_rows=10), 1e-5
    direction = torch.randn(129, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    ends = [run(case | {"weight": case["weight"] + s * direction}, chunk_rows=10)["loss"] for s in (step, -step)]
    slope = (ends[0] - ends[1]) / (2 * step)
    torch.testing.assert_close((grads["d_weight"] * direction).sum(), slope, rtol=1e-7, atol=1e-8)


def test_backward_runs_once():
    case = make(5, 8, 7)
    hidden = case["hidden"].requires_grad_()
    out = linear_token_loss(hidden, case["weight"], case["targets"], case["token_weight"])
    out.loss_sum.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward ran twice"):
        out.loss_sum.backward()
    assert not any(t.requires_grad for t in out[1:4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_empty_selection_keeps_the_graph(dtype):
    hidden = torch.empty(0, 8, dtype=dtype, requires_grad=True)
    weight = torch.randn(7, 8, dtype=dtype, requires_grad=True)
    out = linear_token_loss(hidden, weight, torch.empty(0, dtype=torch.long), torch.empty(0))
    assert out.loss_sum.item() == 0.0
    out.loss_sum.backward()
    assert torch.equal(weight.grad, torch.zeros(7, 8, dtype=dtype)) and hidden.grad.shape == (0, 8)


def test_only_the_needed_products_run():
    S, rows = 40, 10
    case = make(S, 8, 50, torch.float32, bias=False)

    def products(hidden_grad, weight_grad, mode):
        hidden = case["hidden"].clone().requires_grad_(hidden_grad)
        weight = case["weight"].clone().requires_grad_(weight_grad)
        with mode, Sizes() as seen:
            out = linear_token_loss(hidden, weight, case["targets"], case["token_weight"], chunk_rows=rows)
        assert out.loss_sum.requires_grad == ((hidden_grad or weight_grad) and isinstance(mode, torch.enable_grad))
        return seen.products / (S / rows)

    assert products(True, True, torch.enable_grad()) == 3
    assert products(True, False, torch.enable_grad()) == 2
    assert products(False, True, torch.enable_grad()) == 2
    assert products(False, False, torch.enable_grad()) == 1
    assert products(True, True, torch.no_grad()) == 1


def test_weight_gradient_accumulates_in_float32():
    """Many equal small additions: a bfloat16 running total would stop growing."""
    S = 512
    hidden = torch.ones(S, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    out = linear_token_loss(hidden, weight, torch.zeros(S, dtype=torch.long), torch.ones(S), chunk_rows=1)
    out.loss_sum.backward()
    assert weight.grad.tolist() == [[-S / 2], [S / 2]]


def test_autocast_computes_in_its_dtype_and_returns_parameter_dtype():
    case = make(37, 16, 129, torch.float32, scale=0.25)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = run(case, chunk_rows=10)
    by_hand = run({k: v.bfloat16() if k in ("hidden", "weight") else v for k, v in case.items()}, chunk_rows=10)
    assert ours["d_weight"].dtype == ours["d_hidden"].dtype == torch.float32
    assert torch.equal(ours["logp"], by_hand["logp"])
    assert not torch.equal(ours["logp"], run(case, chunk_rows=10)["logp"])
    assert_close(ours, exact(case), 2e-2)


def test_mixed_dtypes_use_the_weights():
    case = make(9, 8, 33, torch.float32)
    case["hidden"] = case["hidden"].bfloat16()
    ours = run(case)
    assert ours["d_hidden"].dtype == torch.bfloat16 and ours["logp"].dtype == torch.float32
    torch.testing.assert_close(ours["logp"].double(), exact(case)["logp"], rtol=1e-5, atol=1e-5)
