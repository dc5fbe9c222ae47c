"""The chunked token loss against materialised logits in float64, and the promises it makes beyond that."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lit_reason.errors import UserError
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


@pytest.mark.parametrize("S, D, V", itertools.product((1, 5, 37), (8, 72), (7, 127, 129, 1000)))
def test_float64_equals_reference(S, D, V):
    case = make(S, D, V, seed=S * V + D)
    assert_close(run(case, chunk_rows=10), exact(case), 1e-12)


@pytest.mark.parametrize("temperature, softcap", [(0.3, None), (2.0, None), (1.0, 30.0), (0.3, 1.5), (2.0, 5.0)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
def test_temperature_and_softcap(dtype, tolerance, temperature, softcap):
    case = make(37, 16, 129, dtype, scale=0.25)  # logits near 1: bfloat16 rounds them in proportion to their size
    options = {"temperature": temperature, "softcap": softcap}
    assert_close(run(case, chunk_rows=8, **options), exact(case, **options), tolerance)


def test_chunk_size_does_not_matter():
    case = make(37, 8, 129, torch.float32)
    whole = run(case, chunk_rows=1000)
    for rows in (1, 2, 7, 36, 37):
        part = run(case, chunk_rows=rows)
        for name in whole:
            torch.testing.assert_close(part[name], whole[name], rtol=1e-5, atol=1e-6)


def test_large_vocabulary_uses_several_row_blocks(monkeypatch):
    monkeypatch.setattr("lit_reason.kernels.row_passes.SCRATCH_BYTES_ON_CPU", 3 * 4 * 1000)  # three rows
    case = make(37, 8, 1000, torch.float32)
    assert_close(run(case, chunk_rows=20, softcap=3.0), exact(case, softcap=3.0), 2e-6)


def test_non_contiguous_inputs():
    case = make(10, 8, 127)
    case["hidden"] = torch.randn(10, 16, dtype=torch.float64)[:, ::2]
    case["weight"] = torch.randn(8, 127, dtype=torch.float64).T
    assert not case["hidden"].is_contiguous() and not case["weight"].is_contiguous()
    hidden, weight = case["hidden"].detach().requires_grad_(), case["weight"].detach().requires_grad_()
    out = linear_token_loss(hidden, weight, case["targets"], case["token_weight"], bias=case["bias"], chunk_rows=4)
    out.loss_sum.backward()
    want = exact(case)
    torch.testing.assert_close(hidden.grad, want["d_hidden"])
    torch.testing.assert_close(weight.grad, want["d_weight"])


@pytest.mark.parametrize("scale, shift", [(1e3, 0.0), (1.0, -1e4), (1e3, 1e4)])
def test_extreme_logits_stay_finite(scale, shift):
    case = make(37, 8, 129, scale=scale, shift=shift)
    ours, want = run(case, chunk_rows=10), exact(case)
    assert all(torch.isfinite(v).all() for v in ours.values() if v.is_floating_point())
    assert_close(ours, want, 1e-9)
    narrow = run({k: v.float() if v.is_floating_point() else v for k, v in case.items()})
    assert all(torch.isfinite(v).all() for v in narrow.values() if v.is_floating_point())


def test_masked_columns_contribute_nothing():
    """A bias of -inf removes a column: same result as without that column, and no NaN in the entropy."""
    case = make(9, 8, 20)
    case["targets"] = case["targets"] % 15
    small = case | {"weight": case["weight"][:15].clone(), "bias": case["bias"][:15].clone()}
    case["bias"][15:] = -math.inf
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in case.items()}
        ours, want = run(cast, chunk_rows=4), run(small, backend="reference")
        assert torch.equal(ours["d_weight"][15:], torch.zeros(5, 8, dtype=dtype))
        assert torch.equal(ours["d_bias"][15:], torch.zeros(5, dtype=dtype))
        for name in ("d_weight", "d_bias"):
            ours[name] = ours[name][:15]
        assert_close(ours, want, tolerance)


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


def test_invariants_of_a_distribution():
    case = make(37, 72, 129, torch.float32, scale=3.0)
    out = run(case, chunk_rows=10)
    assert (out["logp"] <= 0).all()
    assert (out["entropy"] >= 0).all() and (out["entropy"] <= math.log(129) + 1e-5).all()
    one_hot = linear_token_loss(torch.full((1, 1), 1e4), torch.eye(5)[:, :1], torch.tensor([0]), torch.ones(1))
    assert float(one_hot.entropy_S) == 0.0 and float(one_hot.logp_S) == 0.0


def test_gradient_of_the_logits_sums_to_zero():
    """Adding a constant to all logits changes nothing, so the bias gradient of every row sums to 0."""
    case = make(5, 8, 1000, torch.float32)
    for row in range(5):
        one = {k: v[row : row + 1] if k in ("hidden", "targets", "token_weight") else v for k, v in case.items()}
        assert abs(float(run(one)["d_bias"].sum())) < 1e-5 * max(1.0, abs(float(one["token_weight"])))


def test_permuting_rows_permutes_the_outputs():
    case = make(37, 8, 127)
    order = torch.randperm(37, generator=torch.Generator().manual_seed(1))
    shuffled = case | {k: case[k][order] for k in ("hidden", "targets", "token_weight")}
    ours, theirs = run(shuffled, chunk_rows=10), run(case, chunk_rows=10)
    for name in ("logp", "entropy", "hit", "d_hidden", "d_token_weight"):
        torch.testing.assert_close(ours[name], theirs[name][order])
    for name in ("loss", "d_weight", "d_bias"):
        torch.testing.assert_close(ours[name], theirs[name])


def test_selected_rows_equal_all_rows_with_zero_weights():
    case = make(37, 8, 127)
    index = case["token_weight"].nonzero()[:, 0]
    assert 0 < len(index) < 37
    selected = case | {k: case[k][index] for k in ("hidden", "targets", "token_weight")}
    ours, dense = run(selected, chunk_rows=10), run(case, chunk_rows=10)
    for name in ("loss", "d_weight", "d_bias"):
        torch.testing.assert_close(ours[name], dense[name])
    torch.testing.assert_close(ours["d_hidden"], dense["d_hidden"][index])
    rest = case["token_weight"] == 0
    assert torch.equal(dense["d_hidden"][rest], torch.zeros(int(rest.sum()), 8, dtype=torch.float64))


def test_accumulation_over_micro_batches_equals_one_batch():
    case = make(30, 8, 127)
    weight = case["weight"].clone().requires_grad_()
    for part in torch.arange(30).split(7):
        out = linear_token_loss(
            case["hidden"][part], weight, case["targets"][part], case["token_weight"][part], bias=case["bias"]
        )
        out.loss_sum.backward()
    torch.testing.assert_close(weight.grad, run(case)["d_weight"])


def test_upstream_factor_scales_every_gradient():
    case = make(9, 8, 127)
    leaves = {k: case[k].clone().requires_grad_() for k in GRADS}
    out = linear_token_loss(
        leaves["hidden"], leaves["weight"], case["targets"], leaves["token_weight"], bias=leaves["bias"]
    )
    (-2.5 * out.loss_sum).backward()
    once = run(case)
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, -2.5 * once["d_" + name])


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


class Sizes(TorchDispatchMode):
    """Records the element count of every tensor that an operation returns, and how many matrix products ran."""

    def __init__(self):
        super().__init__()
        self.largest, self.products, self.ops = 0, 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.ops.append(func.overloadpacket)
        self.products += func.overloadpacket in (
            torch.ops.aten.mm,
            torch.ops.aten.addmm_,
            torch.ops.aten.addmm,
        )
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_all_rows_never_exist(dtype):
    S, D, V, rows = 600, 4, 50, 64
    case = make(S, D, V, dtype)
    leaves = [case[k].clone().requires_grad_() for k in GRADS]
    with Sizes() as seen:
        out = linear_token_loss(leaves[0], leaves[1], case["targets"], leaves[2], bias=leaves[3], chunk_rows=rows)
        forward_ops = len(seen.ops)
        (out.loss_sum * 2).backward()
    assert len(seen.ops) > forward_ops  # the backward pass was watched too
    assert seen.largest <= rows * V
    with Sizes() as seen:  # the measure itself notices a materialised product
        linear_token_loss(*leaves[:2], case["targets"], leaves[2], bias=leaves[3], backend="reference")
    assert seen.largest >= S * V


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


def test_environment_forces_a_backend(monkeypatch):
    case = make(40, 8, 50)
    args = [case[k] for k in ("hidden", "weight", "targets", "token_weight")]
    monkeypatch.setenv("LIT_REASON_KERNELS", "reference")
    with Sizes() as seen:
        linear_token_loss(*args, chunk_rows=4)
    assert seen.largest >= 40 * 50
    monkeypatch.setenv("LIT_REASON_KERNELS", "refrence")
    with pytest.raises(UserError, match=r"LIT_REASON_KERNELS is 'refrence'.*did you mean 'reference'"):
        linear_token_loss(*args)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden": torch.zeros(5)}, "hidden_SD is of shape"),
        ({"hidden": torch.zeros(5, 8, dtype=torch.long)}, "hidden_SD is of dtype"),
        ({"weight": torch.zeros(7, 9)}, r"weight_VD is of shape \(7, 9\); it must be \[V, 8\]"),
        ({"targets": torch.zeros(4, dtype=torch.long)}, "targets_S is of shape"),
        ({"targets": torch.zeros(5)}, "targets_S is of dtype"),
        ({"targets": torch.tensor([0, 1, 2, 3, 7])}, r"targets_S is in \[0, 7\]; it must be in \[0, 7\)"),
        ({"targets": torch.tensor([0, 1, 2, 3, -100])}, r"targets_S is in \[-100, 3\]"),
        ({"token_weight": torch.zeros(5, dtype=torch.long)}, "token_weight_S is of dtype"),
        ({"token_weight": torch.zeros(5, 1)}, "token_weight_S is of shape"),
        ({"bias": torch.zeros(8)}, "bias is of shape"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"softcap": -1.0}, "softcap is -1.0"),
        ({"chunk_rows": 0}, "chunk_rows is 0"),
        ({"backend": "tritn"}, "backend is 'tritn'; allowed: auto, torch, triton, reference"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    case = {
        "hidden": torch.zeros(5, 8),
        "weight": torch.zeros(7, 8),
        "targets": torch.zeros(5, dtype=torch.long),
        "token_weight": torch.ones(5),
    } | change
    positional = [case.pop(k) for k in ("hidden", "weight", "targets", "token_weight")]
    with pytest.raises(UserError, match=message):
        linear_token_loss(*positional, **case)
