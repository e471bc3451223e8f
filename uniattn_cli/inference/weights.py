"""Weights laid side by side, so that one matrix product does the work of several.

The fused tensor takes the place of the parts: their parameters, biases too, become views of it. A model that decodes
therefore takes no more memory than before, and what is trained later is seen here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


def fuse_rows(parts: Sequence[nn.Parameter]) -> torch.Tensor:
    """[rows of all parts, columns] over the weights of projections that read the same input.

    Parts that lie one after the other already, such as those of a layer that two models share, are not copied.
    """
    if len(parts) == 1:
        return parts[0].data
    rows = sum(part.shape[0] for part in parts)
    if _adjacent(parts):
        return parts[0].data.as_strided((rows, *parts[0].shape[1:]), parts[0].stride())
    fused = torch.cat([part.data for part in parts])
    for part, view in zip(parts, fused.split([part.shape[0] for part in parts]), strict=True):
        part.data = view
    return fused


def fuse_columns(parts: Sequence[nn.Parameter]) -> torch.Tensor:
    """[rows, columns of all parts] over the weights of projections whose outputs are added."""
    if len(parts) == 1:
        return parts[0].data
    columns = sum(part.shape[1] for part in parts)
    if _beside(parts, columns):
        return parts[0].data.as_strided((parts[0].shape[0], columns), (columns, 1))
    fused = torch.cat([part.data for part in parts], dim=1)
    for part, view in zip(parts, fused.split([part.shape[1] for part in parts], dim=1), strict=True):
        part.data = view
    return fused


def fuse_biases(biases: Sequence[nn.Parameter | None], rows: Sequence[int], like: torch.Tensor) -> torch.Tensor | None:
    """The bias of fused rows, [rows], zero where a part has none; None where no part has one."""
    found = [bias for bias in biases if bias is not None]
    if len(found) == len(biases):
        return fuse_rows(found)
    if not found:
        return None
    parts = [like.new_zeros(count) if bias is None else bias.data for bias, count in zip(biases, rows, strict=True)]
    fused = torch.cat(parts)
    for bias, view in zip(biases, fused.split(list(rows)), strict=True):
        if bias is not None:
            bias.data = view
    return fused


def _adjacent(parts: Sequence[nn.Parameter]) -> bool:
    first = parts[0].data
    expected = first.data_ptr()
    for part in parts:
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (same and part.is_contiguous() and part.data_ptr() == expected and part.shape[1:] == first.shape[1:]):
            return False
        expected += part.numel() * part.element_size()
    return True


def _beside(parts: Sequence[nn.Parameter], columns: int) -> bool:
    """Whether parts are the columns of one matrix already."""
    first = parts[0].data
    expected = first.data_ptr()
    for part in parts:
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (same and part.stride() == (columns, 1) and part.data_ptr() == expected):
            return False
        expected += part.shape[1] * part.element_size()
    return True
