"""Learning from a frozen teacher: the loss of stages with `loss: distillation`.

    loss = (1 - weight) · mean over learned tokens of cross-entropy
           + mean over compared tokens of [ weight · temperature² · KL(teacher || student)
             + attention · mean over changed layers of |student's attention output - teacher's|² / E_layer
             + hidden · |student's hidden state - teacher's|² / |teacher's|² ]

Means are over the tokens of an optimiser step, of all its processes and forward passes. Compared are the learned
tokens, or with `tokens: all` those of prompts too: a teacher has something to say about each. Each mean has a count of
its own, because a step of long prompts with short answers would otherwise count several times as much as another.
E_layer is the mean |teacher's attention output|² over the compared tokens of the stage's first step; as a constant it
keeps the loss a sum over tokens, which comes out the same however a step is divided. Both models see the same rows;
the attention output is that of the attention block, where a layer's compensation has been added. Hidden states are
those that enter the last layer, each in units of its own, for that of a first token may be a thousand times as long.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
        entering: its hidden states that enter the last layer, [positions, hidden]; None where they are not compared.
    """

    labels: torch.Tensor
    compared: torch.Tensor
    places: torch.Tensor
    hidden: torch.Tensor | None = None
    top_k: TopK | None = None
    attention: dict[int, torch.Tensor] = field(default_factory=dict)
    entering: torch.Tensor | None = None


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


def places_of(compared: torch.Tensor) -> torch.Tensor:
    """Compared positions [batch, tokens - 1] as indices into [batch * tokens].

    Once for all layers: the device has to be waited for, which a mask in place of indices would do again in each.
    """
    return F.pad(compared, (0, 1)).flatten().nonzero().squeeze(1)


def pick(states: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """States [batch, tokens, hidden] at places, [positions, hidden]."""
    return states.flatten(0, 1).index_select(0, places)


# Key of the hidden states that enter the last layer, beside the numbers of layers.
ENTERING = "entering"


@contextlib.contextmanager
def kept_states(
    model: PreTrainedModel, layers: Sequence[int], entering: bool = False
) -> Iterator[dict[int | str, torch.Tensor]]:
    """Collects the outputs of these layers' attention in the forward pass inside, each [batch, tokens, hidden].

    Args:
        entering: also what enters the last layer.
    """
    states: dict[int | str, torch.Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            states[layer] = output[0]

        return hook

    def keep_entering(module: torch.nn.Module, inputs: Any) -> None:
        states[ENTERING] = inputs[0]

    handles = [model.model.layers[layer].self_attn.register_forward_hook(keep(layer)) for layer in layers]
    if entering:
        handles.append(model.model.layers[-1].register_forward_pre_hook(keep_entering))
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def energies(targets: Iterable[Targets]) -> dict[int, float]:
    """The mean squared norm of the teacher's attention outputs, by layer."""
    sums: dict[int, float] = {}
    count = 0
    for each in targets:
        count += len(each.places)
        for layer, output in each.attention.items():
            sums[layer] = sums.get(layer, 0.0) + output.double().square().sum().item()
    return {layer: total / max(count, 1) for layer, total in sums.items()}


def relative_errors(
    ours: Mapping[int, torch.Tensor], theirs: Mapping[int, torch.Tensor], energies: Mapping[int, float]
) -> torch.Tensor:
    """Squared errors of attention outputs [positions, hidden], each over the layer's energy: summed over positions, in
    the mean over layers; a scalar."""
    errors = [(output.float() - theirs[layer]).square().sum() / energies[layer] for layer, output in ours.items()]
    return torch.stack(errors).mean()


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
        if spec.hidden:
            self.weights["hidden"] = spec.hidden

    def prepare(self, batches: Iterable[dict[str, torch.Tensor]]) -> None:
        """Sets E_layer from the stage's first step."""
        self.energies = energies(map(self.targets, batches)) if self.layers else {}

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
        places = places_of(compared)
        if self.stored is not None:
            return Targets(labels, compared, places, top_k=self.stored.lookup(inputs, labels, self.spec.tokens))
        teacher = self.loaded()
        # The trainer's automatic mixed precision is the student's, not the teacher's.
        with torch.autocast(labels.device.type, enabled=False), self._kept(teacher) as states:
            hidden = pick(teacher.model(**inputs, use_cache=False).last_hidden_state, places)
        return Targets(
            labels,
            compared,
            places,
            hidden=hidden if self.spec.weight else None,
            attention={layer: pick(states[layer], places) for layer in self.layers},
            entering=pick(states[ENTERING], places) if self.spec.hidden else None,
        )

    def _kept(self, model: PreTrainedModel) -> contextlib.AbstractContextManager[dict[int | str, torch.Tensor]]:
        return kept_states(model, self.layers, bool(self.spec.hidden))

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
        with self._kept(model) as states:
            backbone = model.model(**inputs)
        # The label of a position is the next token's; the last of a row is never compared.
        labels = targets.labels.roll(-1, dims=1).flatten()[places]
        parts = self._token_parts(model, pick(backbone.last_hidden_state, places), labels, targets)
        if self.layers:
            ours = {layer: pick(states[layer], places) for layer in self.layers}
            parts["attention"] = relative_errors(ours, targets.attention, self.energies)
        if targets.entering is not None:
            theirs = targets.entering.float()
            errors = (pick(states[ENTERING], places).float() - theirs).square().sum(-1)
            parts["hidden"] = (errors / theirs.square().sum(-1)).sum()
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
