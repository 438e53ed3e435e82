"""Rows of different lengths as one tensor."""

from collections.abc import Sequence

import torch
from torch import Tensor


def pad(
    rows: Sequence[Sequence[int] | Sequence[float] | Tensor],
    value: float,
    side: str = "right",
    multiple_of: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Stack B one-dimensional rows into (B, T), filled up with `value`.

    Args:
        side: "right" or "left", where the filling goes.
        multiple_of: round T up to a multiple of this.
        dtype: of the result; by default that of the first row.
    """
    if side not in ("left", "right"):
        raise ValueError(f"side must be 'left' or 'right', got {side!r}.")
    tensors = [torch.as_tensor(row, dtype=dtype) for row in rows]
    length = max(len(row) for row in tensors)
    if multiple_of is not None:
        length = -(-length // multiple_of) * multiple_of
    padded = torch.full((len(tensors), length), value, dtype=tensors[0].dtype, device=tensors[0].device)
    for target, row in zip(padded, tensors):
        if len(row):
            target[slice(len(row)) if side == "right" else slice(-len(row), None)] = row
    return padded
