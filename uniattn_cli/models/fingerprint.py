"""A short hash that tells checkpoints apart."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import BinaryIO

from uniattn_cli.run.directory import STAGE_FILE

SAMPLE_BYTES = 256


def fingerprint(directory: Path) -> str:
    """A short hash that tells checkpoints apart without reading gigabytes.

    Covers all JSON files in full, and of every weight file its name, size, first and last MiB, and a few bytes of each
    tensor: training may change nothing but small tensors in the middle of a large file.
    """
    digest = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        if (
            not path.is_file()
            or path.name == STAGE_FILE
            or path.suffix not in (".json", ".safetensors", ".bin", ".gguf")
        ):
            continue
        size = path.stat().st_size
        digest.update(f"{path.name}:{size};".encode())
        with path.open("rb") as stream:
            if path.suffix == ".json":
                digest.update(stream.read())
                continue
            digest.update(stream.read(1 << 20))
            if size > 1 << 20:
                stream.seek(-(1 << 20), os.SEEK_END)
                digest.update(stream.read())
            for offset in _tensor_samples(stream, size) if path.suffix == ".safetensors" else ():
                stream.seek(offset)
                digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def _tensor_samples(stream: BinaryIO, size: int) -> list[int]:
    """Places in a safetensors file: beginning and middle of each tensor; none where its header cannot be read."""
    stream.seek(0)
    length = int.from_bytes(stream.read(8), "little")
    if length > size:
        return []
    try:
        header = json.loads(stream.read(length))
        spans = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
        return sorted(8 + length + place for start, end in spans for place in (start, (start + end) // 2))
    except (ValueError, TypeError, KeyError, AttributeError):
        return []
