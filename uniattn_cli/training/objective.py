"""What a stage of training minimises, and how a loss is computed inside the model's own forward pass."""

from __future__ import annotations

import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from uniattn_cli.models.losses import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Objective(ABC):
    """A training loss: a weighted sum of parts, each a mean over tokens of an optimiser step.

    A step is divided into micro-batches and processes. So an objective gives sums over the tokens of a micro-batch, and
    their number; the trainer divides, weighs and logs. `inputs` are always those of one micro-batch, padded
    (`attention_mask`) or packed (`position_ids`), as TRL's collator makes them.

    Attributes:
        weights: of each part, by the name under which it is logged.
    """

    weights: Mapping[str, float]

    def prepare(self, batches: Iterable[dict[str, torch.Tensor]]) -> None:  # noqa: B027, most need nothing
        """Is called before training with the micro-batches of the stage's first step, `labels` included."""

    @abstractmethod
    def counts(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The number of tokens, a scalar, over which `loss_sums` sums each part; `inputs` include `labels`."""

    @abstractmethod
    def targets(self, inputs: dict[str, torch.Tensor]) -> Any:
        """What `loss_sums` compares the model with, computed outside its forward pass; `inputs` include `labels`."""

    @abstractmethod
    def loss_sums(self, model: PreTrainedModel, inputs: dict[str, Any], targets: Any) -> dict[str, torch.Tensor]:
        """Runs the model and sums each part of the loss over its tokens.

        Args:
            model: may be inside DDP or FSDP; this is called in its forward (see `attach_objective`).
            inputs: without `labels`, with `output_router_logits` for a mixture of experts.
            targets: result of `targets` for the same micro-batch.

        Returns:
            A scalar for each name in `weights`, not yet weighted; for a mixture of experts also `router`, the mean
            load-balancing loss of this forward pass.
        """


class CrossEntropy(Objective):
    """The cross-entropy of learned tokens."""

    def __init__(self) -> None:
        self.weights = {"cross_entropy": 1.0}

    def counts(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"cross_entropy": (inputs["labels"][:, 1:] != IGNORED).sum()}

    def targets(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return inputs["labels"]

    def loss_sums(self, model: Any, inputs: dict[str, Any], targets: torch.Tensor) -> dict[str, torch.Tensor]:
        if targets.device.type == "cuda" or "output_router_logits" in inputs:
            # TRL's head computes logits in tiles, on CUDA with its own kernel, and the router's loss.
            outputs = model.plain_forward(**inputs, labels=targets, fused_lm_head=True)
            sums = {"cross_entropy": -outputs.log_probs.sum()}
            return sums if outputs.aux_loss is None else sums | {"router": outputs.aux_loss}
        labels = targets[:, 1:]
        columns = (labels != IGNORED).any(0).nonzero().squeeze(1)
        logits = model.plain_forward(**inputs, logits_to_keep=columns).logits
        labels = labels[:, columns]
        learned = labels != IGNORED
        return {"cross_entropy": F.cross_entropy(logits[learned].float(), labels[learned], reduction="sum")}


def attach_objective(model: PreTrainedModel) -> None:
    """Lets `model(**inputs, objective=f)` return `f(model, inputs)`.

    So `f` runs inside the model's own forward, around which mixed precision, DDP and FSDP do their work: outside of
    it, for example, a sharded head has no weights. Where `f` needs the whole model, it calls `model.plain_forward`:
    `forward` would enter the trainer's autocast a second time, and that instance would stay on ever after.
    """
    model.plain_forward = model.forward  # type: ignore[assignment]  # a module holds anything

    def forward(self: Any, *args: Any, objective: Callable[..., Any] | None = None, **inputs: Any) -> Any:
        return self.plain_forward(*args, **inputs) if objective is None else objective(self, inputs)

    model.forward = types.MethodType(forward, model)
