"""LoRA (arXiv 2106.09685) on a converted model: which layers get adapters, and merging them back.

Adapters are put in place with peft and merged into the weights at the end of the stage, so that what a stage writes is
an ordinary set of weights and the checkpoint needs no peft.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING

from uniattn_cli.errors import StageError, suggest
from uniattn_cli.recipe.schema import LoraSpec

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

MISSING = "stages that train `lora` need peft, which is not installed; run: pip install 'uniattn[lora]'"


def check_installed() -> None:
    """Raises `StageError` where peft is missing."""
    if importlib.util.find_spec("peft") is None:
        raise StageError(MISSING)


def adapted_names(model: PreTrainedModel, spec: LoraSpec) -> list[str]:
    """Names of the linear layers that get an adapter.

    Without `targets` these are all linear layers inside the decoder blocks, so attention and MLP, with the W_c of
    changed layers unless the recipe wants it trained itself. The factors of a low-rank W_c are never adapted: they are
    as small as an adapter. Experts that a family fuses into one tensor are no linear layers and stay as they are.

    Raises:
        StageError: a target that no layer has.
    """
    from uniattn_cli.modeling.sharing_uniattn import LowRankCompensation

    factors = {
        id(part) for module in model.modules() if isinstance(module, LowRankCompensation) for part in module.modules()
    }
    names = []
    for name, module in _linear_layers(model):
        last = name.rpartition(".")[2]
        if id(module) in factors or (last == "compensation" and spec.compensation == "full"):
            continue
        if not spec.targets or last in spec.targets:
            names.append(name)
    known = sorted({name.rpartition(".")[2] for name, module in _linear_layers(model) if id(module) not in factors})
    for target in spec.targets:
        if target not in known:
            raise StageError(
                f"lora.targets: no layer has a linear layer '{target}'{suggest(target, known)} "
                f"(there are: {', '.join(known)})"
            )
    return names


def _linear_layers(model: PreTrainedModel) -> list[tuple[str, torch.nn.Module]]:
    """Linear layers inside the decoder blocks, by full name."""
    import torch

    blocks = "model.layers."
    return [(n, m) for n, m in model.named_modules() if n.startswith(blocks) and isinstance(m, torch.nn.Linear)]


def directly_trained(model: PreTrainedModel, spec: LoraSpec) -> list[str]:
    """Names of the parameters that train themselves beside the adapters: low-rank W_c, and full ones if asked for."""
    import torch

    from uniattn_cli.modeling.sharing_uniattn import LowRankCompensation

    kinds = (LowRankCompensation, torch.nn.Linear) if spec.compensation == "full" else (LowRankCompensation,)
    return [
        f"{name}.{part}"
        for name, module in model.named_modules()
        if isinstance(module, kinds) and name.endswith(".compensation")
        for part, _ in module.named_parameters()
    ]


def inject(model: PreTrainedModel, names: list[str], spec: LoraSpec, seed: int) -> None:
    """Puts adapters into the named linear layers; their `up` factors are zero, so that nothing changes yet.

    Args:
        model: changed in place.
        names: result of `adapted_names`.
        seed: of the `down` factors.
    """
    import torch
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha or 2 * spec.rank,  # type: ignore[arg-type]  # peft divides it, whole or not
        lora_dropout=spec.dropout,
        target_modules=names,
        bias="none",
    )
    torch.manual_seed(seed)
    inject_adapter_in_model(config, model)


def merged_weights(
    start: Mapping[str, torch.Tensor], trained: Mapping[str, torch.Tensor], spec: LoraSpec
) -> dict[str, torch.Tensor]:
    """Weights with their adapters added, W + alpha / rank · up down, in float32.

    Args:
        start: the weights before the stage, by name.
        trained: what the stage trained, by name: adapters, and parameters that trained themselves.

    Returns:
        All changed weights by their names in `start`.
    """
    scale = (spec.alpha or 2 * spec.rank) / spec.rank
    merged = {name: tensor for name, tensor in trained.items() if ".lora_" not in name}
    for name, down in trained.items():
        if ".lora_A." not in name:
            continue
        up = trained[name.replace(".lora_A.", ".lora_B.")]
        weight = f"{name.partition('.lora_A.')[0]}.weight"
        merged[weight] = start[weight].float() + scale * (up.float() @ down.float())
    return merged
