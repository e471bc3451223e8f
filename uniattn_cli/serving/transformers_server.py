"""The program `transformers`, with the classes of converted checkpoints among those that `transformers serve` finds.

`transformers serve` looks a checkpoint's class up among the names of transformers itself, with --trust-remote-code too,
and so ends with an AttributeError for every model that brings its own code.
"""

from __future__ import annotations

from uniattn_cli.models.families import FAMILIES


def register() -> None:
    """Makes transformers find, under each of our names, the class that reads a checkpoint's own code."""
    import transformers

    for family in FAMILIES.values():
        setattr(transformers, f"{family.prefix}ForCausalLM", transformers.AutoModelForCausalLM)


def main() -> None:
    """Runs transformers' command line."""
    from transformers.cli.transformers import main

    register()
    main()


if __name__ == "__main__":
    main()
