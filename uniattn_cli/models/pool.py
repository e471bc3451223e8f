"""The models of an evaluation in memory, as many at a time as fit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from uniattn_cli.models.device import available_bytes, release_memory
from uniattn_cli.models.loading import load_model
from uniattn_cli.models.of_run import Subject
from uniattn_cli.recipe.schema import ModelSpec

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# What stays free beside the weights for activations and logits.
RESERVED_BYTES = 1 << 30


class ModelPool:
    """Keeps models loaded while they fit, because speed is measured on all of them in turn.

    Attributes:
        together: whether all models asked for so far are still loaded.
    """

    def __init__(self, spec: ModelSpec, device: torch.device):
        self.spec = spec
        self.device = device
        self.together = True
        self._loaded: dict[str, PreTrainedModel] = {}

    def get(self, subject: Subject) -> PreTrainedModel:
        """The model in evaluation mode on the device; drops the others first if there is no room.

        Raises:
            ModelError: the weights cannot be read.
            CheckpointError: weights are missing, unexpected or of another shape.
        """
        if subject.name not in self._loaded:
            largest = max((weight_bytes(model) for model in self._loaded.values()), default=0)
            if self._loaded and available_bytes(self.device) < largest * 1.25 + RESERVED_BYTES:
                self.together = False
                self._loaded.clear()
                release_memory(self.device)
            self._loaded[subject.name] = load_model(subject.source, self.spec, self.device)
        return self._loaded[subject.name]


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of a model's parameters, tied ones once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
