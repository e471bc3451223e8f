"""The ready recipes that come with the package: finding, describing, copying.

They lie in `recipes/` of the project; an installed package has them in a folder of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from uniattn_cli.errors import RecipeError, StageError, UsageError, suggest
from uniattn_cli.recipe.files import write_whole
from uniattn_cli.recipe.schema import Recipe

PACKAGE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class ReadyRecipe:
    """One ready recipe.

    Attributes:
        name: by which commands know it.
        path: its file.
        purpose: the first line of its comment.
        recipe: its settings.
    """

    name: str
    path: Path
    purpose: str
    recipe: Recipe


def folder() -> Path:
    """Where the ready recipes are.

    Raises:
        RecipeError: the installation lacks them.
    """
    for place in (PACKAGE / "recipes", PACKAGE.parent / "recipes"):
        # Beside an installed package lie other packages, which may have a folder of that name.
        if any(place.glob("*.yaml")) and (place.parent == PACKAGE or (PACKAGE.parent / "pyproject.toml").is_file()):
            return place
    raise RecipeError(f"this installation has no ready recipes (looked in {PACKAGE / 'recipes'}); install it again")


def names() -> list[str]:
    """Names of all ready recipes, sorted."""
    return sorted(path.stem for path in folder().glob("*.yaml"))


def load(name: str) -> ReadyRecipe:
    """A ready recipe by name.

    Raises:
        UsageError: there is none of that name.
    """
    path = find(name)
    first = path.read_text(encoding="utf-8").splitlines()[0]
    return ReadyRecipe(name, path, first.lstrip("# ").rstrip("."), Recipe.load(path))


def find(name: str) -> Path:
    """The file of a ready recipe.

    Raises:
        UsageError: there is none of that name.
    """
    known = names()
    if name not in known:
        raise UsageError(
            f"there is no ready recipe '{name}'{suggest(name, known)}; `uniattn recipes` lists them: {', '.join(known)}"
        )
    return folder() / f"{name}.yaml"


def resolve(recipe: Path | str) -> Path:
    """The file that is meant by a path or by the name of a ready recipe; a file of that name wins.

    Raises:
        UsageError: it looks like a name, and there is neither such a recipe nor such a file.
    """
    path = Path(recipe)
    # Whatever has a folder or the extension is a path, and whoever reads it says if it is missing.
    if path.exists() or path.suffix in (".yaml", ".yml") or path.name != str(recipe):
        return path
    return find(str(recipe))


def copy(name: str, target: Path, *, force: bool = False) -> Path:
    """Copies a ready recipe, comments and all.

    Args:
        target: the new file, or a folder to put recipe.yaml in.
        force: replace a file that is there.

    Raises:
        UsageError: there is no recipe of that name.
        StageError: the file exists, or its folder does not.
    """
    source = find(name)
    target = target / "recipe.yaml" if target.is_dir() else target
    if (target.exists() or target.is_symlink()) and not force:
        raise StageError(f"{target} exists; use --force to replace it, or name another file")
    if not target.parent.is_dir():
        raise StageError(f"{target.parent}: no such directory; make it first")
    write_whole(target, source.read_text(encoding="utf-8"))
    return target
