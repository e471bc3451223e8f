"""Entry point of the console script `uniattn` and of `python -m uniattn_cli`."""

from __future__ import annotations


def main() -> None:
    """Runs the command line and exits with its code."""
    from uniattn_cli.cli.app import app

    app(prog_name="uniattn")


if __name__ == "__main__":
    main()
