"""Writes the list of what the built-in corpus consists of: the documentation that Python releases have in common.

python scripts/share_docs.py PYTHON3.10 PYTHON3.11 … PYTHON3.14

Give an interpreter of every supported release, oldest first, best an early and a late one of each, and one of Debian,
which packages parts of the standard library separately. All scores on the corpus change with the list.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from uniattn_cli.data.stdlib_docs import SHARED, content_hash, documented, paragraphs, short_hash  # noqa: E402

PASSAGE = 200  # characters that paragraphs in a row must have, so that no line stands alone where others were left out
INVENTORY = "--inventory"  # how this file calls itself with another interpreter
REPEATED = 60  # characters up to which a paragraph ("For example:") may come again


def inventory() -> dict[str, Any]:
    """What the running interpreter documents: names with module, content hash and docstring; topics in paragraphs."""
    from pydoc_data.topics import topics

    names: dict[str, tuple[str, str, str]] = {}
    for entry in documented(Path(sysconfig.get_paths()["stdlib"])):
        names.setdefault(entry.name, (entry.module, content_hash(entry), entry.doc))
    return {"names": names, "topics": {topic: paragraphs(topics[topic]) for topic in topics}}


def inventory_of(python: str) -> dict[str, Any]:
    """The inventory of another interpreter."""
    command = [python, __file__, INVENTORY]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", check=False)
    if done.returncode:
        sys.exit(f"{python}: {done.stderr.strip() or 'failed'}")
    return json.loads(done.stdout)


def shared_names(inventories: list[dict[str, Any]]) -> dict[str, tuple[str, str, str]]:
    """Names that all interpreters document in the same words, sorted."""
    first, *others = (each["names"] for each in inventories)
    return {name: first[name] for name in sorted(first) if all(each.get(name) == first[name] for each in others)}


def shared_topics(inventories: list[dict[str, Any]], seen: set[str]) -> dict[str, list[str]]:
    """Topics of the last interpreter, with those paragraphs that all have and that are not in `seen`.

    Topics repeat one another: a long paragraph is kept once, and a topic of which less than half is new is left out.
    """
    common = set.intersection(*({p for text in each["topics"].values() for p in text} for each in inventories))
    topics = inventories[-1]["topics"]
    found: dict[str, list[str]] = {}
    for topic in sorted(topics, key=lambda topic: (-sum(map(len, topics[topic])), topic)):
        kept = [p for p in passages(topics[topic], common) if len(p) < REPEATED or squeezed(p) not in seen]
        new = sum(len(p) for p in kept if squeezed(p) not in seen)
        if new > 0.5 * sum(len(p) for p in topics[topic] if p in common):
            found[topic] = kept
        seen |= {squeezed(p) for p in kept}
    return found


def passages(text: list[str], common: set[str]) -> list[str]:
    """Paragraphs of `text` that are common, in runs of at least `PASSAGE` characters that do not end in a colon."""
    kept: list[str] = []
    for is_common, run in itertools.groupby(text, key=common.__contains__):
        block = list(run)
        while block and block[-1].endswith(":"):
            block.pop()
        if is_common and sum(map(len, block)) >= PASSAGE:
            kept.extend(block)
    return kept


def squeezed(text: str) -> str:
    """The words of a text, however it is laid out."""
    return " ".join(text.split())


def main(pythons: list[str]) -> None:
    """Writes the list and says how long it is."""
    inventories = [inventory_of(python) for python in pythons]
    names = shared_names(inventories)
    # What a docstring says too (the debugger's manual does) stays with the docstring.
    topics = shared_topics(inventories, {squeezed(p) for _, _, doc in names.values() for p in paragraphs(doc)})
    modules: dict[str, dict[str, str]] = {}
    for name, (module, content, _) in names.items():
        modules.setdefault(module, {})[name.removeprefix(module)] = content
    lists = {"docstrings": modules, "topics": {topic: [short_hash(p) for p in topics[topic]] for topic in topics}}
    SHARED.write_text(written(lists), encoding="utf-8", newline="\n")
    print(f"{len(names)} docstrings of {len(modules)} modules, {sum(map(len, topics.values()))} paragraphs: {SHARED}")


def written(lists: dict[str, dict[str, Any]]) -> str:
    """JSON with one module or topic a line, so that changes can be read."""
    parts = []
    for name, members in lists.items():
        lines = [f"{json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}" for key, value in members.items()]
        parts.append(f'"{name}": {{\n' + ",\n".join(lines) + "\n}")
    return "{" + ",\n".join(parts) + "}\n"


if __name__ == "__main__":
    if sys.argv[1:] == [INVENTORY]:
        json.dump(inventory(), sys.stdout)
    elif sys.argv[1:]:
        main(sys.argv[1:])
    else:
        sys.exit(__doc__)
