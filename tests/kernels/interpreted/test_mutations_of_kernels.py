"""The tests fail when a Triton kernel is wrong: each line below breaks one place, and a check must notice.

One mutant a kernel is tried in every run; all of them, and that the checks pass without one, with `-m slow`.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
from collections.abc import Callable
from functools import partial
from types import ModuleType

import pytest
import test_triton_rows as rows_tests
import torch
from row_cases import CASES, KINDS, check_divergence, check_statistics, rounded

from lit_reason.kernels import triton_kernels, triton_rows

KERNELS = ("stats_kernel", "grad_kernel", "divergence_kernel", "divergence_grad_kernel")
MUTANTS = [
    # kernels that it reaches, what stands there, what stands there in the mutant
    ("rows", "x = tl.load(pointer + columns, mask=columns < V, other=other)",
             "x = tl.load(pointer + columns, mask=columns < V - 1, other=other)"),
    ("rows", "x = tl.load(pointer + columns, mask=columns < V, other=other)",
             "x = tl.load(pointer + columns, mask=columns <= V, other=other)"),
    ("rows", "_load(logits, columns, V, MINUS_INF, TAIL)", "_load(logits, columns, V, 0.0, TAIL)"),
    ("rows", "a += _load(bias", "a -= _load(bias"),
    ("rows", "slope = 4.0 * t", "slope = 2.0 * t"),
    ("rows", "bounded = tl.where(a < 0.0, -bounded, bounded)", "bounded = tl.where(a < -1.0, -bounded, bounded)"),
    ("rows", "a = tl.where(a == MINUS_INF, a, bounded)", "a = bounded"),
    ("rows", "    a = _finite(a)\n    largest", "    largest"),
    ("rows", "e = tl.where(columns < V, e, 0.0)", "e = e"),
    ("rows", "rise = tl.maximum(old - new, FAR)", "rise = tl.maximum(new - old, FAR)"),
    ("rows", "below * (source[3] * LOG2E)", "below * LOG2E"),
    ("rows", "shifted = keep * (shifted + rise * total)", "shifted = keep * shifted"),
    ("rows", "    total = keep * total + tl.sum(e, axis=1)", "    total = total + tl.sum(e, axis=1)"),
    ("rows", "LANES) + 1) * PER <= target", "LANES) + 1) * PER < target"),
    ("rows", "(largest == a_target) & before", "(largest == a_target)"),
    ("rows", " | beaten_at_home) == 0", ") == 0"),
    ("rows", "row = tl.program_id(0).to(tl.int64)", "row = tl.program_id(0)"),
    ("rows", "whole = V // (LANES * PER) * (LANES * PER)",
             "whole = V // (LANES * PER) * (LANES * PER) - LANES * PER"),
    ("rows", "in range(0, whole, LANES * PER)", "in range(LANES * PER, whole, LANES * PER)"),
    ("rows", "row_total = tl.sum(keep * total", "row_total = tl.sum(total"),
    ("rows", "log_sum - scale * (", "log_sum - ("),
    ("rows", "target < 0, -largest", "target < -1, -largest"),
    ("rows", "scale * (a_target - highest)", "(a_target - highest)"),
    ("rows", "(target >= 0) & ((tl.max", "((tl.max"),
    ("rows", "tl.where(columns == target, g_logp, 0.0) -", "tl.where(columns == target, g_logp, 0.0) +"),
    ("rows", "columns == target, g_logp", "columns == target + 1, g_logp"),
    ("rows", "factor += g_entropy", "factor -= g_entropy"),
    ("rows", "- largest - log_sum\n", "- largest\n"),
    ("rows", "log_p = tl.where(log_p < NO_CHANCE, NO_CHANCE, log_p)", "log_p = log_p"),
    ("rows", "dz * (slope * source[3])", "dz * source[3]"),
    ("rows", "dz * (slope * source[3])", "dz * slope"),
    ("rows", "tl.store(logits + columns, gradient, mask=columns < V)",
             "tl.store(logits + columns, gradient, mask=columns < V - 1)"),
    ("rows", "tl.store(logits + columns, gradient, mask=columns < V)",
             "tl.store(logits + columns, gradient, mask=columns <= V)"),
    ("pairs", "return new_top, keep * total + tl.sum(e, axis=1)", "return new_top, total + tl.sum(e, axis=1)"),
    ("pairs", "tl.log(tl.sum(keep * total", "tl.log(tl.sum(total"),
    ("pairs", "t * teacher[3] - lse_t", "t - lse_t"),
    ("pairs", "log_p + mix[2], log_q + mix[1]", "log_p + mix[1], log_q + mix[2]"),
    ("pairs", "1.0 + tl.exp2(-tl.abs(a - b) * LOG2E)", "1.0 - tl.exp2(-tl.abs(a - b) * LOG2E)"),
    ("pairs", "tl.where(p == 0.0, 0.0, p * (log_p - log_other))", "p * (log_p - log_other)"),
    ("pairs", "_share(log_q, log_p)", "_share(log_p, log_q)"),
    ("pairs", "_share(log_q, mixture)", "_share(log_p, mixture)"),
    ("pairs", "beta * value + (1.0 - beta) * inner", "(1.0 - beta) * value + beta * inner"),
    ("pairs", "p - tl.exp2(log_q * LOG2E)", "p + tl.exp2(log_q * LOG2E)"),
    ("pairs", "(log_p - log_q - inner)", "(log_p - log_q)"),
    ("pairs", " * (1.0 - mix[0])\n", "\n"),
    ("pairs", "dz * (g * (slope * student[3]))", "dz * (slope * student[3])"),
    ("pairs", "dz * (g * (slope * student[3]))", "dz * (g * student[3])"),
]  # fmt: skip
QUICK = (  # what stands there in the mutants of every run: statistics, gradient, divergence, its gradient
    "target < 0, -largest",
    "columns == target, g_logp",
    "beta * value + (1.0 - beta) * inner",
    "(log_p - log_q - inner)",
)


def checks_of(reach: str) -> list[Callable[[], object]]:
    """The checks of the kernels a mutant reaches, those of the table first."""
    names = ("V=33", "bias", "cold", "saturated", "ties", "masked columns", "masked under a cap", "V=32", "one hot")
    table = [rounded(CASES[name](0), torch.float32) for name in names]
    if reach == "pairs":
        return [partial(check_divergence, triton_rows, it, kind, beta) for it in table for kind, beta in KINDS]
    return [
        *(partial(check_statistics, triton_rows, it, entropy) for it in table for entropy in (True, False)),
        partial(rows_tests.test_rows_without_a_likely_column_are_uniform, float("-inf")),
        rows_tests.test_far_apart_rows_are_found,
        lambda: rows_tests.test_nothing_is_left_unwritten_and_nothing_else_is_written(pytest.MonkeyPatch()),
    ]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(triton_rows, "LANES", 4)
    monkeypatch.setattr(triton_rows, "LANES_OF_A_PAIR", 4)
    vectors = triton_rows._vectors
    yield
    triton_rows._vectors = vectors


@pytest.mark.slow
@pytest.mark.parametrize("reach", ["rows", "pairs"])
def test_the_checks_pass_without_a_mutation(reach):
    assert not noticed(checks_of(reach))


def mutants():
    assert set(QUICK) < {before for _, before, _ in MUTANTS}
    for it in MUTANTS:
        marks = [] if it[1] in QUICK else [pytest.mark.slow]
        yield pytest.param(*it, id=f"{it[1][:50]} -> {it[2][-30:]}", marks=marks)


@pytest.mark.parametrize("reach, before, after", mutants())
def test_a_broken_kernel_is_noticed(reach, before, after, monkeypatch, tmp_path):
    source = inspect.getsource(triton_kernels)
    assert before in source, f"{before!r} is not in triton_kernels any more"
    mutant = loaded(source.replace(before, after), tmp_path)
    for name in KERNELS:
        monkeypatch.setattr(triton_rows, name, getattr(mutant, name))
    assert noticed(checks_of(reach)), "no check failed"


def loaded(source: str, folder) -> ModuleType:
    """A module from source; Triton reads kernels from files."""
    path = folder / "mutant.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("mutant", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def noticed(checks: list[Callable[[], object]]) -> bool:
    """Whether a check fails, or ends the process: a kernel with a wrong address may touch memory that is not there."""
    child = os.fork()
    if not child:
        os._exit(1 if any(map(fails, checks)) else 0)
    return os.waitpid(child, 0)[1] != 0


def fails(check: Callable[[], object]) -> bool:
    try:
        check()
    except Exception:
        return True
    return False
