"""From attributions to credit: whatever the explainer and the mode, the tokens' credit sums to the reward.

Shape letters: B responses, T tokens, K explainers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_reason.errors import UserError
from lit_reason.rewards.attribution.config import Mode

SMALLEST = 1e-9  # of the absolute sum: a signed sum below this is 0 but for rounding


def token_credit(
    amount_BT: Tensor, reward_B: Tensor, valid_BT: Tensor, mode: Mode = "additive", temperature: float = 1.0
) -> Tensor:
    """Credit of each token, which sums to the reward of its response.

    `additive` keeps the amounts and pays the rest of the reward, such as the worth of the fully masked response or what
    LIME's intercept held, at the last valid token. The other modes split the reward: in proportion to the amounts
    (`ratio`, which blows up where they cancel), to their absolute values (`abs`) or to `exp(amount / temperature)`.
    Where there is nothing to split by, all of it goes to the last token.

    Args:
        amount_BT: attribution of each token in units of reward.
        reward_B: reward of each response.
        valid_BT: which tokens are no padding.
        mode: see above.
        temperature: of `softmax`.

    Returns:
        `float64 [B, T]`, 0 on padding, and 0 everywhere for an empty response.
    """
    amount_BT = torch.where(valid_BT, amount_BT.double(), 0.0)
    reward_B = reward_B.double()
    if mode == "softmax":
        amount_BT = (amount_BT / temperature).masked_fill(~valid_BT, -torch.inf).softmax(1).nan_to_num(0.0)
    elif mode == "abs":
        amount_BT = amount_BT.abs()
    if mode != "additive":
        total_B, size_B = amount_BT.sum(1), amount_BT.abs().sum(1)
        whole_B = total_B.abs() > SMALLEST * size_B
        amount_BT = amount_BT * torch.where(whole_B, reward_B / torch.where(whole_B, total_B, 1.0), 0.0)[:, None]
    return paid_out(amount_BT, reward_B, valid_BT)


def paid_out(credit_BT: Tensor, reward_B: Tensor, valid_BT: Tensor) -> Tensor:
    """Pay what is missing of the reward at the last valid token.

    Args:
        credit_BT: credit so far, 0 on padding.
        reward_B: what it is to sum to.
        valid_BT: which tokens are no padding.
    """
    place_T = torch.arange(valid_BT.shape[1])
    last_BT = valid_BT & (place_T == torch.where(valid_BT, place_T, -1).amax(1, keepdim=True))
    for _ in range(2):  # the second time for what rounding left over
        credit_BT = credit_BT + last_BT * (reward_B.double() - credit_BT.sum(1))[:, None]
    return credit_BT


def shares(share_BT: Tensor, reward_B: Tensor, valid_BT: Tensor) -> Tensor:
    """Credit of an explainer that gives shares of the reward.

    Args:
        share_BT: shares, not negative; brought to sum 1 over the valid tokens.
        reward_B: reward of each response.
        valid_BT: which tokens are no padding.

    Returns:
        `float64 [B, T]`.
    """
    share_BT = torch.where(valid_BT, share_BT.double(), 0.0)
    total_B1 = share_BT.sum(1, keepdim=True)
    share_BT = share_BT / torch.where(total_B1 > 0, total_B1, 1.0)
    return paid_out(share_BT * reward_B.double()[:, None], reward_B, valid_BT)


def mixed(weights_K: Tensor, credit_KT: Tensor) -> Tensor:
    """The shaped reward of each token, `sum_k w_k credit_kt` (arXiv 2504.16272).

    Args:
        weights_K: on the simplex.
        credit_KT: of each explainer.

    Returns:
        `float64 [T]` with the sum of each row of `credit_KT`.

    Raises:
        UserError: the weights are not on the simplex.
    """
    check_weights(weights_K.tolist())
    return weights_K.double() @ credit_KT


def check_weights(weights: list[float] | tuple[float, ...]) -> None:
    """Refuse weights that are negative or do not sum to 1: the shaped reward would not sum to the reward.

    Args:
        weights: one an explainer.

    Raises:
        UserError: says what they sum to.
    """
    if any(w < -1e-9 for w in weights) or abs(sum(weights) - 1) > 1e-6:
        raise UserError(
            f"shaping weights {[round(w, 6) for w in weights]} sum to {sum(weights):.6g}; they must not be negative "
            "and must sum to 1, or the shaped reward would not sum to the reward"
        )
