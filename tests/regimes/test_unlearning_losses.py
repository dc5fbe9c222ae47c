"""Unlearning losses on a bigram model whose gradients are known: closed forms, finite differences, invariants."""

import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lit_reason.data.token_row import TokenRow
from lit_reason.data.unlearning.pairs import PairSampler, RoleRows
from lit_reason.data.unlearning.rows import Role
from lit_reason.errors import UserError
from lit_reason.kernels.divergence import linear_divergence
from lit_reason.kernels.head_loss import linear_token_loss
from lit_reason.kernels.token_logprobs import token_logprobs
from lit_reason.regimes.unlearn.losses import GA, GD, KL, NPO, RMU, IdkDPO, Memorize, RetainOnly, SimNPO
from lit_reason.regimes.unlearn.step import Step

V = 5


class Table(nn.Module):
    """A bigram model: what follows depends on the last token alone. `head` is the table of logits, [next, last]."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(seed)
        self.inner = nn.Linear(V, V, bias=False, dtype=torch.float64)
        self.inner.weight.data = torch.eye(V, dtype=torch.float64)
        self.table = nn.Parameter(torch.randn(V, V, generator=rng, dtype=torch.float64))

    @property
    def layers(self):
        return [self.inner]

    @property
    def head(self):
        return self

    def hidden(self, ids, positions, cu_seqlens):
        return self.inner(F.one_hot(ids, V).double())

    def token_logprobs(self, hidden, targets):
        return token_logprobs(hidden, self.table, targets)

    def forward(self, hidden, targets):
        return linear_token_loss(hidden, self.table, targets, torch.ones(len(targets)))

    def divergence(self, hidden, hidden_ref, weights, *, kind, reference):
        return linear_divergence(hidden, self.table, hidden_ref, reference.table, weights, kind=kind)

    def logp(self, row: TokenRow) -> torch.Tensor:
        """Log-probability of each trained token, from the definition."""
        ids = torch.tensor(row.ids, dtype=torch.long)
        all_logp = F.log_softmax(self.inner(F.one_hot(ids, V).double()) @ self.table.T, -1)
        at = torch.arange(1, len(ids))[torch.tensor(row.weight[1:] > 0)]
        return all_logp[at - 1, ids[at]]


def token_row(ids: list[int], prompt: int, name: str) -> TokenRow:
    weight = np.ones(len(ids), np.float32)
    weight[:prompt] = 0
    return TokenRow(np.array(ids, np.int32), weight, np.zeros(len(ids), np.uint8), -np.ones(len(ids), np.int8), name)


FORGET = [token_row([0, 1, 2, 3], 1, "f0"), token_row([2, 0, 1, 1, 4, 2], 3, "f1"), token_row([1, 3, 3], 1, "f2")]
REFUSE = [token_row([0, 4, 4], 1, "f0"), token_row([2, 0, 1, 4, 0], 3, "f1"), token_row([1, 4, 2, 0], 1, "f2")]
RETAIN = [token_row([4, 3, 2, 1, 0], 2, "r0"), token_row([3, 3, 0, 2], 1, "r1"), token_row([2, 4, 1], 1, "r2")]


def two(name: str, seed: int) -> tuple[Table, Table]:
    """A model and what it was; their inner layers differ where a loss reads those, or its retain term would be 0."""
    model, reference = Table(seed), Table(seed + 1)
    if name == "RMU":
        rng = torch.Generator().manual_seed(seed)
        model.inner.weight.data += 0.3 * torch.randn(V, V, generator=rng, dtype=torch.float64)
    return model, reference


def store() -> RoleRows:
    roles = [Role.FORGET] * 3 + [Role.REFUSAL] * 3 + [Role.RETAIN] * 3
    return RoleRows([*FORGET, *REFUSE, *RETAIN], roles)


def loss_of(loss, model: Table, reference: Table, numbers=range(9), of_step=None) -> torch.Tensor:
    rows = store()
    pack = rows.pack(list(numbers), *rows.totals(list(of_step or numbers)))
    return loss(Step(model, pack, lambda: nullcontext(reference)))


def sums(model: Table, rows: list[TokenRow]) -> torch.Tensor:
    return torch.stack([model.logp(row).sum() for row in rows])


def mean_nll(model: Table, rows: list[TokenRow]) -> torch.Tensor:
    return -torch.cat([model.logp(row) for row in rows]).mean()


def kl(model: Table, reference: Table, rows: list[TokenRow]) -> torch.Tensor:
    def of(m, row):
        ids = torch.tensor(row.ids, dtype=torch.long)
        return F.log_softmax(F.one_hot(ids, V).double() @ m.table.T, -1)[:-1][torch.tensor(row.weight[1:] > 0)]

    p, q = (torch.cat([of(m, row) for row in rows]) for m in (reference, model))
    return (p.exp() * (p - q)).sum(-1).mean()


def npo(model: Table, reference: Table, beta: float) -> torch.Tensor:
    ratio = sums(model, FORGET) - sums(reference, FORGET)
    return -(2 / beta) * torch.log(torch.sigmoid(-beta * ratio)).mean()


def by_definition(name: str, m: Table, ref: Table) -> torch.Tensor:
    f, r = mean_nll(m, FORGET), mean_nll(m, RETAIN)
    means = torch.stack([m.logp(row).mean() for row in FORGET])
    if name == "RMU":
        drawn = torch.rand(V, generator=torch.Generator().manual_seed(0)).double()
        wanted = 3.0 * drawn / drawn.norm()

        def states(model, rows):
            kept = [torch.tensor(row.ids[:-1][row.weight[1:] > 0], dtype=torch.long) for row in rows]
            return model.inner(F.one_hot(torch.cat(kept), V).double())

        held = (states(m, RETAIN) - states(ref, RETAIN)).square().mean()
        return (states(m, FORGET) - wanted).square().mean() + 2.0 * held
    return {
        "GA": lambda: -f,
        "GA ceiling": lambda: torch.relu(1.5 + torch.cat([m.logp(row) for row in FORGET])).mean(),
        "GD": lambda: -0.7 * f + 1.3 * r,
        "KL": lambda: -f + 0.5 * kl(m, ref, RETAIN),
        "NPO": lambda: npo(m, ref, 0.4) + r,
        "NPO + KL": lambda: npo(m, ref, 0.4) + kl(m, ref, RETAIN),
        "SimNPO": lambda: 0.125 * -(2 / 4.5) * torch.log(torch.sigmoid(-4.5 * means - 0.3)).mean() + r,
        "IdkDPO": lambda: -(2 / 0.4)
        * torch.log(
            torch.sigmoid(
                0.4 * (sums(m, REFUSE) - sums(ref, REFUSE)) - 0.4 * (sums(m, FORGET) - sums(ref, FORGET))
            )
        ).mean()
        + r,
        "RetainOnly": lambda: r,
        "Memorize": lambda: mean_nll(m, FORGET + RETAIN),
    }[name]()  # fmt: skip


LOSSES = {
    "GA": GA(),
    "GA ceiling": GA(ceiling=1.5),
    "GD": GD(gamma=0.7, alpha=1.3),
    "KL": KL(alpha=0.5),
    "NPO": NPO(beta=0.4),
    "NPO + KL": NPO(beta=0.4, retain="kl"),
    "SimNPO": SimNPO(margin=0.3),
    "IdkDPO": IdkDPO(beta=0.4),
    "RMU": RMU(layer=0, coefficient=3.0, alpha=2.0),
    "RetainOnly": RetainOnly(),
    "Memorize": Memorize(),
}
PARAMETERS = {"RMU": "inner"}


def rows_for(name: str) -> list[int]:
    return [0, 1, 2, 6, 7, 8] if name == "Memorize" else list(range(9))


@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_are_those_of_the_definition(name):
    model, reference = two(name, 0)
    theirs = by_definition(name, model, reference)
    ours = loss_of(LOSSES[name], model, reference, rows_for(name))
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    weight = model.inner.weight if name == "RMU" else model.table
    (a,), (b,) = torch.autograd.grad(ours, weight), torch.autograd.grad(theirs, weight)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)
    assert a.abs().max() > 1e-3


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_against_finite_differences(name):
    model, reference = two(name, 2)
    weight = model.inner.weight if name == "RMU" else model.table
    loss = loss_of(LOSSES[name], model, reference, rows_for(name))
    (gradient,) = torch.autograd.grad(loss, weight)
    step = 1e-5
    for i, j in ((0, 0), (1, 0), (3, 2), (2, 4), (4, 1)):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[i, j] += sign * step
                values.append(loss_of(LOSSES[name], model, reference, rows_for(name)).item())
                weight[i, j] -= sign * step
        assert gradient[i, j].item() == pytest.approx((values[0] - values[1]) / (2 * step), abs=2e-6), (i, j)


def test_ascent_has_the_closed_form_of_a_softmax():
    model = Table(0)
    (gradient,) = torch.autograd.grad(loss_of(GA(), model, model), model.table)
    expected, count = torch.zeros(V, V, dtype=torch.float64), 0
    p = F.softmax(model.table.detach(), 0)  # [next, last]
    for row in FORGET:
        for at in range(1, len(row.ids)):
            if row.weight[at]:
                last, following = int(row.ids[at - 1]), int(row.ids[at])
                expected[:, last] += F.one_hot(torch.tensor(following), V) - p[:, last]
                count += 1
    torch.testing.assert_close(gradient, expected / count, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("beta", [0.05, 0.5])
def test_npo_at_the_start_is_ascent_on_sums(beta):
    model = Table(0)
    loss = loss_of(NPO(beta=beta, retain="none"), model, Table(0))
    assert loss.item() == pytest.approx(2 / beta * math.log(2), rel=1e-6)
    (a,) = torch.autograd.grad(loss, model.table)
    (b,) = torch.autograd.grad(sums(model, FORGET).mean(), model.table)
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_npo_tends_to_ascent_and_vanishes_where_rows_are_forgotten():
    model, reference = Table(0), Table(1)
    (a,) = torch.autograd.grad(loss_of(NPO(beta=1e-5, retain="none"), model, reference), model.table)
    (b,) = torch.autograd.grad(sums(model, FORGET).mean(), model.table)
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    forgotten = Table(0)
    with torch.no_grad():
        for row in FORGET:
            for last, following in zip(row.ids, row.ids[1:], strict=False):
                forgotten.table[following, last] = -300.0
    (c,) = torch.autograd.grad(loss_of(NPO(beta=0.4, retain="none"), forgotten, Table(0)), forgotten.table)
    assert c.abs().max() < 1e-9


def test_difference_of_equal_sets_has_no_gradient():
    model = Table(0)
    rows = RoleRows([*FORGET, *FORGET], [Role.FORGET] * 3 + [Role.RETAIN] * 3)
    pack = rows.pack(range(6), *rows.totals(range(6)))
    loss = GD()(Step(model, pack, lambda: nullcontext(model)))
    (gradient,) = torch.autograd.grad(loss, model.table)
    assert loss.item() == pytest.approx(0, abs=1e-12) and gradient.abs().max() < 1e-12


def test_divergence_at_the_start_is_zero_and_flat():
    model = Table(0)
    with_term = loss_of(KL(alpha=7.0), model, Table(0))
    without = loss_of(GA(), model, Table(0))
    assert with_term.item() == pytest.approx(without.item(), abs=1e-9)
    (a,), (b,) = torch.autograd.grad(with_term, model.table), torch.autograd.grad(without, model.table)
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_ascent_on_other_contexts_leaves_retain_rows_alone():
    model = Table(0)
    rows = RoleRows([token_row([0, 1, 0, 1], 1, "f"), token_row([2, 3, 4, 2], 1, "r")], [Role.FORGET, Role.RETAIN])
    before = mean_nll(model, [rows.rows[1]]).item()
    for _ in range(5):
        pack = rows.pack([0, 1], *rows.totals([0, 1]))
        (gradient,) = torch.autograd.grad(GA()(Step(model, pack, lambda: nullcontext(model))), model.table)
        with torch.no_grad():
            model.table -= 0.5 * gradient
    assert mean_nll(model, [rows.rows[1]]).item() == pytest.approx(before, abs=1e-12)
    assert mean_nll(model, [rows.rows[0]]).item() > 2.5


def test_a_token_above_the_ceiling_is_left_alone():
    model = Table(0)
    nll = -torch.cat([model.logp(row) for row in FORGET]).detach()
    low = float(nll.min()) / 2
    (gradient,) = torch.autograd.grad(loss_of(GA(ceiling=low), model, model), model.table)
    assert gradient.abs().max() == 0


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "Memorize"])
def test_any_split_of_a_step_adds_up_to_it(name):
    model, reference = Table(0), Table(1)
    whole = loss_of(LOSSES[name], model, reference)
    parts = [loss_of(LOSSES[name], model, reference, numbers, range(9)) for numbers in ([0, 3, 6], [1, 2, 4, 5, 7, 8])]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_stand_ins_carry_no_loss(name):
    model, rows = Table(0), store()
    pack = rows.pack([0, 3, 6], *rows.totals(rows_for(name)), stand_in=True)
    loss = LOSSES[name](Step(model, pack, lambda: nullcontext(Table(1))))
    weight = model.inner.weight if name == "RMU" else model.table
    (gradient,) = torch.autograd.grad(loss, weight)
    assert loss.item() == 0 and gradient.abs().max() == 0


def test_cached_sums_are_those_of_the_reference():
    model, reference, rows = Table(0), Table(1), store()
    rows.reference = {rows.key(i): reference.logp(rows.rows[i]).sum().item() for i in range(9)}

    def never():
        raise AssertionError("the reference was asked for although its sums are cached")

    for loss in (NPO(beta=0.4), IdkDPO(beta=0.4)):
        cached = loss(Step(model, rows.pack(range(9), *rows.totals(range(9))), never))
        assert cached.item() == pytest.approx(loss_of(loss, model, reference).item(), abs=1e-5)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: NPO(beta=0.0), r"loss\.beta is 0\.0"),
        (lambda: GA(ceiling=-1.0), r"loss\.ceiling is -1\.0"),
        (lambda: GD(alpha=-1.0), r"loss\.alpha is -1\.0"),
    ],
)
def test_useless_settings_are_refused(make, said):
    with pytest.raises(UserError, match=said):
        make()


def test_a_layer_that_is_not_there_is_named():
    with pytest.raises(UserError, match=r"loss\.layer is 7; the model has layers 0 to 0"):
        loss_of(RMU(layer=7), Table(0), Table(0))


# ---- the order in which rows meet ----


def sampler(**settings) -> PairSampler:
    rows = RoleRows([token_row([0, 1], 1, str(i)) for i in range(17)], [Role.FORGET] * 7 + [Role.RETAIN] * 10)
    defaults = {"batch_rows": 2, "seed": 3}
    return PairSampler(rows, rows.numbers(Role.FORGET), rows.numbers(Role.RETAIN), **{**defaults, **settings})


def met(of: PairSampler, epochs: int = 1) -> list[int]:
    """All rows in order over some epochs."""
    found = []
    for epoch in range(epochs):
        of.epoch = epoch
        found += [i for chosen in of for i in chosen.rows]
    return found


def test_an_epoch_is_a_pass_over_the_rows_to_forget():
    found = met(sampler())
    assert sorted(i for i in found if i < 7) == list(range(7)) and len(found) == 14


def test_retain_rows_are_walked_through_in_turn_over_epochs():
    found = [i for i in met(sampler(), epochs=6) if i >= 7]
    assert len(found) == 42
    laps = [found[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(lap) == list(range(7, 17)) for lap in laps) and laps[0] != laps[1]
    chunked = [i for i in met(sampler(chunk_rows=3, chunk_passes=2), epochs=3) if i >= 7]
    assert all(sorted(chunked[i : i + 10]) == list(range(7, 17)) for i in range(0, 40, 10)) and len(chunked) == 42
    assert len(sampler(chunk_passes=2)) == len(sampler())  # passes are of chunks


def test_partners_do_not_depend_on_the_size_of_batches_or_the_number_of_processes():
    def pairs(of: list) -> set[tuple[int, tuple[int, ...]]]:
        return {(a, tuple(of_a)) for chosen in of for a, of_a in chosen}

    def matched(s: PairSampler) -> list:
        return [
            [(f, b.rows[len(b.rows) // 4 :][3 * k : 3 * k + 3]) for k, f in enumerate(b.rows[: len(b.rows) // 4])]
            for b in s
            if not b.stand_in
        ]

    one = pairs(matched(sampler(batch_rows=4, ratio=3)))
    assert pairs(matched(sampler(batch_rows=1, ratio=3))) == one and len(one) == 7
    ranks = [matched(sampler(batch_rows=2, ratio=3, rank=r, world=2)) for r in range(2)]
    assert pairs(ranks[0] + ranks[1]) == one


def test_the_divisor_is_that_of_the_whole_step():
    bins = list(sampler(accumulate=2, batch_rows=2))
    assert [b.step_rows[Role.FORGET] for b in bins] == [4, 4, 3, 3]
    both = [list(sampler(batch_rows=2, world=2, rank=r)) for r in range(2)]
    assert [b.step_rows[Role.FORGET] for b in both[0]] == [b.step_rows[Role.FORGET] for b in both[1]] == [4, 3]
    odd = [list(sampler(batch_rows=3, world=2, rank=r)) for r in range(2)]
    assert [b.stand_in for b in odd[1]] == [False, True] and odd[1][1].step_rows[Role.FORGET] == 1


def test_chunks_come_one_after_another():
    of = sampler(chunk_rows=3, chunk_passes=2, batch_rows=3)
    assert len(of) == 6
    forget = [tuple(sorted(i for i in b.rows if i < 7)) for b in of]
    assert forget[0] == forget[1] and forget[2] == forget[3] and forget[4] == forget[5]
    assert sorted(forget[0] + forget[2] + forget[4]) == list(range(7))
    of.epoch = 1
    assert [tuple(sorted(i for i in b.rows if i < 7)) for b in of] == forget  # the same chunks in each epoch


def test_refusals_stand_beside_their_rows():
    rows = store()
    of = PairSampler(rows, np.arange(3), np.arange(6, 9), beside={0: 3, 1: 4, 2: 5}, batch_rows=2)
    for chosen in of:
        pack = rows[chosen]
        names = pack.row_ids
        assert names[pack.rows_of(Role.FORGET)] == names[pack.rows_of(Role.REFUSAL)]
        assert len(names[pack.rows_of(Role.RETAIN)]) == len(names[pack.rows_of(Role.FORGET)])


def test_a_pass_goes_on_where_it_stopped():
    whole = [b.rows for b in sampler()]
    rest = sampler()
    rest.start = 2
    assert [b.rows for b in rest] == whole[2:]
