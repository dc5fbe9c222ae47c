"""Losses of whole answers, as functions of their summed log-probabilities.

An answer's log-ratio is `r = sum_t (log p_theta(t) - log p_ref(t))` over its tokens, with p_ref the model before
training (or, in self-play, of the round before). Letters: S trained tokens, N answers or pairs of answers.

All return one loss an answer; sums, weights and divisors are the caller's. A sum of log-probabilities needs 32 bits,
which the head's operations give whatever the model's dtype is.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_reason.errors import UserError, did_you_mean

Shape = Literal["sigmoid", "hinge", "linear"]


def sequence_sums(values_S: Tensor, sequence_S: Tensor, count: int) -> Tensor:
    """Sums over the tokens of each sequence of a pack, with gradient.

    Args:
        values_S: one number a token, such as its log-probability.
        sequence_S: `int64 [S]` number of the sequence that each token belongs to.
        count: N, number of sequences; one without tokens gets 0.

    Returns:
        `[N]`, in the dtype of the values.
    """
    return values_S.new_zeros(count).index_add(0, sequence_S, values_S)


def margin_loss(margin_N: Tensor, shape: Shape = "sigmoid") -> Tensor:
    """A falling, convex function of by how much one answer is preferred to another.

    `sigmoid`: `log(1 + exp(-m))`, that of DPO and of SPIN's experiments; `hinge`: `max(0, 1 - m)`; `linear`: `-m`,
    which has no lower bound.

    Args:
        margin_N: margins.
        shape: which function.

    Returns:
        `[N]` losses.

    Raises:
        UserError: there is no such shape.
    """
    if shape == "sigmoid":
        return F.softplus(-margin_N)
    if shape == "hinge":
        return F.relu(1 - margin_N)
    if shape == "linear":
        return -margin_N
    shapes = get_args(Shape)
    raise UserError(
        f"no preference loss has shape {shape!r}; there are {', '.join(shapes)}{did_you_mean(shape, shapes)}"
    )


def pair_loss(chosen_N: Tensor, rejected_N: Tensor, *, beta: float = 0.1, shape: Shape = "sigmoid") -> Tensor:
    """The loss of answers of which one is preferred: `shape(beta * (r_chosen - r_rejected))`.

    With `sigmoid` this is DPO (arXiv 2305.18290, equation 7). With answers of people chosen and those of the model of
    the round before rejected it is SPIN (arXiv 2401.01335, equation 4.7; its lambda is `beta`), for any shape.

    Args:
        chosen_N: log-ratio of each preferred answer.
        rejected_N: log-ratio of the answer that it is preferred to.
        beta: how far the model may go from the reference: the larger, the less. Positive.
        shape: function of the margin, see `margin_loss`.

    Returns:
        `[N]` losses.
    """
    return margin_loss(beta * (chosen_N - rejected_N), shape)


def chi2_penalty(chosen_N: Tensor, rejected_N: Tensor) -> Tensor:
    """Half the mean square of the scores of both answers of a pair, which bounds the linear loss.

    With weight c beside that loss, preferred answers from p and others from q, the best score of an answer is
    `(2 / c) (p - q) / (p + q)`, never beyond `2 / c`; the loss is then `-2 / c` times the chi-square divergence of p
    from the even mix of p and q. A penalty of this kind is that of LS-IQ (arXiv 2303.00599).

    Args:
        chosen_N: score of each preferred answer.
        rejected_N: score of the answer that it is preferred to.

    Returns:
        `[N]` penalties, none below 0.
    """
    return (chosen_N**2 + rejected_N**2) / 4


def npo_loss(ratio_N: Tensor, *, beta: float = 0.1) -> Tensor:
    """Negative preference optimization, `-(2 / beta) log sigmoid(-beta r)` (arXiv 2404.05868, equation 3).

    A pair loss that has only the rejected answer. Its gradient is that of `r` times `2 p^beta / (p^beta + p_ref^beta)`:
    gradient ascent at the start, and nothing once the answer has become unlikely.

    Args:
        ratio_N: log-ratio of each answer that is to become unlikely.
        beta: inverse temperature; towards 0 the loss becomes plain gradient ascent.

    Returns:
        `[N]` losses, none below 0.
    """
    return (2 / beta) * F.softplus(beta * ratio_N)


def simnpo_loss(mean_logp_N: Tensor, *, beta: float = 4.5, margin: float = 0.0) -> Tensor:
    """SimNPO, `-(2 / beta) log sigmoid(-beta l / |y| - margin)` (arXiv 2410.07163): NPO without reference.

    Args:
        mean_logp_N: mean log-probability of the tokens of each answer that is to become unlikely.
        beta: inverse temperature.
        margin: how much further below even odds the answer is pushed; outside the product with beta.

    Returns:
        `[N]` losses, none below 0.
    """
    return (2 / beta) * F.softplus(beta * mean_logp_N + margin)


def check_beta(name: str, beta: float) -> None:
    """Refuse an inverse temperature that is not positive.

    Args:
        name: the setting, for the message.
        beta: its value.

    Raises:
        UserError: it is 0, negative, or no number.
    """
    if not (beta > 0 and torch.isfinite(torch.tensor(beta))):
        raise UserError(f"{name} is {beta}; it must be a positive number")
