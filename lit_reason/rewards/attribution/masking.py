"""What stands for masked tokens. Ids are masked, never text, which would have to be cut into tokens again.

Shape letters: N copies, T tokens of a response, L tokens of prompt and response.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_reason.errors import UserError
from lit_reason.rewards.attribution.config import Masking


def masked_copies(
    prompt: Sequence[int],
    response: Sequence[int],
    present_NT: Tensor,
    masking: Masking,
    *,
    fill_id: int | None = None,
    reference: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Copies of a response in which some tokens are masked, behind the whole prompt.

    Args:
        prompt: token ids; never masked.
        response: token ids.
        present_NT: which tokens each copy keeps.
        masking: `pad`, `token`, `reference` or `delete`.
        fill_id: token for `token`, and for `reference` past the end of it.
        reference: response whose tokens stand in, for `reference`.

    Returns:
        `int64 [N, L]` ids and `bool [N, L]` attention. Copies of `delete` are filled up on the right.

    Raises:
        UserError: `reference` without a reference that is long enough, or a token to go on with.
    """
    N, T = present_NT.shape
    head_NQ = torch.tensor(prompt, dtype=torch.long).expand(N, -1)
    ids_NT = torch.tensor(response, dtype=torch.long).expand(N, T)
    seen_NT = torch.ones_like(present_NT)
    if masking == "pad":
        seen_NT = present_NT
    elif masking == "delete":
        order_NT = (~present_NT).to(torch.uint8).argsort(dim=1, stable=True)
        ids_NT, seen_NT = ids_NT.gather(1, order_NT), present_NT.gather(1, order_NT)
    else:
        other_T = torch.tensor(_stand_ins(T, masking, fill_id, reference), dtype=torch.long)
        ids_NT = torch.where(present_NT, ids_NT, other_T)
    return torch.cat([head_NQ, ids_NT], 1), torch.cat([torch.ones_like(head_NQ, dtype=torch.bool), seen_NT], 1)


def _stand_ins(T: int, masking: Masking, fill_id: int | None, reference: Sequence[int] | None) -> list[int]:
    given = list(reference or ())[:T] if masking == "reference" else []
    if len(given) < T and fill_id is None:
        raise UserError(
            f"attribution.masking {masking}: {len(given)} of {T} tokens have a stand-in, "
            "and attribution.fill_id names none for the rest"
        )
    return given + [fill_id or 0] * (T - len(given))
