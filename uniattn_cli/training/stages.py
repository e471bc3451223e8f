"""Which parameters a stage trains, and how the others are kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def trained_names(model: PreTrainedModel, trains: str) -> list[str]:
    """Names of the parameters that a stage changes, in the order of the model.

    Args:
        model: a converted causal LM.
        trains: `compensation` (W_c of changed layers), `followers` (all attention parameters of changed layers),
            `attention` (those of all layers), `all` (all but embeddings and lm_head) or `everything`.

    Returns:
        An empty list where the layout has nothing of that sort.
    """
    named = list(model.named_parameters())
    if trains == "everything":
        return [name for name, _ in named]
    if trains == "all":
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        frozen = {id(parameter) for module in ends if module is not None for parameter in module.parameters()}
    else:
        chosen = {id(parameter) for parameter in _attention_parameters(model, trains)}
        frozen = {id(parameter) for _, parameter in named if id(parameter) not in chosen}
    return [name for name, parameter in named if id(parameter) not in frozen]


def _attention_parameters(model: PreTrainedModel, trains: str) -> list[torch.nn.Parameter]:
    from uniattn_cli.modeling.sharing_uniattn import SharedAttentionMixin

    found: list[torch.nn.Parameter] = []
    for module in model.modules():
        if not isinstance(module, SharedAttentionMixin):
            continue
        if trains == "attention":
            found.extend(module.parameters())
        elif module.plan.kind != "own":
            part = module if trains == "followers" else module.compensation
            found.extend(part.parameters() if part is not None else ())
    return found


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

    wanted = set(names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in wanted)
    if low is None:
        return
    embeddings = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad and id(parameter) not in embeddings:
                    parameter.data = parameter.data.to(low)
