"""The Triton kernels, run by Triton's interpreter, on the table of row-pass cases and on what only they promise."""

import itertools
import math

import pytest
import row_cases
import torch
from row_cases import CASES, KINDS, check_divergence, check_statistics, draw

from lit_reason.kernels import row_passes, triton_rows
from lit_reason.kernels.row_passes import Transform

IN_ALL_DTYPES = ("V=7", "V=33", "bias", "softcap", "ties", "masked columns")
OF_PAIRS = ("V=1", "V=16", "V=33", "cold", "saturated", "one hot", "masked under a cap", "V=1000")


def table(in_all_dtypes, in_float32):
    """Every case in every dtype; those that are not named are slow."""
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    quick = {(name, dtype) for name in in_all_dtypes for dtype in dtypes} | {
        (name, torch.float32) for name in in_float32
    }
    return [
        pytest.param(*it, marks=[] if it in quick else pytest.mark.slow, id=f"{it[0]}-{str(it[1])[6:]}")
        for it in itertools.product(CASES, dtypes)
    ]


@pytest.fixture(autouse=True)
def blocks(request, monkeypatch):
    """Blocks of 32 logits of 2 bytes, or 16 of 4: rows are shorter than a block, or many long. Real ones for V=1000."""
    if "V=1000" not in request.node.name:
        monkeypatch.setattr(triton_rows, "LANES", 4)
        monkeypatch.setattr(triton_rows, "LANES_OF_A_PAIR", 4)


@pytest.fixture(scope="module")
def seed():
    """A fresh one in each run; pytest shows it where a test fails."""
    return int(torch.empty((), dtype=torch.int64).random_(2**31))


@pytest.mark.parametrize("name, dtype", table(IN_ALL_DTYPES, CASES))
def test_statistics(name, dtype, seed):
    print("seed", seed)
    it = row_cases.rounded(CASES[name](seed), dtype)
    check_statistics(triton_rows, it, with_entropy=False)
    check_statistics(triton_rows, it, with_entropy=True)


@pytest.mark.parametrize("name, dtype", table(("bias", "softcap"), OF_PAIRS))
def test_divergences(name, dtype, seed):
    print("seed", seed)
    it = row_cases.rounded(CASES[name](seed), dtype)
    for kind, beta in KINDS if dtype == torch.float32 else KINDS[-1:]:
        check_divergence(triton_rows, it, kind, beta)


def walk(logits, teacher, targets, transform):
    """Every function of the row passes on these logits; what the two statistics return."""
    stats = triton_rows.row_stats(logits, targets, transform)
    divergence = triton_rows.divergence_stats(logits, teacher, "jsd", 0.3, transform, transform)
    g = draw(len(logits), seed=4).float()
    mine = logits.clone()
    triton_rows.divergence_grad_(mine, teacher, divergence, g, "jsd", 0.3, transform, transform)
    triton_rows.row_grad_(logits, targets, stats, g, g, transform)
    return (*stats, *divergence, mine)


def test_nothing_is_left_unwritten_and_nothing_else_is_written(monkeypatch):
    """Outputs hold NaN before and lie between guards; logits lie in a wider buffer whose rest keeps its sentinel."""
    vectors = []

    def guarded(logits, count):
        for _ in range(count):
            vectors.append(torch.full((logits.shape[0] + 8,), 77.0))
            vectors[-1][4:-4] = math.nan
        return [vector[4:-4] for vector in vectors[-count:]]

    monkeypatch.setattr(triton_rows, "_vectors", guarded)
    for dtype in (torch.float32, torch.bfloat16):
        buffer, other = (torch.full((5, 48), 77.0, dtype=dtype) for _ in range(2))
        logits, teacher = buffer[1:4, 4:37], other[1:4, 4:37]
        logits.copy_(draw(3, 33, seed=1))
        teacher.copy_(draw(3, 33, seed=2))
        transform = Transform(draw(33, seed=3).float(), 3.0, 0.7)
        found = walk(logits, teacher, torch.tensor([0, 32, -1]), transform)
        assert not any(torch.isnan(v).any() for v in (*found, *vectors))
        for vector in vectors:
            assert (vector[:4] == 77).all() and (vector[-4:] == 77).all()
        for whole, part in ((buffer, logits), (other, teacher)):
            part.fill_(77.0)
            assert (whole == 77).all()


def test_far_apart_rows_are_found():
    """The third row begins 2^31 logits after the first; the memory between them is never touched."""
    stride = 2**30 + 16
    wide = torch.empty(2 * stride + 40, dtype=torch.float16)
    logits = wide.as_strided((3, 40), (stride, 1))
    logits.copy_(draw(3, 40, seed=1))
    near, transform, targets = logits.contiguous(), Transform(), torch.tensor([3, 39, 0])
    for got, want in zip(walk(logits, logits, targets, transform), walk(near, near, targets, transform), strict=True):
        assert torch.equal(got, want)
    assert torch.equal(logits, near)


def test_blocks_and_the_order_of_rows_do_not_matter(monkeypatch):
    logits, teacher, transform = draw(5, 70, seed=1).float(), draw(5, 70, seed=2).float(), Transform(None, 20.0, 2.0)
    targets, order = torch.tensor([0, 69, 30, -1, 5]), torch.tensor([3, 0, 4, 1, 2])
    first = walk(logits.clone(), teacher, targets, transform)
    shuffled = walk(logits[order], teacher[order], targets[order], transform)
    for got, want in zip(shuffled[:9], first[:9], strict=True):
        assert torch.equal(got, want[order])
    for lanes in (2, 16):
        monkeypatch.setattr(triton_rows, "LANES", lanes)
        monkeypatch.setattr(triton_rows, "LANES_OF_A_PAIR", lanes)
        for got, want in zip(walk(logits.clone(), teacher, targets, transform), first, strict=True):
            torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6)


def test_invariants_of_distributions():
    """Adding a constant to a row's logits changes nothing, so gradients sum to 0 over the vocabulary."""
    logits, teacher = draw(6, 65, seed=1).float(), draw(6, 65, seed=2).float()
    targets = torch.arange(6) * 12
    stats = triton_rows.row_stats(logits, targets, Transform())
    assert (stats.logp_r <= 0).all() and (stats.entropy_r >= 0).all() and (stats.entropy_r <= math.log(65)).all()
    g = draw(6, seed=3).float()
    for kind, beta in KINDS:
        mine = logits.clone()
        divergence = triton_rows.divergence_stats(mine, teacher, kind, beta, Transform(), Transform())
        assert (divergence.value_r >= 0).all()
        triton_rows.divergence_grad_(mine, teacher, divergence, g, kind, beta, Transform(), Transform())
        assert mine.sum(-1).abs().max() < 1e-5
        same = triton_rows.divergence_stats(logits, logits, kind, beta, Transform(), Transform())
        assert same.value_r.abs().max() < 1e-6
    triton_rows.row_grad_(logits, targets, stats, g, g, Transform())
    assert logits.sum(-1).abs().max() < 1e-5


@pytest.mark.parametrize("value", [-math.inf, -1e38, -6e4])
def test_rows_without_a_likely_column_are_uniform(value):
    logits = torch.full((2, 40), value)
    targets = torch.tensor([0, 7])
    stats = triton_rows.row_stats(logits, targets, Transform())
    torch.testing.assert_close(stats.logp_r, torch.full((2,), -math.log(40)))
    torch.testing.assert_close(stats.entropy_r, torch.full((2,), math.log(40)))
    assert stats.hit_r.tolist() == [True, False]
    triton_rows.row_grad_(logits, targets, stats, torch.ones(2), torch.ones(2), Transform())
    want = torch.full((2, 40), -1 / 40)
    want[[0, 1], targets] += 1
    torch.testing.assert_close(logits, want)


def test_not_a_number_is_not_hidden():
    logits = draw(3, 40, seed=1).float()
    logits[1, 35] = math.nan
    transform, targets = Transform(None, 5.0, 1.0), torch.tensor([1, 1, 35])
    teacher = draw(3, 40, seed=2).float()
    stats = triton_rows.row_stats(logits, targets, transform)
    divergence = triton_rows.divergence_stats(logits, teacher, "rkl", 0.5, transform, transform)
    for vector in (stats.logp_r, stats.entropy_r, divergence.value_r):
        assert torch.isnan(vector).tolist() == [False, True, False]
    triton_rows.row_grad_(logits, targets, stats, torch.ones(3), None, transform)
    assert torch.isnan(logits).any(-1).tolist() == [False, True, False]


def test_divergence_is_infinite_where_the_other_has_no_chance():
    a, b = torch.zeros(1, 3), torch.tensor([[0.0, 0.0, -math.inf]])
    for kind, student, teacher in (("fkl", b, a), ("rkl", a, b)):
        found = triton_rows.divergence_stats(student, teacher, kind, 0.5, Transform(), Transform())
        assert found.value_r.item() == math.inf


def test_strided_vectors_and_narrow_biases():
    """Targets and derivatives may be columns of something else, as slices of a batch are."""
    logits, bias = draw(3, 33, seed=1).float(), draw(66, seed=2).bfloat16()[::2]
    targets, g = torch.tensor([[3, 9], [32, 9], [0, 9]])[:, 0], draw(3, 2, seed=3).float()[:, 0]
    ours, theirs = logits.clone(), logits.clone()
    for backend, z in ((triton_rows, ours), (row_passes, theirs)):
        stats = backend.row_stats(z, targets, Transform(bias))
        backend.row_grad_(z, targets, stats, g, g, Transform(bias))
    torch.testing.assert_close(ours, theirs)


def test_no_rows():
    for vector in triton_rows.row_stats(torch.empty(0, 40), torch.empty(0, dtype=torch.int64), Transform()):
        assert vector.shape == (0,)
