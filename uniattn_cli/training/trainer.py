"""TRL's trainer, set up for one stage, with what a converted model and an exact resume need on top."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Container, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch.utils.data import Sampler, SequentialSampler
from transformers import PreTrainedModel, PrinterCallback
from trl import SFTConfig, SFTTrainer

from uniattn_cli.errors import StageError
from uniattn_cli.recipe.schema import TrainStage
from uniattn_cli.training.casts import cast_together
from uniattn_cli.training.objective import Objective, attach_objective
from uniattn_cli.training.trained import trained_names

if TYPE_CHECKING:
    import datasets

    from uniattn_cli.training.on_policy import OnPolicy

WEIGHTS = "model.safetensors"


class StageTrainer(SFTTrainer):
    """Trains the parameters that require gradients, on rows in the order given.

    Differs from its base in this: rows are not shuffled; checkpoints hold the trained weights only; the loss is an
    `Objective`, and that of each step is kept, so that it can be checked before the step is taken and logged exactly
    after a resume; callbacks get the trainer as an argument.

    Args:
        objective: the loss.
        on_policy: writes responses of rows before they are seen; None leaves all rows as they are.
        changed_rate: peak learning rate of the attention of changed layers; None: that of `args`, as for all else.
    """

    model: PreTrainedModel
    train_dataset: datasets.Dataset

    def __init__(
        self,
        model: PreTrainedModel,
        args: SFTConfig,
        objective: Objective,
        changed_rate: float | None = None,
        on_policy: OnPolicy | None = None,
        **kwargs: Any,
    ):
        super().__init__(model, args, **kwargs)
        self.changed_rate = changed_rate
        self.on_policy = on_policy
        attach_objective(self.model)
        if args.bf16 and not self.is_fsdp_enabled:
            cast_together(self.model, args.device)
        self.remove_callback(PrinterCallback)
        call = partial(self.callback_handler.call_event, trainer=self)
        self.callback_handler.call_event = call  # type: ignore[method-assign]
        self.objective: Objective = objective
        self.trained = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        self.step_tokens = 0  # of all processes, in the step at hand, where responses are written
        self._divisors: dict[str, torch.Tensor] = {}  # of each part's sum in the step at hand
        self._step_loss: torch.Tensor | float = 0.0
        self._step_parts: dict[str, torch.Tensor] = {}

    @property
    def folder(self) -> Path:
        """Where its checkpoints go."""
        assert self.args.output_dir is not None
        return Path(self.args.output_dir)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The base class's, in which the attention of changed layers may have a learning rate of its own."""
        optimizer = self.optimizer
        if optimizer is None:
            optimizer = super().create_optimizer(model)
            if self.changed_rate is not None:
                names = set(trained_names(self.model, TrainStage(trains="followers")))
                named = (self.model if model is None else model).named_parameters()
                changed = {id(parameter) for name, parameter in named if name.removeprefix("module.") in names}
                split_groups(optimizer, changed, self.changed_rate)
        return optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    def first_step(self) -> Iterator[dict[str, torch.Tensor]]:
        """The micro-batches of the first optimiser step, of all processes, whatever step this session starts at."""
        size, world = self.args.per_device_train_batch_size, self.accelerator.num_processes
        rows = min(size * self.args.gradient_accumulation_steps * world, len(self.train_dataset))
        yield from self._micro_batches([self.train_dataset[row] for row in range(rows)])

    def rows_of(self, step: int) -> list[dict[str, list[int]]]:
        """The rows of an optimiser step that this process sees, in the order in which accelerate divides them."""
        size, world = self.args.per_device_train_batch_size, self.accelerator.num_processes
        first, passes = step * self.args.gradient_accumulation_steps * world, self.args.gradient_accumulation_steps
        mine = range(first + self.accelerator.process_index, first + passes * world, world)
        return [self.train_dataset[row] for batch in mine for row in range(batch * size, (batch + 1) * size)]

    def _micro_batches(self, rows: Sequence[dict[str, list[int]]]) -> Iterator[dict[str, torch.Tensor]]:
        """These rows as the collator makes micro-batches of them, on the device."""
        size = self.args.per_device_train_batch_size
        for start in range(0, len(rows), size):
            batch = self.data_collator(list(rows[start : start + size]))
            yield {name: value.to(self.args.device) for name, value in batch.items() if hasattr(value, "to")}

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The micro-batches of a step; the number of tokens of each part of the loss in all of them is kept."""
        batches, learned = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.on_policy is not None:
            rows = self.on_policy.rows(self.state.global_step, self.rows_of, self.model)
            batches = list(self._micro_batches(rows))
            tokens = torch.tensor(sum(len(row["input_ids"]) for row in rows), device=device)
            self.step_tokens = int(self.accelerator.reduce(tokens, reduction="sum").item())
        counts = [self.objective.counts(batch) for batch in batches]
        none = torch.zeros((), dtype=torch.long, device=device)
        totals = torch.stack([sum((each[name] for each in counts), none) for name in self.objective.weights])
        # Gradients are averaged over processes, while these are the tokens of all of them.
        totals = self.accelerator.reduce(totals, reduction="sum").clamp(min=1) / self.accelerator.num_processes
        self._divisors = dict(zip(self.objective.weights, totals, strict=True))
        return batches, learned

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """This micro-batch's share of the step's loss; what its sums are divided by, `get_batch_samples` has counted.

        Args:
            model: the trained model, perhaps inside DDP.
            inputs: a micro-batch.
            return_outputs: of the base class's evaluation, which is not used.
            num_items_in_batch: learned tokens of the step, as the base class counts them.
        """
        targets = self.objective.targets(inputs)
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        sums = model(**inputs, use_cache=False, objective=partial(self.objective.loss_sums, targets=targets))
        router = sums.pop("router", None)
        means = {name: total / self._divisors[name] for name, total in sums.items()}
        for name, mean in means.items():
            self._step_parts[name] = self._step_parts.get(name, 0.0) + mean.detach()
        loss = torch.as_tensor(sum(self.objective.weights[name] * mean for name, mean in means.items()))
        if router is None:
            return loss
        # A mean over each forward pass, where the others are sums; as TRL weighs it.
        return loss + self.router_aux_loss_coef * router / self.current_gradient_accumulation_steps

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self._step_loss = self._step_loss + loss.detach()
        return loss

    def take_step_losses(self) -> dict[str, float]:
        """The `loss` since the last call, and its unweighted parts where there are several.

        Over all processes: of a whole step, as the trainer takes its gradient. The device is waited for once.
        """
        parts = self._step_parts if len(self._step_parts) > 1 else {}
        losses = {"loss": self._step_loss, **parts}
        self._step_loss, self._step_parts = 0.0, {}
        stacked = torch.stack([torch.as_tensor(loss, device=self.args.device) for loss in losses.values()])
        means = self.accelerator.reduce(stacked, reduction="mean").tolist()
        return dict(zip(losses, means, strict=True))

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
        trained = [(name, each) for name, each in self.model.named_parameters() if each.requires_grad]
        finite = torch.stack([torch.isfinite(_local(parameter)).all() for _, parameter in trained]).tolist()
        for (name, _), whole in zip(trained, finite, strict=True):
            if not whole:
                raise diverged(f"{name} is not finite", self.state.global_step, self.folder)
        with write_errors(self.folder):
            # Skips TRL's own step, which writes a model card into the folder of every stage.
            super(SFTTrainer, self)._save_checkpoint(*args, **kwargs)
            if self.on_policy is not None:
                self.on_policy.save(self.folder / f"checkpoint-{self.state.global_step}")

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.args.should_save:
            save_weights(self._only_trained(state_dict), Path(output_dir or self.folder))


def split_groups(optimizer: torch.optim.Optimizer, chosen: Container[int], rate: float) -> None:
    """Gives the parameters with these ids a learning rate of their own, in groups behind those of the others."""
    groups = []
    for group in optimizer.param_groups:
        parts = [[each for each in group["params"] if (id(each) in chosen) is inside] for inside in (False, True)]
        group["params"] = parts[0]
        groups.append({**group, "params": parts[1], "lr": rate})
    optimizer.param_groups = [group for group in [*optimizer.param_groups, *groups] if group["params"]]


def _local(parameter: torch.Tensor) -> torch.Tensor:
    """This process's part of a sharded parameter."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def save_weights(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Writes trained weights into a folder, as a whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / f".{WEIGHTS}", metadata={"format": "pt"})
    (folder / f".{WEIGHTS}").replace(folder / WEIGHTS)


@contextlib.contextmanager
def write_errors(folder: Path) -> Iterator[None]:
    """Makes an ordinary `OSError` of torch.save's own, which does not say why something was not written whole."""
    try:
        yield
    except RuntimeError as error:
        if not any(words in str(error) for words in ("PytorchStreamWriter", "inline_container")):
            raise
        number = errno.EFBIG if _at_limit(folder) else errno.ENOSPC
        raise OSError(number, os.strerror(number), str(folder)) from error


def _at_limit(folder: Path) -> bool:
    """Whether a file there has reached the size that files of this process may have."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return False
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    files = (path for path in folder.rglob("*") if path.is_file())
    return limit != resource.RLIM_INFINITY and any(path.stat().st_size >= limit for path in files)


def diverged(what: str, step: int, folder: Path) -> StageError:
    """The error for training that diverged."""
    return StageError(
        f"training diverged: {what} at step {step}; lower the stage's learning_rate in train.stages and start over "
        f"with --force (until then the last good checkpoint stays in {folder})"
    )


def load_trained(model: PreTrainedModel, folder: Path) -> None:
    """Copies the trained weights of a finished stage into a model, in the model's dtype.

    Args:
        folder: where `StageTrainer.save_model` wrote them.

    Raises:
        StageError: they do not belong to this model.
    """
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in load_file(folder / WEIGHTS).items():
            if name not in parameters or parameters[name].shape != tensor.shape:
                raise StageError(f"{folder / WEIGHTS}: {name} does not fit the model; run again with --force")
            parameters[name].copy_(tensor)


def pack(rows: datasets.Dataset, max_length: int) -> datasets.Dataset:
    """Puts whole rows together into sequences of at most `max_length`, with the column `seq_lengths`.

    What comes of rows that are kept on disk is kept beside them; of several processes one makes it.
    """
    from trl import pack_dataset

    files = [Path(file["filename"]) for file in rows.cache_files]
    with FileLock(files[0].with_name("pack.lock")) if files else contextlib.nullcontext():
        return pack_dataset(rows, max_length, "bfd")


def tokens_per_step(lengths: Sequence[int], order: Sequence[Sequence[int]]) -> list[int]:
    """Tokens of each optimiser step, padding not counted."""
    return [sum(lengths[row] for row in batch) for batch in order]
