"""Weights that come to the device where layers run, for as long as their layer runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from uniattn_cli.models.on_disk import is_on_disk, stored

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel


@contextlib.contextmanager
def resident(device: torch.device | None, *modules: nn.Module) -> Iterator[None]:
    """Keeps the modules' weights on a device for a while, so that one layer at a time is enough.

    Weights that were changed or added meanwhile are taken back to where the others came from, unchanged ones are
    simply forgotten. Modules may share weights. Those on disk are read, and must not be changed.

    Args:
        device: None leaves everything where it is; what is on disk comes to the CPU.
    """
    moved: dict[int, tuple[torch.Tensor, torch.Tensor, int]] = {}
    for tensor in _tensors(modules):
        read = stored(tensor)
        # What has no memory at all is made while the layer is here (`building.build_converted`).
        if id(tensor) in moved or tensor.is_meta or (read is None and device in (None, tensor.device)):
            continue
        at_home = tensor.data
        there = at_home if read is None else read()
        tensor.data = there if device is None else there.to(device)
        moved[id(tensor)] = (tensor, at_home, tensor._version)
    try:
        yield
    finally:
        for tensor, at_home, version in moved.values():
            if tensor._version != version:
                assert stored(tensor) is None, "what is in a file is not changed"
                at_home.copy_(tensor.data)
            tensor.data = at_home
        if device is not None:
            home = next((at_home.device for _, at_home, _ in moved.values()), device)
            for tensor in _tensors(modules):
                if tensor.device != home:
                    tensor.data = tensor.data.to(home)


def _tensors(modules: tuple[nn.Module, ...]) -> Iterator[torch.Tensor]:
    for module in modules:
        yield from module.parameters()
        yield from module.buffers()


@contextlib.contextmanager
def layer_by_layer(model: PreTrainedModel, device: torch.device | None) -> Iterator[None]:
    """Lets a model that is in the computer's memory or on disk run where one of its layers at a time fits.

    Args:
        device: None leaves the model where it is.
    """
    if device is None and not is_on_disk(model):
        yield
        return
    handles, open_layers = [], []

    def enter(layer: nn.Module, args: tuple) -> None:
        visit = resident(device, layer)
        visit.__enter__()
        open_layers.append(visit)

    def leave(layer: nn.Module, args: tuple, output: Any) -> None:
        open_layers.pop().__exit__(None, None, None)

    for layer in model.model.layers:
        handles += [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]
    with resident(device, *outside(model)), hooked(*handles):
        yield


def outside(model: PreTrainedModel) -> list[nn.Module]:
    """All of a model but its decoder layers."""
    others = [module for name, module in model.model.named_children() if name != "layers"]
    return others + [module for name, module in model.named_children() if name != "model"]


@contextlib.contextmanager
def hooked(*handles: Any) -> Iterator[None]:
    """Removes hooks at the end."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
