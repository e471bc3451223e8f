"""The standard library's own documentation: what every public name is for, read from source with `ast`.

Nothing is imported or run. Every docstring belongs to one of three disjoint parts, decided by a hash of its text.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import inspect
import os
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from uniattn_cli.errors import DataError

HELDOUT_SHARE = 0.2
LONG_DOCSTRING = 900  # characters from which a docstring is text to read rather than an answer
ANSWER = (40, 700)  # characters of an instruction's answer
SHARED_PARAGRAPH = 120  # characters from which a paragraph in two docstrings keeps them in one part

# Folders that hold tests, vendored or generated code, and modules whose docstrings say nothing.
_SKIPPED = {
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


@functools.lru_cache(maxsize=1)
def entries() -> tuple[Entry, ...]:
    """All documented public names of the standard library, without duplicates, sorted by name.

    Raises:
        DataError: no sources were found.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, Entry] = {}
    seen_docs: set[str] = set()
    seen_answers: set[str] = set()
    part_with: dict[str, str] = {}
    for module, path in _modules(root):
        for entry in _read_module(module, path):
            key = " ".join(entry.doc.split())
            # Classes of one module often repeat a docstring; the first keeps it, so that no two parts share it.
            if entry.name in found or key in seen_docs or (entry.answer and entry.answer in seen_answers):
                continue
            seen_docs.add(key)
            seen_answers.add(entry.answer)
            # Related functions (json.load, json.loads) share whole paragraphs; they go where the first one went.
            blocks = [" ".join(block.split()) for block in re.split(r"\n\s*\n", entry.doc)]
            blocks = [block for block in blocks if len(block) >= SHARED_PARAGRAPH]
            part = next((part_with[block] for block in blocks if block in part_with), entry.part)
            part_with.update((block, part) for block in blocks if block not in part_with)
            found[entry.name] = dataclasses.replace(entry, part=part)
    if not found:
        raise DataError(
            f"the built-in corpus needs the standard library's sources, but {root} has none; "
            "set data.train and data.text to local files"
        )
    return tuple(found[name] for name in sorted(found))


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
    paragraphs: list[str] = []
    for block in re.split(r"\n\s*\n", doc):
        lines = block.split("\n")
        if not paragraphs and re.match(rf"(?:[\w.]*\.)?{re.escape(name)}\b\s*(\(|\[|$)", lines[0]):
            lines = lines[1:]  # docstrings often begin with a copy of the signature
        prose = " ".join(" ".join(lines).split())
        if not prose:
            continue
        structured = any(line.startswith((" ", "\t", ">>>", "-", "*", "|", "@", ":param")) for line in lines)
        if structured or "--" in prose or re.match(r"[\w ]{1,20}:(\s|$)", prose):
            break
        if sum(map(len, paragraphs)) + len(prose) > ANSWER[1]:
            break
        paragraphs.append(re.sub(r":\w+:`~?([^`]+)`", r"`\1`", prose).replace("``", "`"))
    while paragraphs and paragraphs[-1].endswith(":"):
        paragraphs.pop()
    answer = "\n\n".join(paragraphs)
    if len(answer) < ANSWER[0] or len(answer.split()) < 6 or not answer[0].isupper():
        return ""
    return answer if answer[-1] in ".!?`)" else answer + "."
