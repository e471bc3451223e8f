"""Learning from a frozen teacher: the loss of stages with `loss: distillation`.

    loss = (1 - weight) · mean over learned tokens of cross-entropy
           + mean over compared tokens of [ weight · temperature² · KL(teacher || student)
             + attention · mean over changed layers of |student's attention output - teacher's|² / E_layer ]

Means are over the tokens of an optimiser step, of all its processes and forward passes. Compared are the learned
tokens, or with `tokens: all` those of prompts too: a teacher has something to say about each. Each mean has a count of
its own, because a step of long prompts with short answers would otherwise count several times as much as another.
E_layer is the mean |teacher's attention output|² over the compared tokens of the stage's first step; as a constant it
keeps the loss a sum over tokens, which comes out the same however a step is divided. Both models see the same rows;
the attention output is that of the attention block, where a layer's compensation has been added.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from uniattn_cli.models.losses import IGNORED, LOGITS_AT_ONCE, head_logits
from uniattn_cli.recipe.schema import DistillationSpec
from uniattn_cli.training.divergence import TopK, dense_divergence, sparse_divergence, top_k
from uniattn_cli.training.objective import Objective

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from uniattn_cli.training.stored_teacher import StoredTeacher


@dataclass(frozen=True)
class Targets:
    """What a forward pass is compared with, at its compared positions, row after row.

    Attributes:
        labels: [batch, tokens], -100 where nothing is learned.
        compared: [batch, tokens - 1], true at positions whose next token is compared.
        places: int64 [positions], the same as indices into [batch * tokens].
        hidden: last hidden states of the teacher, [positions, hidden]; None where top_k is there.
        top_k: the teacher's coarsened distribution.
        attention: the teacher's attention outputs by layer, each [positions, hidden].
    """

    labels: torch.Tensor
    compared: torch.Tensor
    places: torch.Tensor
    hidden: torch.Tensor | None = None
    top_k: TopK | None = None
    attention: dict[int, torch.Tensor] = field(default_factory=dict)


def compared_positions(inputs: dict[str, torch.Tensor], labels: torch.Tensor, tokens: str) -> torch.Tensor:
    """Where a student is compared with its teacher.

    Args:
        inputs: a micro-batch, padded (`attention_mask`) or packed (`position_ids`).
        labels: [batch, tokens].
        tokens: `learned` or `all`, as `train.distillation.tokens`.

    Returns:
        [batch, tokens - 1], true at positions whose next token is compared; padding and the first token of a row, which
        nothing is before, never are.
    """
    if tokens == "learned":
        return labels[:, 1:] != IGNORED
    if "attention_mask" in inputs:
        return inputs["attention_mask"][:, 1:].bool()
    return inputs["position_ids"][:, 1:] != 0


def _pick(states: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """States [batch, tokens, hidden] at places, [positions, hidden]."""
    return states.flatten(0, 1).index_select(0, places)


@contextlib.contextmanager
def attention_outputs(model: PreTrainedModel, layers: Sequence[int]) -> Iterator[dict[int, torch.Tensor]]:
    """Collects the outputs of these layers' attention in the forward pass inside, each [batch, tokens, hidden]."""
    outputs: dict[int, torch.Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            outputs[layer] = output[0]

        return hook

    handles = [model.model.layers[layer].self_attn.register_forward_hook(keep(layer)) for layer in layers]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


class Distillation(Objective):
    """Cross-entropy, the divergence from a teacher's distribution, and the distance from its attention outputs.

    Neither this nor the teacher is a part of the trained model: they are not trained, saved, wrapped or moved.

    Args:
        spec: weights, temperature, top_k.
        teacher: a frozen model in evaluation mode, in its own dtype; None where all is read from `stored`.
        stored: the teacher's distributions, written before.
        layers: changed layers whose attention outputs are compared.
    """

    def __init__(
        self,
        spec: DistillationSpec,
        teacher: PreTrainedModel | None,
        stored: StoredTeacher | None = None,
        layers: Sequence[int] = (),
    ):
        self.spec = spec
        self.teacher = teacher
        self.stored = stored
        self.layers = tuple(layers) if spec.attention else ()
        self.energies: dict[int, float] = {}
        self.weights = {"cross_entropy": 1 - spec.weight}
        if spec.weight:
            self.weights["divergence"] = spec.weight
        if self.layers:
            self.weights["attention"] = spec.attention

    @torch.no_grad()
    def prepare(self, batches: Iterable[dict[str, torch.Tensor]]) -> None:
        """Sets E_layer from the stage's first step."""
        sums, count = dict.fromkeys(self.layers, 0.0), 0
        for batch in batches if self.layers else ():
            targets = self.targets(batch)
            count += int(targets.compared.sum())
            for layer, output in targets.attention.items():
                sums[layer] += output.double().square().sum().item()
        self.energies = {layer: total / max(count, 1) for layer, total in sums.items()}

    def loaded(self) -> PreTrainedModel:
        """The teacher, where nothing is stored."""
        assert self.teacher is not None
        return self.teacher

    def counts(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        learned = (inputs["labels"][:, 1:] != IGNORED).sum()
        compared = compared_positions(inputs, inputs["labels"], self.spec.tokens).sum()
        return {name: learned if name == "cross_entropy" else compared for name in self.weights}

    @torch.no_grad()
    def targets(self, inputs: dict[str, torch.Tensor]) -> Targets:
        """The teacher's outputs at the compared positions."""
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        compared = compared_positions(inputs, labels, self.spec.tokens)
        # Indices once: the device has to be waited for, which a mask in place of indices would do again in each layer.
        places = F.pad(compared, (0, 1)).flatten().nonzero().squeeze(1)
        if self.stored is not None:
            return Targets(labels, compared, places, top_k=self.stored.lookup(inputs, labels, self.spec.tokens))
        teacher = self.loaded()
        # The trainer's automatic mixed precision is the student's, not the teacher's.
        with torch.autocast(labels.device.type, enabled=False), attention_outputs(teacher, self.layers) as outputs:
            hidden = _pick(teacher.model(**inputs, use_cache=False).last_hidden_state, places)
        attention = {layer: _pick(output, places) for layer, output in outputs.items()}
        return Targets(labels, compared, places, hidden=hidden if self.spec.weight else None, attention=attention)

    @torch.no_grad()
    def top_k_of(self, inputs: dict[str, torch.Tensor]) -> TopK:
        """The teacher's coarsened distributions at the compared positions of a micro-batch with `labels`."""
        hidden, spec = self.targets(inputs).hidden, self.spec
        assert hidden is not None and spec.top_k is not None, "the recipe stores no attention, but top_k"
        size = max(1, LOGITS_AT_ONCE // self.loaded().config.vocab_size)
        pieces = [top_k(self.teacher_logits(part), spec.top_k, spec.temperature) for part in hidden.split(size)]
        return TopK(*(torch.cat([getattr(each, name) for each in pieces]) for name in ("ids", "logprobs", "rest")))

    def loss_sums(self, model: PreTrainedModel, inputs: dict[str, Any], targets: Targets) -> dict[str, torch.Tensor]:
        places = targets.places
        with attention_outputs(model, self.layers) as outputs:
            backbone = model.model(**inputs)
        # The label of a position is the next token's; the last of a row is never compared.
        labels = targets.labels.roll(-1, dims=1).flatten()[places]
        parts = self._token_parts(model, _pick(backbone.last_hidden_state, places), labels, targets)
        if self.layers:
            errors = [
                (_pick(outputs[layer], places).float() - targets.attention[layer].float()).square().sum()
                / self.energies[layer]
                for layer in self.layers
            ]
            parts["attention"] = torch.stack(errors).mean()
        if getattr(backbone, "router_logits", None) is not None:
            parts["router"] = router_loss(model, backbone.router_logits, inputs.get("attention_mask"))
        return parts

    def _token_parts(
        self, model: PreTrainedModel, hidden: torch.Tensor, labels: torch.Tensor, targets: Targets
    ) -> dict[str, torch.Tensor]:
        """Cross-entropy and divergence, in pieces of positions whose logits are computed again for the gradient."""
        size = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
        pieces = [slice(start, start + size) for start in range(0, max(len(labels), 1), size)]
        cross_entropy = divergence = hidden.new_zeros((), dtype=torch.float32)
        for piece in pieces:
            arguments = (model, hidden[piece], labels[piece], targets, piece)
            if len(pieces) > 1 and torch.is_grad_enabled():
                sums = checkpoint(self._piece, *arguments, use_reentrant=False)
            else:
                sums = self._piece(*arguments)
            cross_entropy, divergence = cross_entropy + sums[0], divergence + sums[1]
        parts = {"cross_entropy": cross_entropy}
        return parts | {"divergence": divergence} if self.spec.weight else parts

    def _piece(
        self, model: PreTrainedModel, hidden: torch.Tensor, labels: torch.Tensor, targets: Targets, piece: slice
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits = head_logits(model, hidden).float()
        cross_entropy = F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED)
        if not self.spec.weight:
            return cross_entropy, torch.zeros_like(cross_entropy)
        temperature = self.spec.temperature
        if targets.top_k is not None:
            return cross_entropy, sparse_divergence(logits, targets.top_k[piece], temperature).sum()
        assert targets.hidden is not None
        theirs = self.teacher_logits(targets.hidden[piece])
        if self.spec.top_k is not None:
            return cross_entropy, sparse_divergence(
                logits, top_k(theirs, self.spec.top_k, temperature), temperature
            ).sum()
        return cross_entropy, dense_divergence(logits, theirs, temperature).sum()

    @torch.no_grad()
    def teacher_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [positions, vocabulary] of the teacher's last hidden states."""
        with torch.autocast(hidden.device.type, enabled=False):
            return head_logits(self.loaded(), hidden)


def router_loss(model: Any, router_logits: Any, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """The load-balancing loss of a mixture of experts, as TRL and transformers add it."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    loss = load_balancing_loss_func(router_logits, model.num_experts, model.num_experts_per_tok, attention_mask)
    return torch.as_tensor(loss)
