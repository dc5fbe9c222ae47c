"""The recomputing operation: derivatives of both orders, torch's checks of custom operations, dtypes, memory."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from watching import Sizes

from lit_reason.errors import UserError
from lit_reason.kernels import token_logprobs as module
from lit_reason.kernels.chunks import Settings
from lit_reason.kernels.head_loss import linear_token_loss
from lit_reason.kernels.token_logprobs import token_logprobs


@pytest.fixture
def head():
    """Rows, weight and bias in float64, and targets."""
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()  # noqa: E731
    return (draw(7, 4), draw(11, 4), draw(11)), torch.randint(0, 11, (7,), generator=g)


def test_gradients_of_first_and_second_order_equal_differences():
    """As small as can be with three chunks, the last of them shorter: each number costs a difference."""
    g = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_() for shape in ((5, 3), (6, 3), (6,))
    ]
    targets = torch.randint(0, 6, (5,), generator=g)

    def stats(hidden, weight, bias):
        out = token_logprobs(hidden, weight, targets, bias=bias, softcap=3.0, temperature=0.7, chunk_rows=2)
        return out.logp_S, out.entropy_S

    assert torch.autograd.gradcheck(stats, leaves)
    assert torch.autograd.gradgradcheck(stats, leaves)


def test_a_weight_that_is_learnt_through_the_update(head):
    """Bilevel: the derivative, by token weights, of a loss after one gradient step on the weighted likelihood."""
    (hidden, weight, bias), targets = head
    token_weight = torch.rand(7, dtype=torch.float64).requires_grad_()

    def after_a_step(token_weight, logp_of):
        inner = -(token_weight * logp_of(weight)).sum()
        (step,) = torch.autograd.grad(inner, weight, create_graph=True)
        return -logp_of(weight - 0.1 * step).sum()

    ours = after_a_step(token_weight, lambda w: token_logprobs(hidden, w, targets, bias=bias, chunk_rows=3).logp_S)
    plain = lambda w: torch.log_softmax(hidden @ w.T + bias, -1)[torch.arange(7), targets]  # noqa: E731
    (got,) = torch.autograd.grad(ours, token_weight)
    (want,) = torch.autograd.grad(after_a_step(token_weight, plain), token_weight)
    torch.testing.assert_close(got, want)


def test_one_pass_refuses_to_be_differentiated_twice_and_says_what_can(head):
    (hidden, weight, _), targets = head
    loss = linear_token_loss(hidden, weight, targets, torch.ones(7)).loss_sum
    with pytest.raises(UserError, match="create_graph=True .* token_logprobs"):
        torch.autograd.grad(loss, weight, create_graph=True)


@pytest.mark.parametrize("with_bias, softcap", [(True, None), (False, 2.0)])
def test_torch_finds_the_custom_operations_in_order(head, with_bias, softcap):
    (hidden, weight, bias), targets = head
    bias = bias if with_bias else None
    how = (softcap, 0.5, torch.float64, torch.float64, 3, "torch")
    torch.library.opcheck(module._forward, (hidden, weight, bias, targets, *how))
    plain = [None if t is None else t.detach() for t in (hidden, weight, bias)]
    stats = list(module._forward(*plain, targets, *how))
    g = torch.ones(7, dtype=torch.float64)
    for wanted in ([True, True, with_bias], [False, True, False]):
        torch.library.opcheck(module._gradients, (*plain, targets, stats, g, g, *how, wanted))


def test_logits_of_all_rows_never_exist():
    """Watched inside the custom operations, which hide what they do."""
    hidden, weight, targets = torch.randn(600, 4), torch.randn(50, 4), torch.zeros(600, dtype=torch.long)
    how = Settings(2.0, 1.0, torch.float32, torch.float32, 64, "torch")
    with Sizes() as seen:
        stats = module.chunked_stats(hidden, weight, None, targets, how)
        module.chunked_gradients(hidden, weight, None, targets, stats, stats[0], stats[0], how, [True, True, False])
    assert seen.products >= 40 and seen.largest <= 64 * 50


def test_inside_an_activation_checkpoint(head):
    (hidden, weight, bias), targets = head

    def loss(hidden, weight):
        return token_logprobs(hidden.tanh(), weight, targets, bias=bias, chunk_rows=2).logp_S.exp().sum()

    got = torch.autograd.grad(checkpoint(loss, hidden, weight, use_reentrant=False), (hidden, weight))
    for a, b in zip(got, torch.autograd.grad(loss(hidden, weight), (hidden, weight)), strict=True):
        assert torch.equal(a, b)


def test_a_part_without_a_loss_has_no_gradient(head):
    (hidden, weight, bias), targets = head
    out = token_logprobs(hidden, weight.detach(), targets, bias=bias)
    assert not out.lse_S.requires_grad and not out.hit_S.requires_grad
    out.entropy_S.sum().backward()
    assert hidden.grad is not None and bias.grad is not None and weight.grad is None
    with torch.no_grad():
        assert not token_logprobs(hidden, weight, targets).logp_S.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_empty_selection_keeps_the_graph(dtype):
    hidden = torch.empty(0, 8, dtype=dtype, requires_grad=True)
    weight = torch.randn(7, 8, dtype=dtype, requires_grad=True)
    out = token_logprobs(hidden, weight, torch.empty(0, dtype=torch.long))
    out.logp_S.sum().backward()
    assert torch.equal(weight.grad, torch.zeros(7, 8, dtype=dtype)) and hidden.grad.shape == (0, 8)


def test_unrounded_logits_of_16_bit_products():
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(s, generator=g).bfloat16().requires_grad_() for s in ((37, 64), (300, 64)))
    targets = torch.randint(0, 300, (37,), generator=g)
    exact = torch.log_softmax(hidden.double() @ weight.double().T, -1)[torch.arange(37), targets]
    rounded = token_logprobs(hidden, weight, targets)
    unrounded = token_logprobs(hidden, weight, targets, logits_dtype=torch.float32)
    gap = [float((out.logp_S - exact).detach().abs().max()) for out in (rounded, unrounded)]
    assert gap[1] < 1e-4 < gap[0]
    d_weight = torch.autograd.grad(unrounded.logp_S.sum(), weight)[0]
    want = torch.autograd.grad(exact.sum(), weight)[0]
    assert d_weight.dtype == torch.bfloat16
    assert (d_weight.double() - want.double()).norm() < 1e-2 * want.double().norm()


def test_autocast_decides_the_dtype_of_the_products():
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(9, 8, requires_grad=True)
    targets = torch.arange(5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = token_logprobs(hidden, weight, targets)
    by_hand = token_logprobs(hidden.bfloat16(), weight.bfloat16(), targets)
    assert torch.equal(out.logp_S, by_hand.logp_S) and out.logp_S.dtype == torch.float32
    out.logp_S.sum().backward()
    assert weight.grad.dtype == torch.float32
