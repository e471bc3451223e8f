"""Quantised weights and KV caches: what each scheme adds to the perplexity of a base and of converted models.

    python -m benchmarks.quantised MODEL --text c4.jsonl --wikitext wiki.tokens --out docs/benchmarks/quantised.json

Each model is quantised by transformers as it loads, or by llm-compressor, saved, loaded again by uniattn and scored on
the first `--tokens` tokens of the pages of `--text` (`c4`; the pages after them are calibration text) and of
`--wikitext` (`wt`), in windows of `--length`. Quantised caches are filled piece by piece, so that each piece reads what
was quantised before it. Schemes whose library is missing, or that the device cannot run, are left out and named.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import math
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks import runner, texts
from uniattn_cli.evaluation.cost import weight_file_bytes
from uniattn_cli.fitting.fit import fit_layers
from uniattn_cli.layouts.shorthand import parse_groups
from uniattn_cli.modeling.configuration_uniattn import attention_shape, layout_of
from uniattn_cli.modeling.layout_uniattn import Layout
from uniattn_cli.models.building import build_converted, save_checkpoint
from uniattn_cli.models.costs import kv_bytes_per_token
from uniattn_cli.models.device import describe_device
from uniattn_cli.models.hub import locate
from uniattn_cli.models.loading import load_model
from uniattn_cli.models.losses import window_loss
from uniattn_cli.models.of_run import BASE
from uniattn_cli.models.tokenizer import load_tokenizer
from uniattn_cli.recipe.schema import ConversionSpec, ModelSpec
from uniattn_cli.tables import Table

# In how many pieces a quantised cache gets a window.
PIECES = 8
PLAIN = "not quantised"
# Neighbouring weights, or numbers of one head, that share a scale.
GROUP = 64


@dataclass(frozen=True)
class Scheme:
    """One way of quantising.

    Attributes:
        needs: the library's module.
        weights: from a model's folder to the model with quantised weights; None for those of the cache.
        cache: arguments of transformers' `QuantizedCache`.
        cuda: whether it takes a GPU.
    """

    needs: str
    weights: Callable[[Path, torch.device], PreTrainedModel] | None = None
    cache: dict[str, Any] | None = None
    cuda: bool = False


def _loaded(config: Callable[[], Any]) -> Callable[[Path, torch.device], PreTrainedModel]:
    """Quantised by transformers while it loads."""

    def load(folder: Path, device: torch.device) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config(), device_map={"": device})

    return load


def _torchao(choose: Callable[[Any], Any]) -> Callable[[], Any]:
    def config() -> Any:
        from torchao import quantization
        from transformers import TorchAoConfig

        return TorchAoConfig(choose(quantization))

    return config


def _bitsandbytes(**settings: Any) -> Callable[[], Any]:
    def config() -> Any:
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(**settings)

    return config


def _llm_compressor(folder: Path, device: torch.device) -> PreTrainedModel:
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    model = AutoModelForCausalLM.from_pretrained(folder, device_map={"": device})
    oneshot(model=model, recipe=QuantizationModifier(targets="Linear", scheme="FP8_DYNAMIC", ignore=["lm_head"]))
    return model


PACKED = {"group_size": GROUP, "int4_packing_format": "tile_packed_to_4d"}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
SCHEMES = {
    PLAIN: Scheme("torch"),
    "int8 (torchao)": Scheme("torchao", _loaded(_torchao(lambda ao: ao.Int8WeightOnlyConfig()))),
    "int4 (torchao)": Scheme(
        "torchao",
        _loaded(_torchao(lambda ao: ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(GROUP)))),
    ),
    "int4 in tiles (torchao)": Scheme(
        "torchao", _loaded(_torchao(lambda ao: ao.Int4WeightOnlyConfig(**PACKED))), cuda=True
    ),
    "fp8 (torchao)": Scheme(
        "torchao", _loaded(_torchao(lambda ao: ao.Float8DynamicActivationFloat8WeightConfig())), cuda=True
    ),
    "int8 (bitsandbytes)": Scheme("bitsandbytes", _loaded(_bitsandbytes(load_in_8bit=True))),
    "nf4 (bitsandbytes)": Scheme("bitsandbytes", _loaded(_bitsandbytes(**NF4))),
    "fp8 (llm-compressor)": Scheme("llmcompressor", _llm_compressor),
    # Axes along which both libraries group numbers of one head and token.
    "cache of 4 bits (quanto)": Scheme("optimum.quanto", cache={"backend": "quanto", "nbits": 4}),
    "cache of 2 bits (quanto)": Scheme("optimum.quanto", cache={"backend": "quanto", "nbits": 2}),
    "cache of 4 bits (hqq)": Scheme("hqq", cache={"backend": "hqq", "nbits": 4, "axis_key": 1, "axis_value": 1}),
}


def obstacle(scheme: Scheme, device: torch.device) -> str | None:
    """Why a scheme cannot be measured here; None if it can."""
    if scheme.cuda and device.type != "cuda":
        return "needs a GPU"
    root, _, rest = scheme.needs.partition(".")
    found = importlib.util.find_spec(root) and (not rest or importlib.util.find_spec(scheme.needs))
    return None if found else f"needs {scheme.needs}"


class Bench:
    """The models, made when they are first needed, and their texts."""

    def __init__(self, arguments: argparse.Namespace, results: runner.Results):
        self.arguments, self.results, self.device = arguments, results, arguments.device
        self.dtype = "bfloat16" if self.device.type == "cuda" else "float32"
        self.batch = 16 if self.device.type == "cuda" else 2
        self.source = locate(arguments.model)
        self.tokenizer = load_tokenizer(self.source)
        self.folder = tempfile.TemporaryDirectory()
        self.checkpoints: dict[str, Path] = {}
        rest = Path(self.folder.name) / "rest.jsonl"
        cut = {"tokens": arguments.tokens, "length": arguments.length}
        self.texts = {
            "c4": texts.split_pages(self.tokenizer, arguments.text, rest, **cut),
            "wt": texts.text_windows(self.tokenizer, arguments.wikitext, **cut),
        }
        fit = {"tokens": arguments.fit_tokens, "length": arguments.length}
        self.calibration = texts.split_pages(self.tokenizer, rest, rest, **fit)
        self.spec = ConversionSpec(refine=arguments.refine)
        results.begin(
            {
                "model": Path(arguments.model).name,
                "dtype": self.dtype,
                "device": describe_device(self.device),
                "window": arguments.length,
                "evaluated_tokens": {name: windows.numel() for name, windows in self.texts.items()},
                "fit_tokens": self.calibration.numel(),
                "refine": self.spec.refine,
                "group": GROUP,
                "libraries": {name: _version(name) for name in sorted({scheme.needs for scheme in SCHEMES.values()})},
            }
        )

    @cached_property
    def base(self) -> PreTrainedModel:
        """The base in float32, from which all models are made."""
        return load_model(self.source, ModelSpec(name=self.arguments.model, dtype="float32"), self.device)

    def checkpoint(self, name: str) -> Path:
        """The folder of a model that is not quantised; the model is made if it is not there."""
        if name not in self.checkpoints:
            model = self.base if name == BASE else self._converted(name)
            folder = Path(self.folder.name) / str(len(self.checkpoints))
            folder.mkdir()
            save_checkpoint(copy.deepcopy(model).to(getattr(torch, self.dtype)), self.tokenizer, folder)
            self.checkpoints[name] = folder
        return self.checkpoints[name]

    def _converted(self, name: str) -> PreTrainedModel:
        shape = attention_shape(self.base.config)
        found = [runner.read(path)["layouts"].get(name) for path in self.arguments.layouts_from]
        entries = next((entry["steps"][-1] for entry in found if entry), None)
        layout = parse_groups(name, shape) if entries is None else _usual(Layout.from_list(entries))
        torch.manual_seed(0)
        model = build_converted(self.base, layout)
        fit_layers(self.base, model, self.calibration, self.spec, batch_size=self.batch)
        return model

    def row(self, name: str, label: str) -> None:
        """Measures one model under one scheme."""
        scheme, folder = SCHEMES[label], self.checkpoint(name)
        with tempfile.TemporaryDirectory() as quantised:
            if scheme.weights is not None:
                model = scheme.weights(folder, self.device)
                # Before anything runs: on a CPU bitsandbytes packs weights in the first call, and saves what it packed.
                model.save_pretrained(quantised)
                self.tokenizer.save_pretrained(quantised)
                folder = Path(quantised)
            model = load_model(locate(str(folder)), ModelSpec(dtype=self.dtype), self.device)
            stored = weight_file_bytes(folder)
        config = model.config
        kv = float(kv_bytes_per_token(layout_of(config), attention_shape(config), model.dtype.itemsize))
        found = {}
        for text, windows in self.texts.items():
            if scheme.cache is None:
                found[text] = window_loss(model, windows, batch_size=self.batch).perplexity
            else:
                found[text], kv = cached_perplexity(model, windows, scheme.cache, self.batch)
        key = f"{name} | {label}"
        plain = found if label == PLAIN else self.results.content["rows"][f"{name} | {PLAIN}"]["perplexity"]
        ratio = {text: round(value / plain[text], 4) for text, value in found.items()}
        perplexity = {text: round(value, 3) for text, value in found.items()}
        row = {"perplexity": perplexity, "ratio": ratio, "weight_bytes": stored, "kv_bytes_per_token": round(kv, 1)}
        self.results.add("rows", key, row)


def _usual(layout: Layout) -> Layout:
    """A layout with the W_c that each kind has by default."""
    plans = (replace(plan, compensation=plan.traits.compensation_for("auto")) for plan in layout)
    return Layout(tuple(plans))


def _version(module: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(module.replace(".", "-"))
    except PackageNotFoundError:
        return None


def cached_perplexity(
    model: PreTrainedModel, windows: torch.Tensor, options: dict[str, Any], batch_size: int
) -> tuple[float, float]:
    """Perplexity of windows that are read piece by piece through a quantised cache.

    Args:
        windows: [rows, length] token ids.
        options: of the cache.

    Returns:
        The perplexity, and the bytes that the last full cache keeps for each token.
    """
    from transformers import QuantizedCache

    losses, held = [], 0.0
    with torch.no_grad():
        for tokens in windows.to(model.device).split(batch_size):
            piece = tokens.shape[1] // PIECES
            cache = QuantizedCache(config=model.config, q_group_size=GROUP, residual_length=piece, **options)
            pieces = [model(part, past_key_values=cache).logits.float() for part in tokens.split(piece, dim=1)]
            logits = torch.cat(pieces, dim=1)[:, :-1]
            losses.append(F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").double())
            held = sum(held_bytes(vars(layer)) for layer in cache.layers) / tokens.numel()
    return math.exp(torch.cat(losses).mean().item()), held


def held_bytes(value: Any) -> int:
    """Bytes of all tensors in a structure, also of those that a quantised tensor consists of."""
    if hasattr(value, "__tensor_flatten__"):
        return sum(held_bytes(getattr(value, name)) for name in value.__tensor_flatten__()[0])
    if isinstance(value, torch.Tensor):
        return value.nbytes
    values: Iterable = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return sum(map(held_bytes, values))


def markdown(content: dict) -> str:
    """One line per scheme, one column per model."""
    rows, setting = content["rows"], content["setting"]
    names = list(dict.fromkeys(key.rpartition(" | ")[0] for key in rows))
    labels = [label for label in SCHEMES if any(f"{name} | {label}" in rows for name in names)]
    table = [[label, *(_cell(rows.get(f"{name} | {label}"), label) for name in names)] for label in labels]
    versions = ", ".join(f"{name} {version}" for name, version in setting["libraries"].items() if version)
    return runner.page(
        f"{setting['model']}: quantised weights and caches",
        f"Perplexity (c4 / wt) of each model in {setting['dtype']}; below it, ratios to the perplexity of the same "
        "model on the same tokens; in parentheses, megabytes of weights or bytes of the cache for each token. "
        f"{setting['device']}, windows of {setting['window']:,} tokens, "
        f"{' / '.join(f'{tokens:,}' for tokens in setting['evaluated_tokens'].values())} tokens; {versions}. Made by "
        "`benchmarks/quantised.py`, which explains what is measured.",
        Table("", ["scheme", *names], table),
    )


def _cell(row: dict | None, label: str) -> str:
    if row is None:
        return ""
    megabytes, kv = f"{row['weight_bytes'] / 1e6:.0f} MB", f"{row['kv_bytes_per_token']:,.0f} B"
    if label == PLAIN:
        return f"{' / '.join(f'{value:.2f}' for value in row['perplexity'].values())} ({megabytes}, {kv})"
    size = kv if SCHEMES[label].cache else megabytes
    return f"{' / '.join(f'{value:.3f}' for value in row['ratio'].values())} ({size})"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    texts.add_options(parser)
    searched = [Path(f"docs/benchmarks/{name}.json") for name in ("layouts", "layouts_aligned")]
    parser.add_argument(
        "--layouts",
        nargs="*",
        default=["softmax, free", "early, aligned"],
        help="searches in the files of --layouts-from, or fixed layouts as `uniattn convert --groups` takes them",
    )
    parser.add_argument("--layouts-from", nargs="*", type=Path, default=searched, help="files of benchmarks/layouts.py")
    parser.add_argument("--schemes", nargs="*", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--tokens", type=int, default=texts.TEXT_TOKENS, help="of each text")
    parser.add_argument("--fit-tokens", type=int, default=80 * 1024)
    parser.add_argument("--length", type=int, default=1024, help="of windows, in tokens")
    parser.add_argument("--refine", type=int, default=ConversionSpec().refine, help="conversion.refine of the recipe")


def measure(arguments: argparse.Namespace, results: runner.Results) -> None:
    """All models under all schemes, each model unquantised first."""
    bench = Bench(arguments, results)
    labels = list(dict.fromkeys([PLAIN, *arguments.schemes]))
    for label in list(labels):
        if reason := obstacle(SCHEMES[label], bench.device):
            print(f"left out: {label} ({reason})", flush=True)
            labels.remove(label)
    for name in (BASE, *arguments.layouts):
        for key in results.missing("rows", [f"{name} | {label}" for label in labels]):
            bench.row(name, key.rpartition(" | ")[2])


if __name__ == "__main__":
    runner.run("quantised", __doc__, ("rows",), add_options, measure, markdown=markdown)
