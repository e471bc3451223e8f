"""Casts of automatic mixed precision, made together: a small model's steps are as long as their launches take.

Autocast casts each weight on its own, under gradient checkpointing again, each gradient likewise, and an input of three
projections three times: a quarter of what a layer of a Llama launches in a step are such casts. Here the weights of a
block, an attention or an MLP, are cast in one launch, their gradients in another, and its input once. Products are the
same; gradients of an input are summed before they are cast, not after.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _CastTogether(torch.autograd.Function):
    """Tensors in another dtype; gradients come back in that of the tensors, which is one for all."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtype = tensors[0].dtype
        return _cast(tensors, dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        there = _cast([each for each in gradients if each is not None], ctx.dtype)
        cast = iter(there)
        return None, *(None if each is None else next(cast) for each in gradients)


def _cast(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    if not tensors:
        return ()
    new = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(new, list(tensors))
    return tuple(new)


def cast_together(model: PreTrainedModel, device: torch.device) -> None:
    """Lets the blocks of a model make their casts together, wherever autocast is on.

    Args:
        model: ready for its stage and not sharded; `forward` of its blocks is replaced.
        device: where it is trained.
    """
    for layer in model.model.layers:
        for block in layer.children():
            linears = _trained_linears(block)
            if linears:
                block.forward = _casting(block.forward, linears, device.type)


def _trained_linears(block: nn.Module) -> list[nn.Linear]:
    """Layers whose weights autocast would cast; none where a block reads matrices in other ways, as experts do."""
    linears = [module for module in block.modules() if type(module) is nn.Linear]
    known = {id(parameter) for linear in linears for parameter in linear.parameters()}
    if any(parameter.dim() > 1 and id(parameter) not in known for parameter in block.parameters()):
        return []
    if any(isinstance(module, nn.ModuleList) for module in block.modules()):
        return []
    return [linear for linear in linears if linear.weight.requires_grad and linear.weight.dtype is torch.float32]


def _casting(forward: Callable[..., Any], linears: list[nn.Linear], device: str) -> Callable[..., Any]:
    """A block's forward pass, in which these layers have weights in autocast's dtype, and its input is in it."""

    def cast_forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_autocast_enabled(device):
            return forward(hidden_states, *args, **kwargs)
        dtype = torch.get_autocast_dtype(device)
        weights = [linear._parameters["weight"] for linear in linears]
        for linear, cast in zip(linears, _CastTogether.apply(dtype, *weights), strict=True):
            linear._parameters["weight"] = cast
        try:
            return forward(hidden_states.to(dtype), *args, **kwargs)
        finally:
            # Gradient checkpointing leaves a block that it runs again in the middle, by an exception.
            for linear, weight in zip(linears, weights, strict=True):
                linear._parameters["weight"] = weight

    return cast_forward
