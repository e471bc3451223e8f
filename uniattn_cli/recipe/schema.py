"""The recipe: one strict, typed YAML file that holds every setting of a run.

The dataclasses below are the schema. Each field carries its default, its bounds and the sentence that documents it;
reading, checking, the commented file that `uniattn analyze` writes and the tables of the documentation all come from
them. Reading reports every fault of a file at once, with line and nearest valid name. torch is not imported here.
"""

from __future__ import annotations

import dataclasses
import json
import re
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from uniattn_cli.errors import suggest
from uniattn_cli.modeling.layout_uniattn import BORROWING_KINDS, CHANGED_KINDS
from uniattn_cli.recipe.files import plain, read_tree
from uniattn_cli.recipe.reading import read_section

RECIPE_FORMAT = 1
DTYPES = ("auto", "float32", "bfloat16", "float16")
# What a data set's columns may stand for.
COLUMNS = ("messages", "prompt", "completion", "instruction", "input", "output", "text")


def setting(
    default: Any,
    help: str,
    *,
    choices: tuple | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    common: bool = False,
    path: bool = False,
) -> Any:
    """A documented, bounded dataclass field.

    Args:
        default: value, or a zero-argument factory for lists and sections.
        help: one sentence, shown as a comment in the written recipe.
        choices: the only strings allowed (other types that the annotation allows stay allowed).
        minimum: smallest value allowed.
        maximum: largest value allowed.
        above: the value must be greater than this.
        common: whether the recipe that `analyze` writes shows the field.
        path: a path, or a name that may stand in its place; a relative one starts at the recipe's folder.
    """
    bounds = {"choices": choices, "minimum": minimum, "maximum": maximum, "above": above}
    metadata = {"help": help, "common": common, "path": path, **bounds}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class ModelSpec:
    """The base model."""

    name: str = setting("", "hub id, or a directory that holds the model", common=True, path=True)
    revision: str | None = setting(None, "branch, tag or commit on the hub")
    dtype: str = setting(
        "auto",
        "auto takes the checkpoint's own",
        choices=DTYPES,
        common=True,
    )
    attention: str = setting(
        "auto",
        "attention backend; auto lets transformers choose",
        choices=("auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"),
    )


@dataclass(frozen=True)
class DatasetSpec:
    """One data set; an entry of the list may also be its source alone."""

    main: ClassVar[str] = "source"

    source: str = setting(
        "builtin",
        "builtin, a local file (.json .jsonl .parquet .csv .txt) or a hub data set",
        common=True,
        path=True,
    )
    config: str | None = setting(None, "configuration of a hub data set")
    split: str | None = setting(None, "split; the default is train")
    format: str = setting(
        "auto",
        "auto looks at the columns",
        choices=("auto", "messages", "prompt_completion", "alpaca", "text"),
    )
    columns: dict | None = setting(
        None, "for other column names: which column is what, as in {prompt: question, completion: answer}"
    )
    limit: int | None = setting(None, "use at most this many rows, the first ones", minimum=1)
    weight: float | None = setting(
        None,
        "share of the training rows, relative to the other data sets: a small one is repeated, a large one sampled",
        above=0,
    )
    heldout: bool = setting(
        True, "hold a share of its rows out, see data.holdout; false for rows that a model wrote (uniattn synthesize)"
    )


@dataclass(frozen=True)
class DataSpec:
    """What is trained on, calibrated with and held out."""

    train: tuple[DatasetSpec, ...] = setting(
        lambda: (DatasetSpec(),),
        "training rows: instructions and responses, conversations or plain text",
        common=True,
    )
    chat_template: str | None = setting(
        None,
        "how chats are written: a Jinja file, plain, chatml, zephyr, tulu or instruction; null: the model's own way",
        path=True,
    )
    calibration: tuple[DatasetSpec, ...] | None = setting(
        None, "text for analysis and fit; null takes the training rows, or the built-in text for built-in rows"
    )
    repeat: float = setting(
        0.0,
        "share of the calibration windows that hold a passage twice, so that copying is measured",
        minimum=0,
        maximum=1,
    )
    text: tuple[DatasetSpec, ...] = setting(
        lambda: (DatasetSpec(),), "held-out text for perplexity; never used for calibration or training", common=True
    )
    holdout: float = setting(
        0.05,
        "share of the training rows kept out of training, for the loss on responses",
        above=0,
        maximum=0.5,
    )

    def contradictions(self) -> list[str]:
        """Settings of data sets that are valid alone but not together."""
        faults = []
        weighted = [spec.weight is not None for spec in self.train]
        if any(weighted) and not all(weighted):
            faults.append("data.train: give every data set a weight, or none of them")
        if self.train and not any(spec.heldout for spec in self.train):
            faults.append("data.train: heldout is false everywhere, so that no row could be held out; leave one out")
        for key in ("train", "calibration", "text"):
            for index, spec in enumerate(getattr(self, key) or ()):
                where = f"data.{key}[{index}]"
                if key != "train" and not spec.heldout:
                    faults.append(f"{where}.heldout: only rows of data.train are held out")
                if key != "train" and spec.weight is not None:
                    faults.append(f"{where}.weight: only the data sets of data.train are mixed by weight")
                for name, column in (spec.columns or {}).items():
                    if name not in COLUMNS:
                        near = suggest(str(name), COLUMNS) or f" (known: {', '.join(COLUMNS)})"
                        faults.append(f"{where}.columns: unknown name '{name}'{near}; write NAME: COLUMN OF YOUR DATA")
                    if not isinstance(column, str):
                        faults.append(f"{where}.columns.{name} must be the name of a column, not {column!r}")
        return faults


@dataclass(frozen=True)
class AnalysisSpec:
    """How much is measured."""

    tokens: int = setting(16384, "calibration tokens", minimum=64, common=True)
    length: int = setting(512, "tokens per sequence", minimum=16, common=True)
    max_distance: int = setting(8, "largest distance between a layer and one it may borrow from", minimum=1, maximum=16)
    rows: int = setting(4, "query positions per sequence for Jensen-Shannon and top-k overlap", minimum=1)
    top_k: int = setting(8, "keys per row compared for the top-k overlap", minimum=1)


def fast_search_takes(kinds: typing.Sequence[str]) -> bool:
    """Whether layouts with these kinds can be found from similar maps alone: one kind, of layers that borrow."""
    return len(kinds) <= 1 and set(kinds) <= set(BORROWING_KINDS)


@dataclass(frozen=True)
class LayoutSpec:
    """Which layers share, and how the choice is made."""

    groups: str = setting(
        "auto",
        "auto, paper, every:N, FIRST-LAST:N, a list such as 16-19,20-23, key@every:4 for another kind, or a file",
        common=True,
        path=True,
    )
    followers: int | None = setting(None, "budget: this many followers", minimum=0, common=True)
    kv: float | None = setting(
        None,
        "budget: keep at most this share of the KV bytes; 0.8 if no budget is given",
        above=0,
        maximum=1,
        common=True,
    )
    params: float | None = setting(None, "budget: keep at most this share of the parameters", above=0, maximum=1)
    search: str = setting(
        "fast",
        "fast maximises measured similarity; thorough converts every candidate and measures, best on a GPU",
        choices=("fast", "thorough"),
    )
    kinds: tuple[str, ...] = setting(
        lambda: ("softmax",),
        f"kinds that changed layers may have: {', '.join(CHANGED_KINDS)}; a fast search takes one of "
        f"{', '.join(BORROWING_KINDS)}, a thorough one any number",
    )
    score_tokens: int = setting(
        16384,
        "calibration tokens that judge the candidates of a thorough search; as many others judge the shortlist",
        minimum=64,
    )
    head_map: str = setting(
        "grouped",
        "which heads a follower may use; grouped keeps ordinary grouped-query shapes",
        choices=("identity", "grouped", "free"),
        common=True,
    )
    match: str = setting(
        "output",
        "heads are matched by what the refitted W_o can make of them (output), or by similar maps alone (maps; faster)",
        choices=("output", "maps"),
    )
    shortlist: int | str = setting(
        "auto",
        "layouts, at most, that are converted and compared on text of their own before one is taken; auto compares the "
        "mix, each kind alone and the fast choice in a thorough search, and nothing in a fast one; 1 compares nothing",
        choices=("auto",),
        minimum=1,
    )
    sources: str = setting(
        "several", "whether a follower's heads may borrow from several layers", choices=("one", "several")
    )
    max_group: int | None = setting(None, "largest number of followers of one leader", minimum=1)
    protect: tuple[int, ...] = setting(tuple, "layers that must stay as they are")
    layers: tuple[dict, ...] | None = setting(
        None, "the chosen layout, one entry per layer; written by `uniattn group` and by `uniattn convert`"
    )

    @property
    def compared(self) -> int | None:
        """Layouts that may be converted and compared; None for any number."""
        if self.shortlist == "auto":
            return 1 if self.search == "fast" else None
        return int(self.shortlist)


@dataclass(frozen=True)
class ConversionSpec:
    """How the converted weights are fitted."""

    tokens: int = setting(32768, "calibration tokens for the fit", minimum=64, common=True)
    length: int = setting(512, "tokens per sequence", minimum=16)
    solve: str = setting(
        "both",
        "what is solved: both (W_o and W_c), compensation, output, none, or reference (W_c as the paper starts it)",
        choices=("both", "compensation", "output", "none", "reference"),
        common=True,
    )
    rank: int | str = setting("full", "rank of W_c", choices=("full",), minimum=1)
    align: int = setting(
        100,
        "steps in which queries of key and kv layers learn the base's maps with borrowed keys; 0 leaves them alone",
        minimum=0,
    )
    target: str = setting(
        "attention",
        "what the fit aims at: the base's attention output, or its residual stream",
        choices=("attention", "residual"),
    )
    holdout: float = setting(0.15, "share of the sequences on which the ridge strength is chosen", above=0, maximum=0.5)
    offload: str = setting(
        "auto",
        "keep the model in the computer's memory and one layer on the GPU; auto does so where it would not fit",
        choices=("auto", "always", "never"),
    )

    @property
    def aim(self) -> str:
        """What the fit really aims at: the paper's initialisation always takes the residual stream."""
        return "residual" if self.solve == "reference" else self.target


ENGINES = ("auto", "engine", "transformers")
SCHEDULES = ("cosine", "linear", "constant")
REPORTERS = ("tensorboard", "wandb", "trackio")
TRAINABLE = ("compensation", "followers", "attention", "all", "everything", "lora")


@dataclass(frozen=True)
class LoraSpec:
    """Adapters of a stage that trains `lora`."""

    rank: int = setting(16, "rank of the adapters", minimum=1)
    alpha: float | None = setting(
        None, "the adapters' output is scaled by alpha / rank; null is twice the rank", above=0
    )
    dropout: float = setting(0.0, "share of an adapter's inputs that are dropped in training", minimum=0, maximum=0.9)
    targets: tuple[str, ...] = setting(
        tuple, "names of linear layers, such as q_proj; none are all of attention and MLP that a layer has"
    )
    compensation: str = setting(
        "adapted",
        "how a full W_c trains: by an adapter like other layers, or itself (low-rank ones always themselves)",
        choices=("adapted", "full"),
    )


@dataclass(frozen=True)
class TrainStage:
    """One stage of training."""

    trains: str = setting(
        "all",
        "which parameters change; embeddings and lm_head stay frozen except with everything",
        choices=TRAINABLE,
        common=True,
    )
    learning_rate: float = setting(1e-4, "peak learning rate", above=0, maximum=1, common=True)
    epochs: float = setting(1.0, "passes over the training rows", above=0, common=True)
    steps: int | None = setting(None, "optimiser steps; overrides epochs", minimum=1)
    name: str | None = setting(None, "name of the stage's folder; the default is what it trains")
    loss: str = setting(
        "cross_entropy",
        "what is minimised; distillation adds what train.distillation says",
        choices=("cross_entropy", "distillation"),
    )
    schedule: str | None = setting(
        None, "learning-rate schedule of this stage; null is train.schedule", choices=SCHEDULES
    )
    warmup: float | None = setting(
        None, "share of this stage's steps that warm up; null is train.warmup", minimum=0, maximum=0.9
    )
    lora: LoraSpec = setting(LoraSpec, "adapters, for a stage that trains lora")

    @property
    def label(self) -> str:
        """Its name, or what it trains."""
        return self.name or self.trains


@dataclass(frozen=True)
class DistillationSpec:
    """What stages with `loss: distillation` learn from a frozen teacher beside the data."""

    teacher: str = setting(
        "base",
        "the unconverted base, or control/, the base after the same training",
        choices=("base", "control"),
    )
    weight: float = setting(
        0.5, "share of the divergence from the teacher's distribution; the rest is cross-entropy", minimum=0, maximum=1
    )
    temperature: float = setting(
        1.0, "both distributions are softened by this; the divergence grows by its square", above=0
    )
    top_k: int | None = setting(
        None,
        "only the teacher's likeliest tokens and the mass of all others are compared; null compares all",
        minimum=1,
    )
    tokens: str = setting(
        "learned",
        "where teacher and student are compared: at the tokens that are learned, or at those of prompts too",
        choices=("learned", "all"),
    )
    attention: float = setting(
        0.0,
        "weight of the squared difference of changed layers' attention outputs, relative to the teacher's",
        minimum=0,
    )
    precompute: bool = setting(False, "write the teacher's top_k to teacher/ once and read it from there")


@dataclass(frozen=True)
class TrainSpec:
    """Supervised fine-tuning with TRL."""

    # One stage: a first one that trains the compensation alone costs more than it brings (docs/benchmarks/training.md).
    stages: tuple[TrainStage, ...] = setting(lambda: (TrainStage(),), "stages, in order", common=True)
    batch_size: int = setting(16, "sequences per optimiser step, over all devices", minimum=1, common=True)
    micro_batch_size: int = setting(4, "sequences per device and forward pass", minimum=1, common=True)
    max_length: int = setting(
        512, "longer conversations are cut at this many tokens, longer texts divided", minimum=16, common=True
    )
    loss: str = setting("responses", "which tokens are learned", choices=("responses", "all"))
    schedule: str = setting("cosine", "learning-rate schedule", choices=SCHEDULES)
    warmup: float = setting(
        0.05,
        "share of the steps that warm up, but ten steps or half the stage at least; 0 does not",
        minimum=0,
        maximum=0.9,
    )
    weight_decay: float = setting(0.0, "decoupled weight decay", minimum=0)
    max_grad_norm: float = setting(1.0, "gradients are clipped at this norm", above=0)
    optimizer: str = setting("auto", "auto is AdamW; else any name that transformers knows, such as adamw_8bit")
    packing: bool = setting(False, "several rows in one sequence; rows never see each other")
    group_by_length: bool = setting(
        False, "rows of like length share an optimiser step: less padding, an order that is a little less random"
    )
    gradient_checkpointing: bool = setting(False, "recompute activations to save memory")
    activation_offloading: bool = setting(False, "keep activations in the computer's memory (CUDA only)")
    fsdp: bool = setting(False, "shard weights and optimiser over the processes of a launcher (FSDP2) instead of DDP")
    keep: str = setting(
        "best",
        "weights that a stage ends with: those of lowest loss on validation rows, its start included, or the last",
        choices=("best", "last"),
    )
    eval_steps: int | None = setting(
        None,
        "optimiser steps between measurements of the loss on validation rows; null is ten times per stage",
        minimum=1,
    )
    max_rise: float = setting(
        2.0, "training stops where its loss stays this many nats above the lowest before", above=0
    )
    distillation: DistillationSpec = setting(DistillationSpec, "for stages with loss: distillation")
    report_to: tuple[str, ...] = setting(tuple, "also log to: tensorboard, wandb, trackio")
    save_steps: int = setting(50, "optimiser steps between checkpoints to resume from", minimum=1)
    log_steps: int = setting(5, "optimiser steps between log lines", minimum=1)

    @property
    def distils(self) -> bool:
        """Whether any stage learns from a teacher."""
        return any(stage.loss == "distillation" for stage in self.stages)

    def contradictions(self) -> list[str]:
        """Settings that are valid alone but not together."""
        faults = []
        if self.batch_size % self.micro_batch_size:
            faults.append(
                f"train.batch_size ({self.batch_size}) must be a multiple of "
                f"train.micro_batch_size ({self.micro_batch_size})"
            )
        names = [stage.label for stage in self.stages]
        if len(set(names)) < len(names):
            faults.append("train.stages: two stages have the same name; set `name`")
        for name in self.report_to:
            if name not in REPORTERS:
                faults.append(
                    f"train.report_to: unknown '{name}'{suggest(name, REPORTERS)} (known: {', '.join(REPORTERS)})"
                )
        spec = self.distillation
        if self.distils and spec.precompute and spec.top_k is None:
            faults.append(
                "train.distillation.precompute writes top_k tokens; set train.distillation.top_k, for example 64"
            )
        if self.distils and spec.precompute and spec.attention:
            faults.append(
                "train.distillation.precompute keeps no attention outputs; set train.distillation.attention to 0, or "
                "leave precompute out"
            )
        if self.distils and not (spec.weight or spec.attention):
            faults.append("train.distillation: weight and attention are both 0, so nothing would be distilled")
        return faults


@dataclass(frozen=True)
class SpeedSpec:
    """How speed is measured."""

    enabled: bool = setting(True, "measure time to first token and tokens per second", common=True)
    prompt: int = setting(256, "tokens of the prompt", minimum=1, common=True)
    new: int = setting(32, "tokens generated", minimum=2, common=True)
    batch: int = setting(1, "sequences at once", minimum=1)
    repeats: int = setting(4, "timed rounds, interleaved over the models; the base closes them", minimum=1)
    engine: str = setting(
        "auto",
        "what generates, for all models alike: engine (this package's), transformers, or auto: engine on a GPU if it "
        "can run every model",
        choices=ENGINES,
    )
    batches: tuple[int, ...] = setting(tuple, "further numbers of sequences at once, for the grid", minimum=1)
    contexts: tuple[int, ...] = setting(tuple, "further lengths of the prompt, for the grid", minimum=1)


@dataclass(frozen=True)
class TaskSpec:
    """One task; an entry of the list may also be its source alone."""

    main: ClassVar[str] = "source"

    source: str = setting(
        "", "builtin:NAME, a local .jsonl or .txt file, or a task of lm-evaluation-harness", path=True
    )
    name: str | None = setting(None, "name in tables; the default is the file's")
    shape: str = setting(
        "auto",
        "how a local file is scored: choices (query, choices, gold), generate (question, target), last_word (query, "
        "target) or perplexity (text); auto looks at the columns",
        choices=("auto", "choices", "generate", "last_word", "perplexity"),
    )
    fewshot: int | None = setting(None, "solved items in front of each item; null takes evaluation.fewshot", minimum=0)
    extract: str = setting(
        "number", "what counts of a generated answer: number (the last one), line (the first), or a regular expression"
    )
    new: int = setting(256, "tokens generated at most", minimum=1)


@dataclass(frozen=True)
class EvaluationSpec:
    """What is measured side by side."""

    tokens: int = setting(8192, "held-out tokens for perplexity", minimum=64, common=True)
    length: int = setting(512, "tokens per window", minimum=16, common=True)
    responses: int = setting(64, "held-out rows for the loss on responses", minimum=1, common=True)
    lengths: tuple[int, ...] | None = setting(
        None,
        "lengths of text for perplexity by length, agreement with the base by position, and retrieval; null takes 256 "
        "and 1024 as far as window and text reach",
        minimum=16,
    )
    length_tokens: int = setting(4096, "held-out tokens for each of these lengths", minimum=16)
    retrieval: int = setting(4, "items of the retrieval probe for each of these lengths", minimum=0)
    tasks: tuple[TaskSpec, ...] = setting(
        lambda: (TaskSpec("builtin:name_the_function"), TaskSpec("builtin:describe_the_function")),
        "built-in tasks, local files (.jsonl, .txt) or names of lm-evaluation-harness",
        common=True,
    )
    limit: int | None = setting(60, "items per task; null takes all", minimum=1, common=True)
    fewshot: int | None = setting(None, "solved items in front of each item; null takes the task's own", minimum=0)
    chat_template: bool = setting(False, "put the items of tasks into the chat template")
    batch_size: int = setting(8, "sequences per forward pass; halved where memory runs out", minimum=1)
    max_batch_size: int = setting(64, "sequences that are tried first on a GPU, in place of batch_size", minimum=1)
    cache: bool = setting(True, "keep scores for other runs; the same model, settings and items are scored once")
    capacity: tuple[float, ...] = setting(
        lambda: (8.0, 24.0, 80.0), "memory in GB for which the longest context and largest batch are told", above=0
    )
    samples: int = setting(3, "held-out prompts that every model answers greedily, for the report", minimum=0)
    sample_tokens: int = setting(64, "tokens of these answers at most", minimum=1)
    speed: SpeedSpec = setting(SpeedSpec, "speed", common=True)


@dataclass(frozen=True)
class SynthesisSpec:
    """Training rows that a model writes, as long as train.max_length allows."""

    model: str = setting("base", "who writes: base, control, converted or trained, a directory or a hub id", path=True)
    tokens: int = setting(1_000_000, "tokens to write, their prompts included", minimum=1)
    prefix: int = setting(32, "tokens of a text that are given; conversations are given up to the answer", minimum=1)
    temperature: float = setting(1.0, "logits are divided by it; 0 takes the likeliest token", minimum=0)
    top_p: float = setting(
        1.0, "only the likeliest tokens that together have this probability are drawn from", above=0, maximum=1
    )
    batch_size: int = setting(64, "rows written at once", minimum=1)
    engine: str = setting(
        "auto", "what generates: engine (this package's), transformers, or auto: engine on a GPU", choices=ENGINES
    )


@dataclass(frozen=True)
class Recipe:
    """Every setting of a run."""

    format: int = setting(RECIPE_FORMAT, "format of this file", minimum=1, maximum=RECIPE_FORMAT, common=True)
    seed: int = setting(0, "seed of everything random", minimum=0, maximum=2**32 - 1, common=True)
    model: ModelSpec = setting(ModelSpec, "the base model", common=True)
    data: DataSpec = setting(DataSpec, "data", common=True)
    analysis: AnalysisSpec = setting(AnalysisSpec, "uniattn analyze", common=True)
    layout: LayoutSpec = setting(LayoutSpec, "uniattn group", common=True)
    conversion: ConversionSpec = setting(ConversionSpec, "uniattn convert", common=True)
    train: TrainSpec = setting(TrainSpec, "uniattn train", common=True)
    evaluation: EvaluationSpec = setting(EvaluationSpec, "uniattn eval", common=True)
    synthesis: SynthesisSpec = setting(SynthesisSpec, "uniattn synthesize")

    @classmethod
    def load(cls, path: Path | str, overrides: typing.Sequence[str] = (), folder: Path | None = None) -> Recipe:
        """Reads and checks a recipe.

        Args:
            path: the YAML file.
            overrides: `key.path=value` strings, the value in YAML, applied before checking.
            folder: that relative paths of file and overrides start from; None is the folder of the file.

        Raises:
            RecipeError: all faults of the file at once.
        """
        path = Path(path)
        return cls.from_tree(read_tree(path), path.name, overrides, path.parent if folder is None else folder)

    @classmethod
    def from_tree(
        cls, tree: Any, name: str = "recipe", overrides: typing.Sequence[str] = (), folder: Path = Path()
    ) -> Recipe:
        """Checks a parsed YAML tree. Raises `RecipeError` with all faults."""
        return read_section(cls, tree, name, overrides, folder)

    def contradictions(self) -> list[str]:
        """Settings that are valid alone but not together."""
        faults = []
        if not self.model.name:
            faults.append("model.name is missing; give a hub id or a directory")
        budgets = [key for key in ("followers", "kv", "params") if getattr(self.layout, key) is not None]
        if len(budgets) > 1:
            faults.append(f"layout: only one budget can be given, not {' and '.join(budgets)}")
        for kind in self.layout.kinds:
            if kind not in CHANGED_KINDS:
                known = ", ".join(CHANGED_KINDS)
                faults.append(f"layout.kinds: unknown kind '{kind}'{suggest(kind, CHANGED_KINDS)} (known: {known})")
        if not self.layout.kinds:
            faults.append("layout.kinds is empty; name at least one kind")
        if len(set(self.layout.kinds)) < len(self.layout.kinds):
            faults.append("layout.kinds names a kind twice")
        if self.layout.search == "fast" and not fast_search_takes(self.layout.kinds):
            faults.append(
                f"layout.kinds: a fast search takes one of {', '.join(BORROWING_KINDS)}; or set layout.search: thorough"
            )
        if self.layout.max_group is not None and self.layout.sources == "several":
            faults.append(
                "layout.max_group needs layout.sources: one (a follower of several layers is in no one group)"
            )
        if self.conversion.solve == "reference" and self.conversion.rank != "full":
            faults.append("conversion.solve: reference has a full W_c; leave conversion.rank out")
        for key in ("train", "calibration", "text"):
            if getattr(self.data, key) == ():
                faults.append(f"data.{key} is empty; name at least one data set, or `builtin`")
        faults.extend(self.data.contradictions())
        if self.train.packing and self.model.attention == "flex_attention":
            faults.append(
                "train.packing does not keep rows apart with model.attention: flex_attention; use auto, eager, sdpa or "
                "flash_attention_2"
            )
        if not self.train.stages:
            faults.append("train.stages is empty; list at least one stage")
        faults += self.train.contradictions()
        faults += self._task_contradictions()
        return faults

    def _task_contradictions(self) -> list[str]:
        faults = []
        for index, task in enumerate(self.evaluation.tasks):
            where = f"evaluation.tasks[{index}]"
            if not task.source:
                faults.append(f"{where}.source is missing; name a task or a file")
            if task.extract not in ("number", "line"):
                try:
                    re.compile(task.extract)
                except re.error as error:
                    faults.append(f"{where}.extract: '{task.extract}' is not a regular expression ({error})")
        return faults

    def to_dict(self) -> dict:
        """Plain nested dicts and lists of every setting."""
        return plain(self)


def flow(value: Any, number: Callable[[float], str] = str) -> str:
    """A value in YAML's flow style, in one line; sections inside lists show only what differs from their own defaults.

    Args:
        number: writes numbers that are not whole.
    """
    if dataclasses.is_dataclass(value):
        main: str | None = getattr(value, "main", None)
        cls: Any = type(value)
        if main and value == cls(**{main: getattr(value, main)}):
            return getattr(value, main)
        default = cls()
        names = [entry.name for entry in dataclasses.fields(value)]
        shown = [name for name in names if getattr(value, name) != getattr(default, name) or name == main]
        return "{" + ", ".join(f"{name}: {flow(getattr(value, name), number)}" for name in shown or names[:1]) + "}"
    if isinstance(value, tuple):
        return "[" + ", ".join(flow(item, number) for item in value) + "]"
    if value is None or isinstance(value, (bool, dict)):
        return json.dumps(value)
    return number(value) if isinstance(value, float) else str(value) or "''"
