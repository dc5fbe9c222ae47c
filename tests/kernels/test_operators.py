"""Every operation of the table: forward, backward, compiled, in poisoned memory, and the promises between settings."""

import itertools
import math
import random

import operators
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operators import BY_NAME, OPERATORS, Case, check, compare, inputs_of, ours, theirs
from watching import Sizes

LOSSES = [operator for operator in OPERATORS if operator.name != "token_logprobs"]
every = pytest.mark.parametrize("operator", OPERATORS, ids=[operator.name for operator in OPERATORS])


@every
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("temperature, softcap", [(1.0, None), (0.3, None), (2.0, 5.0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_forward_and_backward(operator, dtype, temperature, softcap, backend):
    # Rounding is in proportion to the size of the logits, which a low temperature makes large.
    scale = min(1.0, temperature) * (0.25 if dtype == torch.bfloat16 else 1.0)
    check(operator, Case(dtype=dtype, temperature=temperature, softcap=softcap, scale=scale, backend=backend))


@every
@pytest.mark.parametrize("V", [1, 7, 127, 129, 1000])
def test_sizes(operator, V):
    for S, D in itertools.product((0, 1, 5, 37), (8, 72)):
        check(operator, Case(S=S, D=D, V=V, seed=S * V + D, bias=D == 8, scale=0.2))


@every
def test_fresh_inputs(operator):
    """New random numbers on each run; the seed stands in the failure."""
    check(operator, Case(S=23, V=61, seed=random.SystemRandom().randrange(2**31), softcap=8.0))


@every
def test_all_memory_is_written_and_no_input_is(operator):
    """Fresh memory is filled with NaN; inputs lie between rows of a sentinel, and stay as they are."""
    case, guarded = Case(dtype=torch.float32), {}
    for name, value in inputs_of(case).items():
        if value is not None:
            room = torch.full((value.shape[0] + 2, *value.shape[1:]), 77, dtype=value.dtype)
            room[1:-1] = value
            guarded[name] = room
    before = {name: room.clone() for name, room in guarded.items()}
    torch.use_deterministic_algorithms(True)  # with it, torch.utils.deterministic fills fresh memory with NaN
    try:
        assert torch.empty(3).isnan().all()
        got = ours(operator, case, **{name: room[1:-1] for name, room in guarded.items()})
    finally:
        torch.use_deterministic_algorithms(False)
    compare(got, theirs(operator, case), operators.TOLERANCE[torch.float32])
    for name, room in guarded.items():
        assert torch.equal(room, before[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operator", LOSSES, ids=[operator.name for operator in LOSSES])
def test_logits_of_all_rows_never_exist(operator, dtype):
    case = Case(S=600, D=4, V=100, chunk_rows=64, dtype=dtype)
    with Sizes() as seen:
        ours(operator, case)
    assert seen.products and seen.largest <= 64 * case.V
    with Sizes() as seen:  # the measure itself notices a materialised product
        ours(operator, case._replace(backend="reference"))
    assert seen.largest >= case.S * case.V


@every
def test_strides_do_not_matter(operator):
    case = Case()
    x = inputs_of(case)
    wide = torch.zeros(case.S, 2 * case.D, dtype=torch.float64)
    wide[:, ::2] = x["hidden"]
    strided = {"hidden": wide[:, ::2], "weight": x["weight"].T.contiguous().T}
    assert not any(t.is_contiguous() for t in strided.values())
    out = operator.call(x | {"softcap": None} | strided, operators.settings_of(case))
    torch.testing.assert_close(out["loss"], theirs(operator, case)["loss"])


@every
@settings(max_examples=15, deadline=None)
@given(S=st.integers(1, 40), chunk=st.integers(1, 50), seed=st.integers(0, 2**31))
def test_chunk_size_does_not_matter(operator, S, chunk, seed):
    case = Case(S=S, V=33, D=4, seed=seed)
    compare(ours(operator, case._replace(chunk_rows=chunk)), ours(operator, case._replace(chunk_rows=S)), 1e-12)


@every
def test_permuting_rows_permutes_the_outputs(operator):
    case = Case()
    order = torch.randperm(case.S, generator=torch.Generator().manual_seed(1))
    rows = {k: v[order] for k, v in inputs_of(case).items() if v is not None and v.shape[0] == case.S}
    got, want = ours(operator, case, **rows), ours(operator, case)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value[order] if value.ndim and value.shape[0] == case.S else value)


@every
def test_selected_rows_equal_all_rows_with_zero_weights(operator):
    case = Case()
    x = inputs_of(case)
    index = x["token_weight"].nonzero()[:, 0]
    assert 0 < len(index) < case.S
    x["advantage"][x["token_weight"] == 0] = 0.0  # token_logprobs weights its entropies by it
    per_row = {k: v[index] for k, v in x.items() if v is not None and v.shape[0] == case.S}
    hidden = ("hidden", "hidden_t", "hidden_ref")
    selected = per_row | {name: x[name] for name in hidden}  # whole; the operation selects
    how = operators.settings_of(case) | {"index_S": index}
    got = operators.run(operator.call, x | selected | {"softcap": None}, how)
    dense = ours(operator, case, advantage=x["advantage"])
    for name in ("loss", "d_hidden", "d_weight", "d_bias"):
        torch.testing.assert_close(got[name], dense[name])
    assert torch.equal(got["d_hidden"][x["token_weight"] == 0], torch.zeros(case.S - len(index), case.D).double())
    torch.testing.assert_close(got["d_token_weight"], dense["d_token_weight"][index])


@every
def test_micro_batches_add_up_to_the_batch(operator):
    case = Case(S=30)
    x = inputs_of(case)
    total = 0
    for part in torch.arange(30).split(7):
        rows = {k: v[part] for k, v in x.items() if v is not None and v.shape[0] == 30}
        total = total + ours(operator, case, **rows)["d_weight"]
    torch.testing.assert_close(total, ours(operator, case)["d_weight"])


@every
def test_the_gradient_of_the_logits_sums_to_zero(operator):
    """Adding a constant to all logits changes nothing, so the bias gradient of every row sums to 0."""
    case = Case(S=1, V=1000, dtype=torch.float32)
    for seed in range(5):
        got = ours(operator, case._replace(seed=seed))
        assert abs(float(got["d_bias"].sum())) < 1e-5 * max(1.0, float(got["d_bias"].abs().sum()))


@every
@pytest.mark.parametrize("scale, shift", [(1e3, 0.0), (1.0, -1e4), (1e3, 1e4)])
def test_extreme_logits_give_no_nan(operator, scale, shift):
    case = Case(scale=scale, shift=shift)
    x = {"old_logp": theirs(BY_NAME["nll"], case)["logp"] + 0.1}  # a ratio that is not at the end of its range
    for dtype in (torch.float64, torch.float32):
        got = ours(operator, case._replace(dtype=dtype), **(x if dtype == torch.float64 else {}))
        assert not any(value.isnan().any() for value in got.values())
    far = (
        operator.name in ("unlikelihood", "k3_kl", "total", "rkl") or "ppo" in operator.name
    )  # differences of rounding
    if not far:
        compare(ours(operator, case, **x), theirs(operator, case, **x), 1e-8)


@every
def test_a_masked_token_is_as_if_it_were_not_there(operator):
    """A bias of -inf removes a column, with a cap and without."""
    for softcap in (None, 5.0):
        case = Case(V=20, softcap=softcap)
        x = inputs_of(case)
        x["targets"] = x["targets"] % 15
        if "hidden_t" in x:
            x["weight_t"][15:] = 0.0
        few = {name: x[name][:15].clone() for name in ("weight", "bias", "weight_t")}
        x["bias"][15:] = -math.inf
        if operator.name in ("fkl", "rkl") or "jsd" in operator.name:
            return  # the table masks the student alone; both are masked in test_row_passes
        got, want = ours(operator, case, **x), ours(operator, case, **(x | few))
        for name in ("d_weight", "d_bias"):
            assert torch.equal(got[name][15:], torch.zeros_like(got[name][15:]))
            got[name] = got[name][:15]
        compare(got, want, 1e-10)


@every
def test_under_compile(operator):
    """token_logprobs stays inside the graph; the one-pass operations leave it and give the same."""
    case = Case(S=9, V=17)
    x = {k: v.detach().clone().requires_grad_(k in operators.LEAVES) for k, v in inputs_of(case).items()}

    def loss(hidden):
        return operator.call(x | {"hidden": hidden.tanh(), "softcap": 3.0}, operators.settings_of(case))["loss"] * 2

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=operator.name == "token_logprobs")
    got, want = (torch.autograd.grad(f(x["hidden"]), (x["hidden"], x["weight"])) for f in (compiled, loss))
    torch._dynamo.reset()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("operator", LOSSES, ids=[operator.name for operator in LOSSES])
def test_an_upstream_factor_scales_every_gradient(operator):
    x = inputs_of(Case()) | {"softcap": None}
    scaled = operators.run(lambda *a: {"loss": -2.5 * operator.call(*a)["loss"]}, x, operators.settings_of(Case()))
    for name, value in ours(operator, Case()).items():
        if name.startswith("d_"):
            torch.testing.assert_close(scaled[name], -2.5 * value)


def test_invariants_of_a_distribution():
    got = ours(BY_NAME["token_logprobs"], Case(D=72, dtype=torch.float32, scale=3.0))
    assert (got["logp"] <= 0).all() and (got["entropy"] >= 0).all()
    assert (got["entropy"] <= math.log(129) + 1e-5).all()


def test_one_pass_equals_recompute():
    case = Case(temperature=0.7, softcap=6.0)
    x = inputs_of(case)
    got = ours(BY_NAME["own function"], case)

    def recompute(x, how):
        out = operators.token_logprobs(
            x["hidden"], x["weight"], x["targets"], bias=x["bias"], softcap=x["softcap"], **how
        )
        terms = out.entropy_S.square() * x["advantage"] - out.logp_S.exp()
        return {"loss": (x["token_weight"] * terms).sum()}

    want = operators.run(recompute, x | {"softcap": case.softcap}, operators.settings_of(case))
    compare({name: got[name] for name in want}, want, 1e-12)
