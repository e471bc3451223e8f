"""Changed layers learn their attention outputs on the base's own hidden states: the loss of stages with `loss: local`.

    loss = mean over tokens and changed layers of |layer's attention output - base's|² / E_layer

E_layer is that of `training.distill`. One forward pass computes all of it. As long as no stage has trained anything
else, the model is its base but for the attention of changed layers. So each of them runs the base's attention beside
its own on the same inputs and hands on the base's output: every layer sees what it sees in the base, no layer's error
reaches another, and the gradient of a layer's error stays in it.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from uniattn_cli.recipe.schema import DistillationSpec
from uniattn_cli.training.distill import (
    Distillation,
    Targets,
    compared_positions,
    energies,
    pick,
    places_of,
    relative_errors,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class LocalDistillation(Distillation):
    """The error of each changed layer's attention output, on all tokens; see the head of this file.

    Args:
        teacher: the base, whose weights the trained model has outside of the attention of changed layers.
        layers: changed layers with something to train.
        config: of the trained model, for its attention backend, to which the masks belong.
    """

    def __init__(self, teacher: PreTrainedModel, layers: Sequence[int], config: PretrainedConfig):
        super().__init__(DistillationSpec(weight=0.0, attention=1.0), teacher, layers=layers)
        self.weights = {"attention": 1.0}
        # Of all changed layers, also those with nothing to train. Copies, for they run beside the trained ones: in the
        # same precision, on masks of the same backend.
        self.attentions = {
            layer: copy.deepcopy(teacher.model.layers[layer].self_attn) for layer in config.layout.changed
        }
        for attention in self.attentions.values():
            attention.config._attn_implementation = config._attn_implementation

    def prepare(self, batches: Iterable[dict[str, torch.Tensor]]) -> None:
        self.energies = energies(map(super().targets, batches))

    def targets(self, inputs: dict[str, torch.Tensor]) -> Targets:
        """Only where tokens are compared: what with, the model's forward pass computes."""
        compared = compared_positions(inputs, inputs["labels"], "all")
        return Targets(inputs["labels"], compared, places_of(compared))

    def loss_sums(self, model: PreTrainedModel, inputs: dict[str, Any], targets: Targets) -> dict[str, torch.Tensor]:
        ours: dict[int, torch.Tensor] = {}
        theirs: dict[int, torch.Tensor] = {}
        with self._in_place_of(model, targets.places, ours, theirs):
            model.model(**inputs)
        return {"attention": relative_errors(ours, theirs, self.energies)}

    @contextlib.contextmanager
    def _in_place_of(
        self,
        model: PreTrainedModel,
        places: torch.Tensor,
        ours: dict[int, torch.Tensor],
        theirs: dict[int, torch.Tensor],
    ) -> Iterator[None]:
        """Lets changed layers hand on the base's attention outputs, and keeps both, [positions, hidden]."""

        def hook_of(layer: int) -> Any:
            def hook(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
                given = {name: value for name, value in kwargs.items() if name != "uniattn_shared"}
                hidden = args[0] if args else given["hidden_states"]
                with torch.no_grad():
                    base = self.attentions[layer].to(hidden.dtype)(*args, **given)
                if layer in self.layers:
                    ours[layer], theirs[layer] = pick(output[0], places), pick(base[0], places)
                return base

            return hook

        handles = [
            model.model.layers[layer].self_attn.register_forward_hook(hook_of(layer), with_kwargs=True)
            for layer in self.attentions
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
