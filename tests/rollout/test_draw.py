"""One draw from a truncated distribution, by hand, and the streams of random numbers."""

from __future__ import annotations

import pytest
import torch

from lit_reason.rollout.draw import draw, uniforms, words_of

LOGITS = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log()


@pytest.mark.parametrize(
    ("settings", "edges"),
    [  # quantile -> token, by hand
        (
            {},
            [(0.0, 0), (0.149, 0), (0.151, 1), (0.649, 1), (0.651, 2), (0.69, 2), (0.71, 3), (1 - 1e-12, 3)],
        ),
        ({"top_k": 2}, [(0.0, 1), (0.624, 1), (0.626, 3), (1 - 1e-12, 3)]),
        ({"top_p": 0.5}, [(0.0, 1), (1 - 1e-12, 1)]),
        ({"top_p": 0.51}, [(0.624, 1), (0.626, 3), (1 - 1e-12, 3)]),
        ({"top_p": 0.9}, [(0.0, 0), (0.157, 0), (0.158, 1), (0.684, 1), (0.685, 3), (1 - 1e-12, 3)]),
        ({"top_k": 3, "top_p": 0.6}, [(0.62, 1), (0.63, 3), (1 - 1e-12, 3)]),
        ({"top_k": 1}, [(0.99, 1)]),
        ({"top_k": 99}, [(0.149, 0), (0.151, 1), (0.69, 2), (0.71, 3)]),
    ],
)
def test_draw_is_the_quantile_function_of_the_truncated_distribution(settings, edges):
    settings = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, **settings}
    u = torch.tensor([e[0] for e in edges], dtype=torch.float64)
    assert draw(LOGITS.expand(len(u), -1), u, **settings)[0].tolist() == [e[1] for e in edges]


def test_ties_with_the_last_token_kept_stay():
    logits = torch.tensor([[0.25, 0.25, 0.25, 0.1, 0.15]]).log().expand(4, -1)
    u = torch.tensor([0.0, 0.34, 0.67, 1 - 1e-12], dtype=torch.float64)
    for settings in ({"top_k": 1, "top_p": 1.0}, {"top_k": 0, "top_p": 0.3}):
        assert draw(logits, u, temperature=1.0, **settings)[0].tolist() == [0, 1, 2, 2]


def test_a_nucleus_wider_than_the_guess():
    """Masses fall slowly over 3000 tokens, so half of the mass needs more than the first guess of 1024.

    The row between needs a single token.
    """
    logits = torch.zeros(3, 4000)
    logits[::2, :3000] += torch.linspace(2.0, 1.0, 3000)
    logits[1, 7] = 20.0
    mass = logits[0].double().softmax(0)
    size = int((mass.cumsum(0) < 0.5).sum()) + 1
    assert 1024 < size < 3000
    u = torch.tensor([0.5, 1 - 1e-12, 1 - 1e-12], dtype=torch.float64)
    middle = int((mass[:size].cumsum(0) <= 0.5 * mass[:size].sum()).sum())
    assert draw(logits, u, temperature=1.0, top_p=0.5, top_k=0)[0].tolist() == [middle, 7, size - 1]


def test_draw_never_takes_a_token_without_mass():
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).expand(2, -1)
    u = torch.tensor([0.0, 1.0], dtype=torch.float64)  # 1.0 stands for a draw that rounding lifts onto the total
    assert draw(logits, u, temperature=1.0, top_p=1.0, top_k=0)[0].tolist() == [1, 2]


@pytest.mark.parametrize("settings", [{}, {"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.5}])
def test_a_drawn_token_has_its_log_probability_before_truncation(settings):
    logits, u = torch.randn(6, 20), torch.linspace(0, 0.99, 6, dtype=torch.float64)
    ids, logp = draw(logits, u, temperature=0.7, **{"top_p": 1.0, "top_k": 0, **settings})
    wanted = (logits.double() / 0.7).log_softmax(-1)[torch.arange(6), ids]
    torch.testing.assert_close(logp, wanted, rtol=0, atol=1e-9)


def test_uniforms_continue_and_differ():
    first = uniforms(0, (0, 1, 2), 5)
    assert (uniforms(0, (0, 1, 2), 40)[:5] == first).all() and ((first >= 0) & (first < 1)).all()
    for seed, key in ((1, (0, 1, 2)), (0, (0, 2, 1)), (0, (1, 1, 2)), (0, (0, 1))):
        assert (uniforms(seed, key, 5) != first).any()


def test_words_of_different_contents_differ_and_fit_a_key():
    words = [words_of(content) for content in (b"", b"a", b"b", b"ab")]
    assert len(set(words)) == 4 and all(len(w) == 4 and all(0 <= n < 2**32 for n in w) for w in words)
    assert words[1] == words_of(b"a")
