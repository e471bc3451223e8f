"""Entry point of the console script `uniattn` and of `python -m uniattn_cli`."""

from __future__ import annotations

import io
import os
import sys


def main() -> None:
    """Runs the command line and exits with its code."""
    spin_briefly()
    print_anything()
    from uniattn_cli.cli.app import app

    app(prog_name="uniattn")


def spin_briefly() -> None:
    """Has PyTorch's OpenMP threads sleep soon at a barrier; must run before PyTorch is loaded.

    They would spin, and beside other work on the same cores a training step takes three times as long. Whoever has set
    how they wait has their way.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def print_anything() -> None:
    """Has stdout replace what its encoding lacks (ASCII, Latin-1) instead of failing; stderr does so from the start."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        sys.stdout.reconfigure(errors="replace")


if __name__ == "__main__":
    main()
