"""What to say of an output that is NaN or infinite: are the weights so, or only what comes of them?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lit_reason.errors import UserError


def broken_output(hf: Any, where: str, dtype: torch.dtype) -> UserError:
    """The error of logits that are NaN or infinite.

    Args:
        hf: the model; its weights are looked through.
        where: which prompt, turn and token.
        dtype: of the logits.
    """
    weights = dict(hf.named_parameters())
    broken = [name for name, weight in weights.items() if not bool(_own(weight).isfinite().all())]
    if broken:
        cause = (
            f"{len(broken)} of its {len(weights)} weight tensors are not finite, the first of them {broken[0]}. "
            "Training has diverged: go on from an earlier checkpoint, with a lower optim.lr or gradient_clip_val"
        )
    elif dtype == torch.float16:
        cause = (
            "its weights are finite, but float16 ends at 65504 and its activations went beyond: use bfloat16 or "
            "float32 (lm.dtype, trainer.precision)"
        )
    else:
        cause = (
            "its weights are finite, but its activations are not: weights have grown too large (a lower optim.lr or a "
            "trainer.gradient_clip_val), or the checkpoint is damaged"
        )
    return UserError(f"{where}: the model's output is NaN or infinite; {cause}")


def _own(weight: Tensor) -> Tensor:
    return weight.to_local() if isinstance(weight, DTensor) else weight
