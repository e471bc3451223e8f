"""TRL's trainer, set up for one stage, with what a converted model and an exact resume need on top."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils.data import Sampler, SequentialSampler
from transformers import PreTrainedModel
from trl import SFTConfig, SFTTrainer

from uniattn_cli.errors import RecipeError, StageError, suggest
from uniattn_cli.models.losses import IGNORED
from uniattn_cli.recipe.schema import Recipe, TrainSpec, TrainStage
from uniattn_cli.training.distill import Distiller
from uniattn_cli.training.validation import attach_objective

WEIGHTS = "model.safetensors"
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
        gradient_checkpointing=spec.gradient_checkpointing,
        # The reentrant kind gives wrong gradients where layers share queries and keys.
        gradient_checkpointing_kwargs={"use_reentrant": False} if spec.gradient_checkpointing else None,
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
        fsdp=spec.fsdp or None,
        fsdp_config={"version": 2, "state_dict_type": "FULL_STATE_DICT"} if spec.fsdp else None,
    )
    if spec.fsdp and config.bf16:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        # accelerate's own policy also rounds losses and sums of gradients to bfloat16, which DDP does not.
        config.fsdp_plugin_args["mixed_precision_policy"] = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32
        )
    if device.type == "cuda":
        config.distributed_state.device = device
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
        raise RecipeError(f"train.optimizer: {config.optim.value} cannot be used here: {error}") from None


def check_reporters(names: Sequence[str]) -> None:
    """Finds out about packages of `train.report_to` that are missing.

    Raises:
        RecipeError: one line for each.
    """
    wanted = {"tensorboard": ("tensorboard", "tensorboardX")}
    missing = [name for name in names if not any(map(importlib.util.find_spec, wanted.get(name, (name,))))]
    if missing:
        raise RecipeError(
            [f"train.report_to: {name} is not installed; run: pip install {name}, or leave it out" for name in missing]
        )


class StageTrainer(SFTTrainer):
    """Trains the parameters that require gradients, on rows in the order given.

    Differs from its base in this: rows are not shuffled; checkpoints hold the trained weights only; where TRL has no
    kernels of its own, logits are computed only at positions where something is learned (TRL computes all of them,
    twice); the loss may have parts that come from a teacher; the loss of each step is kept, so that it can be checked
    before the step is taken and logged exactly after a resume.

    Args:
        distiller: compares with a teacher, or None. Neither it nor the teacher is a part of the model: they are not
            trained, saved, wrapped or moved.
    """

    def __init__(self, model: PreTrainedModel, args: SFTConfig, distiller: Distiller | None = None, **kwargs: Any):
        super().__init__(model, args, **kwargs)
        attach_objective(self.model)
        self.distiller = distiller
        self.trained = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        self._compared: torch.Tensor | None = None  # tokens of the step at hand, over all processes
        self._step_loss: torch.Tensor | float = 0.0
        self._step_parts: dict[str, torch.Tensor] = {}

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """The sum of the tokens' losses over the step's number of learned tokens; TRL's own where it has kernels."""
        if self.distiller is not None:
            return self._distilled_loss(model, inputs, num_items_in_batch)
        if self.args.device.type == "cuda" or return_outputs or self.aux_loss_enabled:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = dict(inputs)
        targets = inputs.pop("labels")[:, 1:]
        columns = (targets != IGNORED).any(0).nonzero().squeeze(1)
        logits = model(**inputs, use_cache=False, logits_to_keep=columns).logits
        targets = targets[:, columns]
        learned = targets != IGNORED
        total = F.cross_entropy(logits[learned].float(), targets[learned], reduction="sum")
        return total / self._divisor(learned, num_items_in_batch)

    def _distilled_loss(self, model: torch.nn.Module, inputs: dict, num_items_in_batch: Any) -> torch.Tensor:
        targets = self.distiller.targets(inputs)
        inputs = {key: value for key, value in inputs.items() if key != "labels"}
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        parts = model(**inputs, use_cache=False, objective=partial(self.distiller.loss_sums, targets=targets))
        router = parts.pop("router", None)
        learned = self._divisor(targets.labels[:, 1:] != IGNORED, num_items_in_batch)
        compared = self._divisor(targets.compared, None if num_items_in_batch is None else self._compared)
        for name in parts:
            parts[name] = parts[name] / (learned if name == "cross_entropy" else compared)
            self._step_parts[name] = self._step_parts.get(name, 0.0) + parts[name].detach()
        loss = self.distiller.weigh(parts)
        if router is None:
            return loss
        # A mean over each forward pass, where the others are sums; as TRL weighs it.
        passes = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
        return loss + self.router_aux_loss_coef * router / passes

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The micro-batches of a step and the number of its learned tokens; that of compared ones is kept."""
        samples, learned = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.distiller is not None:
            count = torch.tensor(self.distiller.count(samples), device=device)
            self._compared = self.accelerator.reduce(count, reduction="sum")
        return samples, learned

    def _divisor(self, counted: torch.Tensor, of_step: Any) -> Any:
        """What a sum over the tokens of one forward pass is divided by, to add up to a mean over those of the step."""
        if of_step is None:
            return counted.sum().clamp(min=1)
        # Gradients are averaged over processes, while the number of tokens is that of all of them.
        return of_step / self.accelerator.num_processes

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self._step_loss = self._step_loss + loss.detach()
        return loss

    def take_step_loss(self) -> float:
        """The loss since the last call, over all processes: of a whole step, as the trainer takes its gradient."""
        loss, self._step_loss = self._step_loss, 0.0
        return self.accelerator.reduce(torch.as_tensor(loss), reduction="mean").item()

    def take_step_parts(self) -> dict[str, float]:
        """The parts of a distilled loss since the last call, likewise; empty without a teacher."""
        parts, self._step_parts = self._step_parts, {}
        return {name: self.accelerator.reduce(value, reduction="mean").item() for name, value in parts.items()}

    def report(self, **figures: float) -> None:
        """Passes figures on to what `train.report_to` names."""
        if self.args.report_to:
            super(SFTTrainer, self).log({f"eval_{name}": value for name, value in figures.items()})

    def trained_state(self) -> dict[str, torch.Tensor]:
        """The trained weights on the CPU, by name; of a sharded model all processes ask and the first one gets them."""
        state = self.accelerator.get_state_dict(self.model) if self.is_fsdp_enabled else None
        return self._only_trained(state)

    def _only_trained(self, state: dict[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
        named = dict(self.model.named_parameters()) if state is None else state
        return {name: named[name].detach().cpu().contiguous() for name in sorted(self.trained) if name in named}

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and not torch.isfinite(_local(parameter)).all():
                raise diverged(f"{name} is not finite", self.state.global_step, self.args.output_dir)
        with full_disk(self.args.output_dir):
            # Skips TRL's own step, which writes a model card into the folder of every stage.
            super(SFTTrainer, self)._save_checkpoint(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.args.should_save:
            save_weights(self._only_trained(state_dict), Path(output_dir or self.args.output_dir))


def _local(parameter: torch.Tensor) -> torch.Tensor:
    """This process's part of a sharded parameter."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def save_weights(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Writes trained weights into a folder, as a whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    with full_disk(folder):
        save_file(tensors, folder / f".{WEIGHTS}", metadata={"format": "pt"})
    (folder / f".{WEIGHTS}").replace(folder / WEIGHTS)


@contextlib.contextmanager
def full_disk(folder: Path | str) -> Iterator[None]:
    """Makes one ordinary `OSError` of what safetensors and torch.save each raise on a full disk."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        if not any(words in str(error) for words in ("os error 28", "PytorchStreamWriter", "inline_container")):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error


def diverged(what: str, step: int, folder: str) -> StageError:
    """The error for training that has run off."""
    return StageError(
        f"training diverged: {what} at step {step}; lower the stage's learning_rate in train.stages and run again "
        f"with --force, which starts over (until then the last good checkpoint stays in {folder})"
    )


def load_trained(model: PreTrainedModel, folder: Path) -> None:
    """Copies the trained weights of a finished stage into a model, in the model's dtype.

    Args:
        folder: what `StageTrainer.save_model` was given.

    Raises:
        StageError: they do not belong to this model.
    """
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in load_file(folder / WEIGHTS).items():
            if name not in parameters or parameters[name].shape != tensor.shape:
                raise StageError(f"{folder / WEIGHTS}: {name} does not fit the model; run again with --force")
            parameters[name].copy_(tensor)


def pack(rows: Any, max_length: int) -> Any:
    """Puts whole rows together into sequences of at most `max_length`, with the column `seq_lengths`."""
    from trl import pack_dataset

    return pack_dataset(rows, max_length, "bfd")


def tokens_per_step(lengths: Sequence[int], order: Sequence[Sequence[int]]) -> list[int]:
    """Tokens of each optimiser step, padding not counted."""
    return [sum(lengths[row] for row in batch) for batch in order]
