"""The tests fail when the kernels are wrong: each line below breaks one place, and the operator table must notice.

A mutant's functions lend their code to the real ones for the length of one test.
"""

from __future__ import annotations

import importlib
import inspect
import types
from collections.abc import Callable, Iterator
from functools import partial
from unittest.mock import MagicMock

import pytest
import torch
from operators import OPERATORS, Case, check
from test_operators import test_a_masked_token_is_as_if_it_were_not_there as masked
from test_operators import test_an_upstream_factor_scales_every_gradient as upstream
from test_operators import test_selected_rows_equal_all_rows_with_zero_weights as selected
from test_row_passes import test_a_masked_column_is_as_if_it_were_not_there as masked_column
from test_row_passes import test_a_target_elsewhere_has_no_column as elsewhere
from test_row_passes import test_far_away_logits_lose_no_digits as far_away

MUTANTS = [
    # module, what stands there, what stands there in the mutant
    ("row_passes", "(at_target - top) - log_sum[part]", "(at_target - top)"),
    ("row_passes", "log_sum[part] - z.mul_(e)", "log_sum[part] + z.mul_(e)"),
    ("row_passes", "= top, first == columns", "= top, first >= columns"),
    ("row_passes", "min=torch.finfo(z.dtype).min / 2", "min=-torch.inf"),
    ("row_passes", "sum(-1) / total)", "sum(-1))"),
    ("row_passes", "masked_fill_(columns < 0, 0.0)", "masked_fill_(columns < -1, 0.0)"),
    ("row_passes", "mul_((-g_logp *", "mul_((g_logp *"),
    ("row_passes", "g_logp, log_sum = g_logp_r[part] * scale", "g_logp, log_sum = g_logp_r[part]"),
    ("row_passes", "g_entropy = g_entropy_r[part] * scale", "g_entropy = g_entropy_r[part]"),
    ("row_passes", "mul_(-g_entropy[:, None])", "mul_(g_entropy[:, None])"),
    ("row_passes", "log_p.add_(stats.entropy_r", "log_p.sub_(stats.entropy_r"),
    ("row_passes", "sub_(log_sum[:, None]).clamp_(min=NO_CHANCE)", "sub_(log_sum[:, None])"),
    ("row_passes", "columns.clamp(min=0)[:, None], g_logp", "columns.clamp(min=1)[:, None], g_logp"),
    ("row_passes", "g_logp.masked_fill(columns < 0, 0.0)", "g_logp"),
    ("row_passes", "        if slope is not None:\n            dz.mul_(slope)\n", "        pass\n"),
    ("row_passes", "stop = min(start + block, rows)", "stop = min(start + block, rows - 1)"),
    ("row_passes", ".masked_fill_(masked, -torch.inf)", ""),
    ("row_passes", "p.sub_(t.exp_())", "p.add_(t.exp_())"),
    ("row_passes", ".sub_(stats.inner_r[part][:, None])", ""),
    ("row_passes", "g if kind == \"rkl\" else g * (1 - beta)", "g"),
    ("row_passes", "excess.masked_fill_(p == 0, 0.0)", "excess"),
    ("row_passes", "log_p + math.log(1 - beta)", "log_p + math.log(beta)"),
    ("chunks", "slice(start, min(start + size, S))", "slice(start, min(start + size, S - 1))"),
    ("chunks", "range(0, S, size)", "range(0, S - size, size)"),
    ("chunks", "total.addmm_(a, b)", "total.addmm_(a, b, beta=0)"),
    ("chunks", "self._d_bias.add_(", "self._d_bias.copy_("),
    ("chunks", "out=self._d_hidden[part]", "out=self._d_hidden[: len(dz)]"),
    ("head_loss", "grad.mul_(upstream)", "pass"),
    ("head_loss", "chunks.logits(part, hidden_ref)", "chunks.logits(part)"),
    ("head_loss", "else hidden_ref_SD.index_select(0, index_S)", "else hidden_ref_SD[: len(index_S)]"),
    ("epilogues", "weight_r * g)", "g)"),
    ("epilogues", "self.entropy_r[part], part, ref", "self.entropy_r[part], slice(0, 9), ref"),
    ("epilogues", "-tokens.logp_r.detach().exp() * tokens.logp_r", "-tokens.logp_r.exp() * tokens.logp_r"),
    ("epilogues", "torch.minimum(r * A", "torch.maximum(r * A"),
    ("epilogues", "torch.where(A < 0, torch.maximum", "torch.where(A > 0, torch.maximum"),
    ("epilogues", "r = _ratio(tokens, old_logp_S).detach()", "r = _ratio(tokens, old_logp_S)"),
    ("epilogues", "torch.expm1(d) - d", "torch.expm1(-d) + d"),
    ("epilogues", "-coefficient * tokens.entropy_r", "coefficient * tokens.entropy_r"),
    ("divergence", "stats, token_weight[part], kind", "stats, torch.ones_like(token_weight[part]), kind"),
    ("divergence", "chunks.add_gradients(part, z_s)", "chunks.add_gradients(part, z_t)"),
    ("token_logprobs", "None if g_entropy is None else g_entropy[part]", "None"),
    ("token_logprobs", "g_logp = torch.zeros_like(g_entropy)", "g_logp = torch.ones_like(g_entropy)"),
]  # fmt: skip


def entropy_alone() -> None:
    """A loss that uses no log-probability."""
    x = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight = torch.linspace(-1, 1, 28, dtype=torch.float64).view(7, 4).sin()
    token_logprobs = importlib.import_module("lit_reason.kernels.token_logprobs").token_logprobs
    (got,) = torch.autograd.grad(token_logprobs(x, weight, torch.zeros(5, dtype=torch.long)).entropy_S.sum(), x)
    (want,) = torch.autograd.grad(torch.distributions.Categorical(logits=x @ weight.T).entropy().sum(), x)
    torch.testing.assert_close(got, want)


CHECKS: list[Callable[[], None]] = [
    *(
        partial(check, operator, case)
        for operator in OPERATORS
        for case in (Case(), Case(softcap=2.0, temperature=0.7))
    ),
    *(partial(selected, operator) for operator in OPERATORS),
    partial(masked, OPERATORS[0]),
    partial(upstream, OPERATORS[1]),
    *(partial(masked_column, softcap) for softcap in (None, 5.0)),
    elsewhere,
    far_away,
    entropy_alone,
]


def functions(namespace: dict, module: str) -> Iterator[tuple[str, types.FunctionType]]:
    """Functions and methods that were written in a module, by qualified name."""
    for value in list(namespace.values()):
        value = inspect.unwrap(value) if callable(value) and not inspect.isclass(value) else value
        if inspect.isfunction(value) and value.__module__ == module:
            yield value.__qualname__, value
        elif inspect.isclass(value) and value.__module__ == module:
            for member in vars(value).values():
                member = inspect.unwrap(getattr(member, "fget", None) or getattr(member, "__func__", member) or member)
                if inspect.isfunction(member):
                    yield member.__qualname__, member


def test_the_checks_pass_without_a_mutation():
    assert first_failure() is None


@pytest.mark.parametrize("module, before, after", MUTANTS, ids=[f"{m}: {b[:40]}" for m, b, _ in MUTANTS])
def test_a_broken_kernel_is_noticed(module, before, after, monkeypatch):
    real = importlib.import_module(f"lit_reason.kernels.{module}")
    source = inspect.getsource(real)
    assert source.count(before) == 1, f"{before!r} must stand once in {module}, or the mutation says nothing"
    mutant = {"__name__": real.__name__}
    with monkeypatch.context() as patch:
        patch.setattr(torch.library, "custom_op", lambda *args, **options: MagicMock())  # known to torch already
        exec(compile(source.replace(before, after), real.__file__, "exec"), mutant)
    lent = dict(functions(mutant, real.__name__))
    changed = 0
    for name, function in functions(vars(real), real.__name__):
        if name in lent and function.__code__ != lent[name].__code__:
            monkeypatch.setattr(function, "__code__", lent[name].__code__)
            changed += 1
    assert changed, "no function differs from the mutant's"
    assert first_failure(), "no check failed"


def first_failure() -> str | None:
    for number, one in enumerate(CHECKS):
        try:
            one()
        except Exception as error:
            return f"check {number}: {type(error).__name__}"
    return None
