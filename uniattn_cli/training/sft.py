"""TRL's trainer, set up for one stage, with what a converted model and an exact resume need on top."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils.data import Sampler, SequentialSampler
from transformers import PreTrainedModel
from trl import SFTConfig, SFTTrainer

from uniattn_cli.data import IGNORED
from uniattn_cli.errors import StageError
from uniattn_cli.recipe import Recipe, TrainSpec

WEIGHTS = "model.safetensors"
LONGEST_EAGER = 512
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


def make_config(
    spec: TrainSpec,
    *,
    folder: Path,
    learning_rate: float,
    steps: int,
    accumulation: int,
    device: torch.device,
    seed: int,
) -> SFTConfig:
    """The settings of one stage for TRL.

    Args:
        folder: where checkpoints go.
        accumulation: forward passes per optimiser step on each device.
        device: where this process trains; TRL's own choice would be the first CUDA device, and all of them at once.
    """
    config = SFTConfig(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=spec.micro_batch_size,
        gradient_accumulation_steps=accumulation,
        learning_rate=learning_rate,
        lr_scheduler_type=SCHEDULES[spec.schedule],
        warmup_steps=int(spec.warmup * steps),
        weight_decay=spec.weight_decay,
        max_grad_norm=spec.max_grad_norm,
        optim="adamw_torch_fused" if device.type in ("cpu", "cuda") else "adamw_torch",
        bf16=compute_dtype(device) is torch.bfloat16,
        gradient_checkpointing=spec.gradient_checkpointing,
        # The reentrant kind gives wrong gradients where layers share queries and keys.
        gradient_checkpointing_kwargs={"use_reentrant": False} if spec.gradient_checkpointing else None,
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
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        use_cpu=device.type == "cpu",
        ddp_find_unused_parameters=False,
    )
    if device.type == "cuda":
        config.distributed_state.device = device
        config.__dict__["_setup_devices"] = device
        config._n_gpu = 1
        torch.cuda.set_device(device)
    return config


class StageTrainer(SFTTrainer):
    """Trains the parameters that require gradients, on rows in the order given.

    Differs from its base in this: rows are not shuffled; checkpoints hold the trained weights only; where TRL has no
    kernels of its own, logits are computed only at positions where something is learned (TRL computes all of them,
    twice); the loss of each step is kept, so that it can be checked before the step is taken and logged exactly after
    a resume.
    """

    def __init__(self, model: PreTrainedModel, args: SFTConfig, **kwargs: Any):
        super().__init__(model, args, **kwargs)
        self.trained = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        self._step_loss: torch.Tensor | float = 0.0

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """The sum of cross-entropies over the step's number of learned tokens; TRL's own on CUDA."""
        if self.args.device.type == "cuda" or return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = dict(inputs)
        targets = inputs.pop("labels")[:, 1:]
        columns = (targets != IGNORED).any(0).nonzero().squeeze(1)
        logits = model(**inputs, use_cache=False, logits_to_keep=columns).logits
        targets = targets[:, columns]
        learned = targets != IGNORED
        total = F.cross_entropy(logits[learned].float(), targets[learned], reduction="sum")
        if num_items_in_batch is None:
            return total / learned.sum().clamp(min=1)
        # Gradients are averaged over processes, while the number of learned tokens is that of all of them.
        return total / num_items_in_batch * self.accelerator.num_processes

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self._step_loss = self._step_loss + loss.detach()
        return loss

    def take_step_loss(self) -> float:
        """Mean loss per learned token since the last call, over all processes."""
        loss, self._step_loss = self._step_loss, 0.0
        return self.accelerator.reduce(torch.as_tensor(loss), reduction="mean").item()

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and not torch.isfinite(parameter).all():
                raise diverged(f"{name} is not finite", self.state.global_step, self.args.output_dir)
        with full_disk(self.args.output_dir):
            # Skips TRL's own step, which writes a model card into the folder of every stage.
            super(SFTTrainer, self)._save_checkpoint(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        named = dict(self.model.named_parameters()) if state_dict is None else state_dict
        tensors = {name: named[name].detach().cpu().contiguous() for name in sorted(self.trained)}
        with full_disk(folder):
            save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


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
        f"(the last good checkpoint is in {folder}; a run with other settings starts over and removes it)"
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
