"""Zeroed optimizer state against freshly built optimizers and closed forms."""

import pytest
import torch

from lit_reason.core.momentum import check_state, effective_lr, reset_momentum
from lit_reason.errors import UserError


def adamw(parameters, **settings):
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1, **settings)


def eight_bit(parameters):
    return pytest.importorskip("bitsandbytes").optim.AdamW8bit(parameters, lr=1e-2, weight_decay=0.1)


def muon(parameters):
    return torch.optim.Muon(parameters, lr=1e-2)


BUILT = {
    "fused": lambda p: adamw(p, fused=True),
    "loop": lambda p: adamw(p, foreach=False),
    "amsgrad": lambda p: adamw(p, amsgrad=True),
    "8 bit": eight_bit,
    "muon": muon,
}


def parameters():
    """One above the size from which bitsandbytes keeps 8 bits, one below."""
    g = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=g)) for shape in ((80, 64), (5, 3))]


def step(params, optimizer, number):
    g = torch.Generator().manual_seed(100 + number)
    for p in params:
        p.grad = torch.randn(p.shape, generator=g)
    optimizer.step()


@pytest.mark.parametrize("kind", BUILT)
def test_a_reset_optimizer_goes_on_as_a_new_one_bit_for_bit(kind):
    ours, theirs = parameters(), parameters()
    old = BUILT[kind](ours)
    for number in range(7):
        step(ours, old, number)
    check_state(old)
    with torch.no_grad():
        for a, b in zip(ours, theirs, strict=True):
            b.copy_(a)
    known = [id(value) for state in old.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    reset_momentum(old, "all")
    new = BUILT[kind](theirs)
    for number in range(7, 12):
        step(ours, old, number)
        step(theirs, new, number)
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b), number
    after = [id(value) for state in old.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    assert len(set(known) & set(after)) >= len(known) - (1 if kind == "8 bit" else 0)  # in place


def test_codes_alone_are_not_enough_for_8_bits():
    """Why the block scales must go too: the code 0 is not the value 0."""
    params = parameters()
    optimizer = eight_bit(params)
    for number in range(7):
        step(params, optimizer, number)
    state = optimizer.state[params[0]]
    assert state["state1"].dtype == torch.uint8 and state["qmap1"][0] < -0.99
    before = params[0].detach().clone()
    state["state1"].zero_(), state["state2"].zero_()
    step(params, optimizer, 7)
    assert (params[0] - before).abs().max() > 1


@pytest.mark.parametrize("steps", [1, 10, 100, 1000])
@pytest.mark.parametrize("what", ["all", "first", "moments", "none"])
def test_size_of_the_next_update_under_a_constant_gradient(what, steps):
    parameter = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = torch.optim.AdamW([parameter], lr=1.0, weight_decay=0.0, eps=0.0)
    parameter.grad = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    for _ in range(steps):
        optimizer.step()
    reset_momentum(optimizer, what)
    before = parameter.detach().clone()
    optimizer.step()
    moved = (parameter.detach() - before).abs()
    t = steps + 1
    first = (1 - 0.9) / (1 - 0.9**t)
    second = (1 - 0.999) / (1 - 0.999**t)
    want = {"all": 1.0, "none": 1.0, "first": first, "moments": first / second**0.5}[what]
    assert moved.tolist() == pytest.approx([want] * 3, rel=1e-6)


def test_effective_lr_is_the_root_mean_square_of_the_update_over_what_it_would_be_without_eps():
    params = parameters()
    optimizer = torch.optim.AdamW(
        [{"params": params[:1], "lr": 1e-2}, {"params": params[1:], "lr": 5e-2}], weight_decay=0.0
    )
    step(params, optimizer, 0)
    sizes = torch.cat([torch.full((80 * 64,), 1e-2), torch.full((15,), 5e-2)])
    assert effective_lr(optimizer) == pytest.approx(float(sizes.square().mean().sqrt()), rel=1e-4)
    for number in range(1, 6):
        before = [p.detach().clone() for p in params]
        step(params, optimizer, number)
    moved = torch.cat([(p.detach() - b).flatten() for p, b in zip(params, before, strict=True)])
    assert effective_lr(optimizer) == pytest.approx(float(moved.square().mean().sqrt()), rel=1e-3)
    assert effective_lr(muon(parameters()[:1])) is None


def test_state_that_nobody_knows_how_to_reset_is_refused():
    params = parameters()
    optimizer = torch.optim.Adagrad(params)
    with pytest.raises(UserError, match="Adagrad keeps 'sum'.*set reset: none"):
        check_state(optimizer)
