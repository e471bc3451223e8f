"""The weight files of a model: whether they are there and whole, and what one can see in them before loading."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uniattn_cli.errors import CheckpointError
from uniattn_cli.run.files import check_not_pointer, read_json

if TYPE_CHECKING:
    import torch

# As safetensors files name them; weights of other dtypes mean nothing without scales that some library applies.
DTYPES = {"F64", "F32", "F16", "BF16"}
# What names end with; multi-modal models have longer ones.
HEAD, EMBEDDINGS = "lm_head.weight", "embed_tokens.weight"
AGAIN = "copy the model again"


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers loads weights from, as their names or an index say; they may be missing.

    Raises:
        CheckpointError: the index is damaged, or missing beside the files that it would name.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        single, index = folder / name, folder / f"{name}.index.json"
        if single.is_file():
            return [single]
        if index.is_file():
            places = read_json(index, AGAIN, CheckpointError).get("weight_map")
            if not isinstance(places, dict):
                raise CheckpointError(f"{index} is damaged (it has no weight_map); {AGAIN}")
            return sorted({folder / str(place) for place in places.values()})
        if any(folder.glob(f"{single.stem}-*-of-*{single.suffix}")):
            raise CheckpointError(f"{index} is missing, which says what is in the weight files; {AGAIN}")
    return []


def check_weight_files(folder: Path) -> list[Path]:
    """The weight files of a model, after looking that each is there and whole; weights themselves are not read.

    Raises:
        CheckpointError: names the file that is missing, cut off or a pointer, and the next step.
    """
    files = weight_files(folder)
    if not files:
        raise CheckpointError(f"{folder} has no weights (model.safetensors); {AGAIN}")
    for path in files:
        if not path.is_file():
            raise CheckpointError(f"{path} is missing, although the index of the weights names it; {AGAIN}")
        if path.suffix == ".safetensors":
            with _opened(path):
                pass
        else:
            check_not_pointer(path, CheckpointError)
    return files


def check_dtypes(files: Iterable[Path]) -> None:
    """Refuses weights whose numbers stand for others, although the model's configuration says nothing of it.

    transformers would take them as they are.

    Args:
        files: result of `check_weight_files`; only those of safetensors are looked at.

    Raises:
        CheckpointError: names the first such weight.
    """
    for path in files:
        if path.suffix != ".safetensors":
            continue
        with _opened(path) as stored:
            for name in sorted(stored.keys()):
                dtype = stored.get_slice(name).get_dtype()
                if name.endswith(".weight") and dtype not in DTYPES:
                    raise CheckpointError(
                        f"{path}: {name} is quantised (stored as {dtype}); give the unquantised model"
                    )


def has_own_head(folder: Path) -> bool:
    """Whether the files of a model hold a head with other values than its embeddings, whatever its configuration says.

    Merged adapters and pruned models often have one under `tie_word_embeddings: true`. Where weights are not here yet,
    or not in safetensors files, the answer is False.

    Raises:
        CheckpointError: a file is damaged.
    """
    import torch

    places = []
    for path in weight_files(folder):
        if not path.is_file() or path.suffix != ".safetensors":
            return False
        with _opened(path) as stored:
            places += [(path, name) for name in set(stored.keys()) if name.endswith((HEAD, EMBEDDINGS))]
    tensors = []
    # One of the two alone is both, and more of them belong to no model that is known here.
    for path, name in places if len(places) == 2 else ():
        with _opened(path, "pt") as stored:
            tensors.append(stored.get_tensor(name))
    return bool(tensors) and not torch.equal(*tensors)


@contextlib.contextmanager
def _opened(path: Path, framework: str = "numpy") -> Iterator[Any]:
    """A safetensors file whose header is sound and whose size is what the header says."""
    from safetensors import SafetensorError, safe_open

    check_not_pointer(path, CheckpointError)
    try:
        stored = safe_open(path, framework)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or cut off ({error}); {AGAIN}") from None
    with stored:
        yield stored


def check_numbers(weights: Iterable[tuple[str, torch.Tensor]], name: str) -> None:
    """Refuses weights that are NaN or infinite, which otherwise look like an overflow in some later layer.

    Quantised weights are passed over: integers are finite, and not every quantised tensor can be asked.

    Args:
        weights: by name.
        name: of the model, for the message.

    Raises:
        CheckpointError: names the first such weight and the next step.
    """
    import torch

    plain = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    named = [
        (key, weight)
        for key, weight in weights
        if weight.numel() and weight.dtype in plain and type(weight) in (torch.Tensor, torch.nn.Parameter)
    ]
    if not named:
        return
    # Both ends are NaN where any value is; they need no memory, and one wait for the device is enough.
    ends = torch.stack([torch.stack(weight.detach().aminmax()).float() for _, weight in named])
    wrong = (~ends.isfinite().all(-1)).nonzero().flatten().tolist()
    if wrong:
        key, weight = named[wrong[0]]
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        remedy = f"{AGAIN}, or an earlier checkpoint"
        if weight.dtype == torch.float16:
            remedy += ", or, where they are too large for float16, set model.dtype to bfloat16"
        raise CheckpointError(
            f"{name}: weight {key}{more} holds values that are infinite or not a number: the files are damaged, or the "
            f"training that wrote them diverged; {remedy}"
        )
