"""Layers whose weights stay in their files, and are read when a layer is visited.

A weight that is on disk is a parameter of the right shape and dtype without memory; `stored` says how to read it. Which
file has what, and what becomes of it, transformers and accelerate know: here their hooks, which would read a layer for
each call, are taken off, and how they read is kept.
"""

from __future__ import annotations

import functools
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uniattn_cli.models.weight_files import check_numbers
from uniattn_cli.run.files import write_json

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

WEIGHTS = "model.safetensors"


def stored(tensor: torch.Tensor) -> Callable[[], torch.Tensor] | None:
    """How to read a weight that is on disk; None for one that is in memory."""
    return getattr(tensor, "uniattn_stored", None)


def in_memory(tensor: torch.Tensor) -> torch.Tensor:
    """A weight, which is read if it is on disk."""
    read = stored(tensor)
    return tensor if read is None else read()


def is_on_disk(model: nn.Module) -> bool:
    """Whether some weights of a model are on disk."""
    return any(stored(parameter) is not None for parameter in model.parameters())


def keep_on_disk(parameter: nn.Parameter, read: Callable[[], torch.Tensor]) -> None:
    """Lets go of a weight's memory; it is read again where it is needed."""
    import torch

    # Not on the meta device: data of the CPU and of a GPU can take its place, and that of the meta device cannot.
    parameter.data = torch.empty((), dtype=parameter.dtype).expand(parameter.shape)
    parameter.uniattn_stored = read  # type: ignore[attr-defined]


def load_arguments(model_class: Any, config: Any) -> tuple[dict[str, Any], tempfile.TemporaryDirectory]:
    """What `from_pretrained` is given so that decoder layers stay on disk, and a folder that has to live as long.

    Files of experts, which transformers keep together in memory, are written there in that form; others stay as they
    are.
    """
    import torch

    with torch.device("meta"):
        model = model_class.from_config(config)
    outside = [name for name, _ in model.named_children() if name != "model"]
    outside += [f"model.{name}" for name, _ in model.model.named_children() if name != "layers"]
    folder = tempfile.TemporaryDirectory(prefix="uniattn-layers-")
    places = {**dict.fromkeys(outside, "cpu"), "model.layers": "disk"}
    return {"device_map": places, "offload_folder": folder.name}, folder


def take_over(model: PreTrainedModel, name: str, folder: tempfile.TemporaryDirectory) -> None:
    """Makes the layers of a model that was loaded with `load_arguments` ours to read.

    Args:
        name: of the model, for messages.
        folder: removed with the model.
    """
    import torch
    from accelerate.hooks import remove_hook_from_submodules

    for path, module in model.named_modules():
        weights = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        for last, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                key = f"{path}.{last}"
                module._parameters[last] = there = torch.nn.Parameter(
                    torch.empty((), dtype=parameter.dtype).expand(parameter.shape), parameter.requires_grad
                )
                keep_on_disk(there, functools.partial(_read, weights, last, key, name))
    remove_hook_from_submodules(model)
    # What accelerate puts there refuses to move the model.
    for attribute in ("to", "cuda", "hf_device_map"):
        vars(model).pop(attribute, None)
    weakref.finalize(model, folder.cleanup)


def _read(weights: Any, last: str, key: str, name: str) -> torch.Tensor:
    weight = weights[last]
    check_numbers([(key, weight)], name)
    return weight


class Shards:
    """The weight files of a checkpoint, one for each layer and one for what is outside of them, written one by one.

    Args:
        folder: of the checkpoint.
        layers: how many there are.
    """

    def __init__(self, folder: Path, layers: int):
        self.folder, self.count = folder, layers + 1
        self._places: dict[str, str] = {}
        self._bytes = 0

    def add_layer(self, index: int, layer: nn.Module) -> None:
        """Writes a layer; its weights that were in memory alone are on disk from now on."""
        name = self._write(index + 2, {f"model.layers.{index}.{key}": each for key, each in layer.state_dict().items()})
        for key, parameter in layer.named_parameters():
            if stored(parameter) is None:
                keep_on_disk(parameter, functools.partial(_tensor, self.folder / name, f"model.layers.{index}.{key}"))

    def finish(self, model: PreTrainedModel) -> None:
        """Writes what is outside of layers, weights that are shared once, and the index of all files."""
        seen: dict[int, str] = {}
        for key, value in model.state_dict().items():
            if not key.startswith("model.layers."):
                seen.setdefault(value.data_ptr(), key)
        state = model.state_dict()
        self._write(1, {key: state[key] for key in seen.values()})
        content = {"metadata": {"total_size": self._bytes}, "weight_map": dict(sorted(self._places.items()))}
        write_json(self.folder / f"{WEIGHTS}.index.json", content)

    def _write(self, number: int, weights: dict[str, torch.Tensor]) -> str:
        from safetensors.torch import save_file

        stem, _, suffix = WEIGHTS.partition(".")
        name = f"{stem}-{number:05d}-of-{self.count:05d}.{suffix}"
        weights = {key: weight.cpu().contiguous() for key, weight in weights.items()}
        save_file(weights, self.folder / name, metadata={"format": "pt"})
        self._places |= dict.fromkeys(weights, name)
        self._bytes += sum(weight.nbytes for weight in weights.values())
        return name


def _tensor(path: Path, key: str) -> torch.Tensor:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.get_tensor(key)
