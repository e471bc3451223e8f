"""The file format of `analysis/`: what `analyze` measured, as `group` and `convert` read it.

`analysis.json` holds everything but the large arrays; its schema is the dataclass `Measured` plus, for readers,
`neighbours` and `candidates` as printed. `maps.safetensors` holds per-head similarities `heads.NAME` and their standard
errors `heads.NAME.stderr`, float32 [layers, max_distance, heads, heads] (see `analysis.statistics.banded`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from uniattn_cli.errors import StageError
from uniattn_cli.modeling.layout_uniattn import AttentionShape
from uniattn_cli.run.files import read_json, write_json

SCHEMA = 2
JSON_FILE = "analysis.json"
ARRAY_FILE = "maps.safetensors"
# Similarities whose weighted mean scores a borrowing in the fast search. Of the metrics and mixtures tried on
# SmolLM2-135M, this one led to the converted models with the lowest held-out perplexity.
SCORE_WEIGHTS = {"js": 2 / 3, "js_no_sink": 1 / 3}


@dataclass(frozen=True)
class Measured:
    """Result of one analysis.

    Attributes:
        model: name as the user gave it.
        fingerprint: of the model's files.
        model_type: family.
        shape: sizes of the attention.
        element_size: bytes per element of the weights and of the cache.
        tokens, sequences, length: of the calibration text.
        max_distance: largest distance of measured head pairs.
        seconds: wall time of the measuring pass.
        forward_ratio: that time over the time of plain forward passes on the same tokens.
        layers: per metric, `mean` and `stderr` as [layers][layers] lists.
        sink: mean weight of the first key, per layer.
        output_error: `before` and `after` compensation and their `_stderr`, [borrower][source] lists with NaN where
            nothing was measured (see `analysis.borrowing`); None if the family's output projection is not known.
        heads: per metric, [layers, max_distance, heads, heads]; kept in the array file.
        heads_stderr: the same for the standard errors over sequences.
    """

    model: str
    fingerprint: str
    model_type: str
    shape: AttentionShape
    element_size: int
    tokens: int
    sequences: int
    length: int
    max_distance: int
    seconds: float
    forward_ratio: float
    layers: dict[str, dict[str, list]]
    sink: list[float]
    output_error: dict[str, list] | None
    heads: dict[str, np.ndarray] = field(repr=False)
    heads_stderr: dict[str, np.ndarray] = field(repr=False)

    @property
    def score(self) -> np.ndarray:
        """Similarity that the search maximises, [layers, max_distance, heads, heads], in [0, 1]."""
        return np.sum([weight * self.heads[name] for name, weight in SCORE_WEIGHTS.items()], axis=0)

    @property
    def score_stderr(self) -> np.ndarray:
        """Standard error of `score`; an upper bound, as if the errors of its parts were the same."""
        return np.sum([weight * self.heads_stderr[name] for name, weight in SCORE_WEIGHTS.items()], axis=0)

    def resolution(self) -> tuple[float, float]:
        """(median 95 % half-width, standard deviation between pairs) of the scores of all measured head pairs."""
        layers, distances = np.indices(self.score.shape[:2])
        measured = layers > distances
        return 1.96 * float(np.median(self.score_stderr[measured])), float(np.std(self.score[measured]))

    def save(self, directory: Path, extra: dict[str, Any]) -> None:
        """Writes both files; `extra` adds keys to the JSON for readers."""
        from safetensors.numpy import save_file

        content = {
            entry.name: getattr(self, entry.name)
            for entry in dataclasses.fields(self)
            if entry.name not in ("heads", "heads_stderr", "shape")
        }
        content = {"schema": SCHEMA, **content, "shape": dataclasses.asdict(self.shape), **extra}
        write_json(directory / JSON_FILE, _rounded(content))
        arrays = {f"heads.{name}": value for name, value in self.heads.items()}
        arrays |= {f"heads.{name}.stderr": value for name, value in self.heads_stderr.items()}
        arrays = {name: np.ascontiguousarray(value, dtype=np.float32) for name, value in arrays.items()}
        save_file(arrays, directory / ARRAY_FILE)

    @classmethod
    def load(cls, directory: Path) -> Measured:
        """Reads an analysis directory.

        Raises:
            StageError: files are missing, damaged or of a newer schema.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        content = read_json(directory / JSON_FILE, "run `uniattn analyze --force`")
        try:
            arrays = load_file(directory / ARRAY_FILE)
            schema = content["schema"]
            if schema != SCHEMA:
                raise StageError(f"{directory} has schema {schema}; run `uniattn analyze --force` again")
            return cls._from_files(content, arrays)
        except KeyError as error:
            raise StageError(f"{directory} is damaged ({error} is missing); run `uniattn analyze --force`") from None
        except (OSError, ValueError, TypeError, SafetensorError) as error:
            raise StageError(f"{directory} is damaged ({error}); run `uniattn analyze --force`") from None

    @classmethod
    def _from_files(cls, content: dict[str, Any], arrays: dict[str, np.ndarray]) -> Measured:
        """Raises KeyError, TypeError or ValueError if something is missing or of the wrong shape."""
        shape = AttentionShape(**content["shape"] | {"mask_types": tuple(content["shape"]["mask_types"])})
        names = {entry.name for entry in dataclasses.fields(cls)} - {"heads", "heads_stderr", "shape"}
        means = {key[6:]: value for key, value in arrays.items() if not key.endswith(".stderr")}
        stderrs = {key[6:-7]: value for key, value in arrays.items() if key.endswith(".stderr")}
        measured = cls(**{name: content[name] for name in names}, shape=shape, heads=means, heads_stderr=stderrs)
        expected = (shape.layers, measured.max_distance, shape.query_heads, shape.query_heads)
        if measured.score.shape != expected:
            raise ValueError(f"{ARRAY_FILE} has arrays of shape {measured.score.shape}, not {expected}")
        return measured


def _rounded(value: Any) -> Any:
    """Six significant digits, and null for NaN, which JSON does not have."""
    if isinstance(value, float):
        return None if value != value else float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return value
