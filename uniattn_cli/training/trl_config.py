"""TRL's configuration for one stage, checked before anything slow begins."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from trl import SFTConfig, SFTTrainer

from uniattn_cli.errors import RecipeError, suggest
from uniattn_cli.recipe.schema import Recipe, TrainSpec, TrainStage

LONGEST_EAGER = 512
WARMUP_FLOOR = 10
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it natively, else float32; trained weights are float32 in both cases."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        # Without these instructions bfloat16 is emulated and slower than float32.
        names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        native = any(getattr(torch.cpu, name, bool)() for name in names)
    else:
        native = False
    return torch.bfloat16 if native else torch.float32


def training_attention(recipe: Recipe, device: torch.device) -> str:
    """The attention backend to train with, where the recipe leaves it open.

    On CPU the plain one is four times as fast as SDPA in bfloat16, backward above all, and makes the whole step 1.4
    times as fast; but its memory grows with the square of the length, so it is taken for short sequences only.
    """
    spec = recipe.train
    longest = spec.max_length * (spec.micro_batch_size if spec.packing else 1)
    if recipe.model.attention == "auto" and device.type == "cpu" and longest <= LONGEST_EAGER:
        return "eager"
    return recipe.model.attention


def warmup_steps(spec: TrainSpec, stage: TrainStage, steps: int) -> int:
    """Steps over which the learning rate rises: the share that the recipe says, but not too few.

    Adam's first steps are all of full size, whatever the gradient; in a short stage a small share of the steps is no
    warm-up at all, and those steps are enough to spoil a model. So it is ten steps at least, or half of the stage.
    """
    share = spec.warmup if stage.warmup is None else stage.warmup
    return max(int(share * steps), min(WARMUP_FLOOR, steps // 2)) if share else 0


def make_config(
    spec: TrainSpec,
    stage: TrainStage,
    *,
    folder: Path,
    steps: int,
    accumulation: int,
    device: torch.device,
    seed: int,
    name: str = "uniattn",
) -> SFTConfig:
    """The settings of one stage for TRL.

    Args:
        folder: where checkpoints go.
        accumulation: forward passes per optimiser step on each device.
        device: where this process trains; TRL's own choice would be the first CUDA device, and all of them at once.
        name: of the run, for what `train.report_to` names.

    Raises:
        RecipeError: an optimizer that is not known or not installed, or a setting that the device cannot have.
    """
    # A local stage keeps little: its gradients end in each layer, and MLPs have none.
    recompute = spec.gradient_checkpointing and stage.loss != "local"
    plain = "adamw_torch_fused" if device.type in ("cpu", "cuda") and not spec.fsdp else "adamw_torch"
    if spec.activation_offloading and device.type != "cuda":
        raise RecipeError(f"train.activation_offloading needs a CUDA device, not {device.type}")
    config = SFTConfig(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=spec.micro_batch_size,
        gradient_accumulation_steps=accumulation,
        learning_rate=stage.learning_rate,
        lr_scheduler_type=SCHEDULES[stage.schedule or spec.schedule],
        warmup_steps=warmup_steps(spec, stage, steps),
        weight_decay=spec.weight_decay,
        max_grad_norm=spec.max_grad_norm,
        optim=plain if spec.optimizer == "auto" else known_optimizer(spec.optimizer),
        bf16=compute_dtype(device) is torch.bfloat16,
        gradient_checkpointing=recompute,
        # The reentrant kind gives wrong gradients where layers share queries and keys.
        gradient_checkpointing_kwargs={"use_reentrant": False} if recompute else None,
        activation_offloading=spec.activation_offloading,
        max_length=spec.max_length,
        packing=spec.packing,
        packing_strategy="bfd",
        dataset_kwargs={"skip_prepare_dataset": True},
        dataloader_pin_memory=device.type == "cuda",
        seed=seed,
        logging_steps=spec.log_steps,
        # Otherwise a loss that is not a number would be replaced by the mean of those before it.
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=spec.save_steps,
        report_to=list(spec.report_to) or "none",
        run_name=name,
        disable_tqdm=True,
        log_level="error",
        use_cpu=device.type == "cpu",
        ddp_find_unused_parameters=False,
        fsdp=spec.fsdp or None,  # type: ignore[arg-type]  # True is what its help asks for
        fsdp_config={"version": 2, "state_dict_type": "FULL_STATE_DICT"} if spec.fsdp else None,
    )
    if spec.fsdp and config.bf16:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        # accelerate's own policy also rounds losses and sums of gradients to bfloat16, which DDP does not.
        config.fsdp_plugin_args["mixed_precision_policy"] = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32
        )
    config.distributed_state.device = device
    if device.type == "cuda":
        config.__dict__["_setup_devices"] = device
        config._n_gpu = 1
        torch.cuda.set_device(device)
    _check_optimizer(config)
    return config


def known_optimizer(name: str) -> str:
    """The name, if transformers knows it.

    Raises:
        RecipeError: it does not.
    """
    from transformers.training_args import OptimizerNames

    known = [each.value for each in OptimizerNames]
    if name not in known:
        near = suggest(name, known) or " (for example adamw_torch, adamw_8bit, lion_8bit)"
        raise RecipeError(f"train.optimizer: unknown '{name}'{near}")
    return name


def _check_optimizer(config: SFTConfig) -> None:
    """Finds out about a missing package before anything slow begins."""
    try:
        SFTTrainer.get_optimizer_cls_and_kwargs(config)
    except (ImportError, ValueError) as error:
        name = getattr(config.optim, "value", config.optim)
        raise RecipeError(f"train.optimizer: {name} cannot be used here: {error}") from None


def check_reporters(names: Sequence[str]) -> None:
    """Finds out about packages of `train.report_to` that are missing.

    Raises:
        RecipeError: one line for each.
    """
    packages = {"tensorboard": ("tensorboard", "tensorboardX")}
    missing = [name for name in names if not any(map(importlib.util.find_spec, packages.get(name, (name,))))]
    if missing:
        raise RecipeError(
            [f"train.report_to: {name} is not installed; run `pip install {name}`, or remove it" for name in missing]
        )
