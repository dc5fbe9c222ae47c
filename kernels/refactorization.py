"""Balanced factors of a low-rank product: `B A^T` unchanged, `B^T B = A^T A` diagonal, no [M, N] matrix on the way.

Shapes: L matrices of one shape, M and N their sides, R rank, P processes.

With thin QR decompositions B = Qb Rb and A = Qa Ra, the R x R core Rb Ra^T = U S V^T gives the singular values and
vectors of the product, so `B' = Qb U S^1/2` and `A' = Qa V S^1/2` (arXiv 2505.22922, weight refactorization; there by
the SVD of the whole product). Cost: O((M + N) R^2 + R^3) instead of O(M N min(M, N)). Nothing is divided, so factors
without full rank are safe.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def refactorize(out_factor_LMR: Tensor, in_factor_LNR: Tensor) -> tuple[Tensor, Tensor]:
    """Balance the factors of `B A^T`.

    A direction whose singular value is exactly zero comes back as a zero column in both factors, and no gradient
    reaches it any more; factors that have been trained do not have such directions.

    Args:
        out_factor_LMR: B, [..., M, R] with R at most M and N; leading dimensions are a batch.
        in_factor_LNR: A, [..., N, R].

    Returns:
        New B and A in the dtypes of the old ones, computed in float32 or wider. The largest entry of every column of B
        is positive, so the result does not depend on the signs a library chooses.

    Raises:
        torch.linalg.LinAlgError: an entry is not finite, or the small SVD does not converge.
    """
    wide = torch.promote_types(out_factor_LMR.dtype, torch.float32)
    out_basis, out_core = torch.linalg.qr(out_factor_LMR.to(wide))
    in_basis, in_core = torch.linalg.qr(in_factor_LNR.to(wide))
    left, right = balanced_split(out_core @ in_core.mT)
    new_out, new_in = out_basis @ left, in_basis @ right
    signs = _signs(_largest(new_out))
    return (new_out * signs).to(out_factor_LMR.dtype), (new_in * signs).to(in_factor_LNR.dtype)


def balanced_split(core: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """`U S^1/2` and `V S^1/2` of a small matrix: factors whose product is its best approximation of that rank.

    Args:
        core: [..., P, Q].
        rank: singular values to keep, the largest; None keeps all.

    Returns:
        [..., P, rank] and [..., Q, rank].

    Raises:
        torch.linalg.LinAlgError: an entry is not finite, or the SVD does not converge.
    """
    u, s, vh = torch.linalg.svd(core, full_matrices=False)
    root = s[..., None, :rank].sqrt()
    return u[..., :rank] * root, vh.mT[..., :rank] * root


def refactorize_sharded(
    out_shard_MR: Tensor, in_shard_NR: Tensor, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    """`refactorize` of factors whose rows are spread over processes, without gathering them (TSQR).

    Each process decomposes its own rows. The first decomposes the stack of the R x R triangles and says how each
    process has to mix its own basis; it alone, because libraries on different devices need not agree on signs. About
    4 P R^2 numbers move instead of (M + N) R. All processes of the group must call this together.

    Args:
        out_shard_MR: this process's rows of B; any number of rows, none included.
        in_shard_NR: its rows of A.
        group: the processes that hold the rest; None is all.

    Returns:
        This process's rows of the new factors.

    Raises:
        torch.linalg.LinAlgError: as `refactorize`, on all processes.
    """
    wide = torch.promote_types(out_shard_MR.dtype, torch.float32)
    out_basis, out_stack = _own_qr(out_shard_MR.to(wide), group)
    in_basis, in_stack = _own_qr(in_shard_NR.to(wide), group)
    mixing = out_stack.new_full((2, *out_stack.shape), float("nan"))
    if dist.get_rank(group) == 0:
        try:
            torch.stack(refactorize(out_stack, in_stack), out=mixing)
        except torch.linalg.LinAlgError:
            pass  # the others wait, and NaN tells them
    dist.broadcast(mixing, group=group, group_src=0)
    if not mixing.isfinite().all():
        raise torch.linalg.LinAlgError("refactorize_sharded: the factors are not finite, or their SVD failed")
    first = dist.get_rank(group) * out_stack.shape[-1]
    new_out = out_basis @ mixing[0, first : first + out_basis.shape[-1]]
    new_in = in_basis @ mixing[1, first : first + in_basis.shape[-1]]
    signs = _signs(_largest(torch.cat(_gathered(_largest(new_out), group))))
    return (new_out * signs).to(out_shard_MR.dtype), (new_in * signs).to(in_shard_NR.dtype)


def _own_qr(shard: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """A basis of this process's rows, and the stacked triangles of all processes, [P R, R]."""
    rank = shard.shape[-1]
    basis, triangle = torch.linalg.qr(shard)
    filled = shard.new_zeros(rank, rank)
    filled[: len(triangle)] = triangle  # fewer rows than columns leave the rest empty
    return basis, torch.cat(_gathered(filled, group))


def _gathered(tensor: Tensor, group: dist.ProcessGroup | None) -> list[Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return parts


def _largest(out_factor: Tensor) -> Tensor:
    """The entry of largest magnitude in each column, [..., 1, R]; 0 where there is no row."""
    if out_factor.shape[-2] == 0:
        return out_factor.new_zeros(*out_factor.shape[:-2], 1, out_factor.shape[-1])
    return out_factor.gather(-2, out_factor.abs().argmax(dim=-2, keepdim=True))


def _signs(entries: Tensor) -> Tensor:
    """+1, or -1 where the entry is negative."""
    return torch.where(entries < 0, -1.0, 1.0).to(entries.dtype)
