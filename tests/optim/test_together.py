"""Several optimizers as one: the same steps as apart, one state, one list of groups."""

import torch
from torch.optim.lr_scheduler import LambdaLR

from lit_reason.optim.together import Together


def parts(weights):
    return torch.optim.SGD([weights[0]], lr=0.1, momentum=0.9), torch.optim.AdamW([weights[1]], lr=0.01)


def weights():
    return [torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(3))]


def run(optimizers, params, numbers, schedules=()):
    for number in numbers:
        for p in params:
            p.grad = torch.full_like(p, 1.0 + number)
        for optimizer in (*optimizers, *schedules):
            optimizer.step()
    return [p.detach().clone() for p in params]


def test_the_steps_are_those_of_the_parts_and_a_schedule_reaches_them_all():
    apart, joined = weights(), weights()
    own = parts(apart)
    one = Together(*parts(joined))
    halve = lambda step: 0.5**step  # noqa: E731
    wanted = run(own, apart, range(4), [LambdaLR(o, halve) for o in own])
    found = run([one], joined, range(4), [LambdaLR(one, halve)])
    for a, b in zip(wanted, found, strict=True):
        assert torch.equal(a, b)
    assert [g["lr"] for g in one.param_groups] == [0.1 / 16, 0.01 / 16]


def test_the_closure_runs_once_and_its_loss_comes_back():
    params, calls = weights(), []
    one = Together(*parts(params))

    def closure():
        calls.append(torch.is_grad_enabled())
        loss = sum((p**2).sum() for p in params)
        loss.backward()
        return loss

    assert one.step(closure).item() == 9.0 and calls == [True]


def test_a_saved_state_goes_on(tmp_path):
    params = weights()
    one = Together(*parts(params))
    middle = run([one], params, range(2))
    torch.save(one.state_dict(), tmp_path / "state.pt")
    wanted = run([one], params, range(2, 5))
    rest = [torch.nn.Parameter(p.clone()) for p in middle]
    resumed = Together(*parts(rest))
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    resumed.param_groups[0]["lr"] = 0.1
    for a, b in zip(wanted, run([resumed], rest, range(2, 5)), strict=True):
        assert torch.equal(a, b)
    assert set(resumed.state) == set(rest)
