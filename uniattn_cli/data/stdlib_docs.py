"""The standard library's own documentation: what every public name is for, read from source with `ast`.

Nothing is imported or run. What Python releases say differently is left out: `shared_docs.json` names what those from
3.10 to 3.14 share, with hashes of the contents, and `scripts/share_docs.py` makes it. Every docstring belongs to one of
three disjoint parts, decided by a hash of its text.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import inspect
import json
import os
import platform
import re
import sysconfig
import warnings
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from uniattn_cli.errors import DataError, DataWarning

SHARED = Path(__file__).with_name("shared_docs.json")
HELDOUT_SHARE = 0.35
LONG_DOCSTRING = 900  # characters from which a docstring is text to read rather than an answer
ANSWER = (40, 700)  # characters of an instruction's answer
SHARED_PARAGRAPH = 120  # characters from which a paragraph in two docstrings keeps them in one part

# Tests, vendored or generated code, what some systems package separately, and modules whose docstrings say nothing.
_SKIPPED = {
    "curses", "dbm", "tkinter", "turtle",
    "test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "dist-packages", "pydoc_data", "turtledemo",
    "ensurepip", "distutils", "encodings", "lib-dynload", "ntpath", "this", "antigravity",
}  # fmt: skip
_PUBLIC_NAMES = {"posixpath": "os.path", "genericpath": "os.path"}


@dataclass(frozen=True)
class Entry:
    """One public module, class or function of the standard library that has a docstring.

    Attributes:
        name: qualified name, such as `os.path.join`.
        module: name of its module.
        kind: module, class, function or method.
        arguments: parameters without `self`, as (name, default or None) in source form; None for modules and classes.
        signature: parameters in source form, such as `(a, *p)`; empty for modules and classes.
        doc: cleaned docstring.
        answer: its first paragraphs of prose, reflowed; empty where there is no usable prose.
        part: calibration, train or heldout.
    """

    name: str
    module: str
    kind: str
    arguments: tuple[tuple[str, str | None], ...] | None
    signature: str
    doc: str
    answer: str
    part: str


@dataclass(frozen=True)
class Shared:
    """What all supported Python releases document in the same words.

    Attributes:
        docstrings: module to the rest of a public name (`.Path.exists`) to `content_hash`.
        topics: topic of the language reference to the `short_hash` of its paragraphs, in order.
    """

    docstrings: dict[str, dict[str, str]]
    topics: dict[str, list[str]]


@functools.lru_cache(maxsize=1)
def shared() -> Shared:
    """The list of what the corpus consists of."""
    return Shared(**json.loads(SHARED.read_text(encoding="utf-8")))


@functools.lru_cache(maxsize=1)
def entries() -> tuple[Entry, ...]:
    """The documented public names that all supported Python releases share, without duplicates, sorted by name.

    Warns where this Python lacks some of them.

    Raises:
        DataError: no sources were found.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    listed = shared().docstrings
    wanted = {module + rest: content for module, names in listed.items() for rest, content in names.items()}
    found = {e.name: e for e in documented(root, listed) if wanted.get(e.name) == content_hash(e)}
    if not found:
        raise DataError(
            f"the built-in corpus needs the standard library's sources, but {root} has none; "
            "set data.train and data.text to local files"
        )
    tell_missing(len(wanted) - len(found), len(wanted), "docstrings")
    return tuple(distinct(found[name] for name in sorted(found)))


def tell_missing(missing: int, of: int, what: str) -> None:
    """Warns that some of the corpus is missing, which makes it another corpus."""
    if missing:
        warnings.warn(
            f"Python {platform.python_version()} lacks {missing} of the {of} {what} of the built-in corpus: scores on "
            "it differ from those of other machines",
            DataWarning,
            stacklevel=3,
        )


def distinct(entries: Iterable[Entry]) -> Iterator[Entry]:
    """The entries without those that repeat a docstring or answer; entries that share a paragraph share their part."""
    seen_docs: set[str] = set()
    seen_answers: set[str] = set()
    part_with: dict[str, str] = {}
    for entry in entries:
        key = " ".join(entry.doc.split())
        # Classes of one module often repeat a docstring; the first keeps it, so that no two parts share it.
        if key in seen_docs or (entry.answer and entry.answer in seen_answers):
            continue
        seen_docs.add(key)
        seen_answers.add(entry.answer)
        # Related functions (json.load, json.loads) share whole paragraphs; they go where the first one went.
        blocks = [" ".join(block.split()) for block in paragraphs(entry.doc)]
        blocks = [block for block in blocks if len(block) >= SHARED_PARAGRAPH]
        part = next((part_with[block] for block in blocks if block in part_with), entry.part)
        part_with.update((block, part) for block in blocks if block not in part_with)
        yield dataclasses.replace(entry, part=part)


def documented(root: Path, modules: Container[str] | None = None) -> Iterator[Entry]:
    """Every documented public name below `root`, in the order of the sources; of all modules or only of those given."""
    for module, path in _modules(root):
        if modules is None or module in modules:
            yield from _read_module(module, path)


def paragraphs(text: str) -> list[str]:
    """What blank lines separate, without blanks at the ends of lines."""
    lines = "\n".join(line.rstrip() for line in text.split("\n")).strip("\n")
    return re.split(r"\n\n+", lines)


def content_hash(entry: Entry) -> str:
    """A hash of all that the corpus says about a name."""
    return short_hash("\n".join((entry.kind, entry.signature, entry.doc)))


def short_hash(text: str) -> str:
    """The start of `digest`: enough to tell one text from its other versions."""
    return digest(text)[:8]


def digest(value: str) -> str:
    """A hash of the text that is the same in every process; orders and splits the corpus."""
    return hashlib.sha256(value.encode("utf-8", "surrogatepass")).hexdigest()


def number(value: str, below: int) -> int:
    """A whole number in [0, below) that depends on the text alone."""
    return int(digest(value)[:12], 16) % below


def part_of(doc: str, long: bool) -> str:
    """The part that a docstring or page belongs to; `long` ones are read, not asked about."""
    if number(" ".join(doc.split()), 1000) < 1000 * HELDOUT_SHARE:
        return "heldout"
    return "calibration" if long else "train"


def _modules(root: Path) -> Iterator[tuple[str, Path]]:
    """Public modules below `root`, as (name, file), in an order that does not depend on the file system."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if _is_public(name))
        package = Path(folder).relative_to(root).parts
        for file in sorted(files):
            stem, extension = os.path.splitext(file)
            if extension != ".py" or not (_is_public(stem) or (stem == "__init__" and package)):
                continue
            name = ".".join(package if stem == "__init__" else (*package, stem))
            yield _PUBLIC_NAMES.get(name, name), Path(folder, file)


def _is_public(name: str) -> bool:
    return name.isidentifier() and not name.startswith("_") and name not in _SKIPPED


def _read_module(module: str, path: Path) -> Iterator[Entry]:
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return  # some distributions ship templates and broken samples among the sources
    if doc := _docstring(tree):
        yield Entry(module, module, "module", None, "", doc, "", part_of(doc, long=True))
    yield from _read_body(tree, module, module, "function")


def _read_body(node: ast.Module | ast.ClassDef, prefix: str, module: str, kind: str) -> Iterator[Entry]:
    for child in node.body:
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or child.name.startswith("_"):
            continue
        name = f"{prefix}.{child.name}"
        doc = _docstring(child)
        if doc:
            arguments, signature, own_kind = None, "", "class"
            if not isinstance(child, ast.ClassDef):
                (arguments, signature), own_kind = _signature(child, method=kind == "method"), kind
            part = part_of(doc, long=len(doc) >= LONG_DOCSTRING)
            yield Entry(name, module, own_kind, arguments, signature, doc, _answer(doc, child.name), part)
        if isinstance(child, ast.ClassDef):
            yield from _read_body(child, name, module, "method")


def _docstring(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    doc = ast.get_docstring(node, clean=False) or ""
    return inspect.cleandoc(doc).strip()


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef, method: bool) -> tuple[tuple, str]:
    """Parameters of a function, without the bound one and without annotations."""
    spec = node.args
    positional = [*spec.posonlyargs, *spec.args]
    static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in node.decorator_list)
    if method and not static and positional:
        (spec.posonlyargs or spec.args).pop(0)
        positional.pop(0)
    for argument in (*positional, *spec.kwonlyargs, spec.vararg, spec.kwarg):
        if argument is not None:
            argument.annotation = None
    spec.defaults = spec.defaults[-len(positional) :] if positional else []
    defaults = [None] * (len(positional) - len(spec.defaults)) + spec.defaults
    pairs = [*zip(positional, defaults, strict=True), *zip(spec.kwonlyargs, spec.kw_defaults, strict=True)]
    arguments = [(argument.arg, ast.unparse(default) if default else None) for argument, default in pairs]
    arguments += [(f"*{spec.vararg.arg}", "")] if spec.vararg else []
    arguments += [(f"**{spec.kwarg.arg}", "")] if spec.kwarg else []
    return tuple(arguments), f"({ast.unparse(spec)})"


def _answer(doc: str, name: str) -> str:
    """The first paragraphs of prose of a docstring, each on one line; empty where they do not make a good answer."""
    kept: list[str] = []
    for block in paragraphs(doc):
        lines = block.split("\n")
        if not kept and re.match(rf"(?:[\w.]*\.)?{re.escape(name)}\b\s*(\(|\[|$)", lines[0]):
            lines = lines[1:]  # docstrings often begin with a copy of the signature
        prose = " ".join(" ".join(lines).split())
        if not prose:
            continue
        structured = any(line.startswith((" ", "\t", ">>>", "-", "*", "|", "@", ":param")) for line in lines)
        if structured or "--" in prose or re.match(r"[\w ]{1,20}:(\s|$)", prose):
            break
        if sum(map(len, kept)) + len(prose) > ANSWER[1]:
            break
        kept.append(re.sub(r":\w+:`~?([^`]+)`", r"`\1`", prose).replace("``", "`"))
    while kept and kept[-1].endswith(":"):
        kept.pop()
    answer = "\n\n".join(kept)
    if len(answer) < ANSWER[0] or len(answer.split()) < 6 or not answer[0].isupper():
        return ""
    return answer if answer[-1] in ".!?`)" else answer + "."
