"""Where a model is kept and where its layers run, planned from the memory that is free."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from uniattn_cli.models.device import available_bytes

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from uniattn_cli.models.hub import Source
    from uniattn_cli.recipe.schema import ModelSpec

# Share of the free memory that weights may take; the rest is for hidden states, queries, keys and moments.
MOST_OF_MEMORY = 0.6


@dataclass(frozen=True)
class Placement:
    """Where a model and its layers are.

    Attributes:
        home: where weights are kept, and states of tokens between layers.
        device: where layers run one at a time; None where all of them are at home.
        on_disk: weights of layers stay in their files, and are read when their layer runs.
    """

    home: torch.device
    device: torch.device | None = None
    on_disk: bool = False

    @property
    def whole(self) -> bool:
        """Whether the whole model is where it runs."""
        return self.device is None and not self.on_disk

    @property
    def words(self) -> str:
        """For a note: where it is loaded."""
        if self.whole:
            return f"on {self.home}"
        kept = "from its files" if self.on_disk else "in CPU memory"
        return f"{kept}, one layer at a time on {self.device or self.home}"

    def load(self, source: Source, spec: ModelSpec) -> PreTrainedModel:
        """`models.loading.load_model` with the model so placed."""
        from uniattn_cli.models.loading import load_model

        return load_model(source, spec, self.home, layers_on_disk=self.on_disk)


def place(source: Source, offload: str, weight_bytes: int, device: torch.device) -> Placement:
    """`placement` of a model; layers of multi-modal ones, whose files name parts otherwise, cannot stay on disk."""
    from uniattn_cli.models.loading import read_config
    from uniattn_cli.models.text_part import is_multi_modal

    return placement(offload, weight_bytes, device, separable=not is_multi_modal(read_config(source.path)))


def placement(
    offload: str,
    weight_bytes: int,
    device: torch.device,
    *,
    separable: bool = True,
    free: Callable[[torch.device], int] | None = None,
) -> Placement:
    """Where a model is kept, and where its layers run.

    Args:
        offload: `conversion.offload` of the recipe.
        weight_bytes: of the whole model.
        device: the one asked for.
        separable: layers can be read from the files one by one.
        free: memory of a device; None asks it.
    """
    import torch

    def fits(place: torch.device) -> bool:
        return weight_bytes < MOST_OF_MEMORY * (free or available_bytes)(place)

    cpu = torch.device("cpu")
    runs = None if device.type == "cpu" else device
    if separable and (offload == "disk" or (offload == "auto" and not fits(device) and not fits(cpu))):
        return Placement(cpu, runs, on_disk=True)
    if device.type == "cuda" and (offload == "always" or (offload == "auto" and not fits(device))):
        return Placement(cpu, runs)
    return Placement(device)
