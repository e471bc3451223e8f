"""Which stages are run, which parameters each trains, and how the others are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from uniattn_cli.errors import StageError
from uniattn_cli.recipe.schema import TrainSpec, TrainStage
from uniattn_cli.training.lora import adapted_names, directly_trained, inject

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def planned_stages(stages: Sequence[TrainStage], config: Any) -> tuple[tuple[TrainStage, ...], list[str]]:
    """The stages that a converted model has something for.

    Args:
        config: of the converted model; no weights are needed.

    Returns:
        These stages, and a note for each of the others.

    Raises:
        StageError: none is left, or one names a linear layer that the model has not.
    """
    import torch

    from uniattn_cli.models.building import converted_classes

    with torch.device("meta"):
        model = converted_classes(config.model_type).causal_lm(config)
    planned = tuple(stage for stage in stages if trained_names(model, stage))
    if not planned:
        raise StageError("no stage of the recipe has any weights to train in this layout; add one that trains `all`")
    notes = [
        f"stage '{stage.label}' was skipped: the layout has no {stage.trains} to train"
        for stage in stages
        if stage not in planned
    ]
    return planned, notes


def control_stages(stages: Sequence[TrainStage], spec: TrainSpec) -> tuple[TrainStage, ...]:
    """The same stages for the unconverted base, which sees the same rows in the same order and in as many steps.

    The base has no compensation and no followers. Left out, such a stage would deprive it of tokens; with its own
    learning rate, which suits a small new matrix, it would spoil the base. So in its place the base trains what the
    next stage that can train a base trains (else the one before, else `all`), at that stage's learning rate. Losses
    from a teacher become cross-entropy: the control is what post-training usually is. Stages that learn from the base
    alone, on data of their own, are left out: they win back what conversion lost, and the base has lost nothing.

    Args:
        stages: of the converted model.
        spec: has the settings of distillation.

    Raises:
        StageError: no stage is left.
    """
    stages = [stage for stage in stages if stage.data is None or not spec.learns_from_base_alone(stage)]
    if not stages:
        raise StageError("every stage learns from the base alone, on data of its own, so the base is its own control")
    able = [index for index, stage in enumerate(stages) if not stage.only_changed]
    replaced = []
    for index, stage in enumerate(stages):
        nearest = [other for other in able if other >= index] or able[::-1]
        model = stages[nearest[0]] if nearest else TrainStage()
        # The base has no W_c that an adapter could be for.
        targets = tuple(target for target in model.lora.targets if target != "compensation")
        replaced.append(
            replace(
                stage,
                name=stage.label,
                trains=model.trains,
                learning_rate=model.learning_rate,
                changed_learning_rate=None,
                lora=replace(model.lora, targets=targets),
                loss="cross_entropy",
            )
        )
    return tuple(replaced)


def trained_names(model: PreTrainedModel, stage: TrainStage) -> list[str]:
    """Names of the parameters that a stage changes, in the order of the model.

    Args:
        model: a causal LM, converted or not.
        stage: what it `trains`: `compensation` (W_c of changed layers), `followers` (all attention parameters of
            changed layers), `attention` (those of all layers), `all` (all but embeddings and lm_head), `everything`,
            or `lora` (the weights that adapters are merged into, and the W_c that train beside them).

    Returns:
        An empty list where the layout has nothing of that sort.
    """
    named = list(model.named_parameters())
    if stage.trains == "everything":
        return [name for name, _ in named]
    if stage.trains == "lora":
        adapted = {f"{name}.weight" for name in adapted_names(model, stage.lora)}
        chosen = adapted | set(directly_trained(model, stage.lora))
        return [name for name, _ in named if name in chosen]
    if stage.trains == "all":
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        frozen = {id(parameter) for module in ends if module is not None for parameter in module.parameters()}
    else:
        trained = {id(parameter) for parameter in _attention_parameters(model, stage.trains)}
        frozen = {id(parameter) for _, parameter in named if id(parameter) not in trained}
    return [name for name, parameter in named if id(parameter) not in frozen]


def _attention_parameters(model: PreTrainedModel, trains: str) -> list[torch.nn.Parameter]:
    parameters: list[torch.nn.Parameter] = []
    for layer in model.model.layers:
        module = layer.self_attn
        if trains == "attention":
            parameters.extend(module.parameters())
        elif getattr(module, "plan", None) is not None and module.plan.kind != "own":
            part = module if trains == "followers" else module.compensation
            parameters.extend(part.parameters() if part is not None else ())
    return parameters


def prepare(model: PreTrainedModel, stage: TrainStage, low: torch.dtype | None, seed: int) -> None:
    """Makes a model ready for a stage: adapters in place, exactly what it trains trainable, all else frozen.

    Args:
        model: all its floating-point weights in float32; changed in place.
        stage: what it trains.
        low: see `freeze_all_but`.
        seed: of new adapters.
    """
    names = trained_names(model, stage)
    if stage.trains != "lora":
        freeze_all_but(model, names, low)
        return
    direct, adapted = directly_trained(model, stage.lora), adapted_names(model, stage.lora)
    freeze_all_but(model, direct, low)
    inject(model, adapted, stage.lora, seed)
    for name, parameter in model.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        else:
            parameter.requires_grad_(name in direct)


def freeze_all_but(model: PreTrainedModel, names: list[str], low: torch.dtype | None) -> None:
    """Makes exactly the named parameters trainable; these need no copy elsewhere, frozen ones no optimizer state.

    Args:
        model: all its floating-point weights in float32, so that small updates are not lost.
        names: result of `trained_names`.
        low: dtype in which the linear layers compute and from which their weights were read, if it is the same one:
            frozen linear layers are then kept in it, which changes no result and halves their memory. Embeddings and
            norms are not: they set the precision of the residual stream.
    """
    import torch

    trainable = set(names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)
    if low is None:
        return
    embeddings = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad and id(parameter) not in embeddings:
                    parameter.data = parameter.data.to(low)
