"""Where the rows of a data set are: in local files, by their name or by a pattern, or on the hub."""

from __future__ import annotations

import contextlib
import functools
import glob
import re
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from uniattn_cli.data.readers import EXTENSIONS, Raw, extension, read_file, reading, without_gaps
from uniattn_cli.errors import DataError
from uniattn_cli.recipe.paths import located
from uniattn_cli.recipe.schema import DatasetSpec
from uniattn_cli.run.files import content_hash

if TYPE_CHECKING:
    import datasets

DEFAULT_SPLIT = "train"


class Files:
    """Rows of local files, one file after the other.

    Args:
        paths: the files.
    """

    def __init__(self, paths: Sequence[Path]):
        self.paths = paths

    def key(self) -> list[str]:
        """Identifies the rows: names, as errors say them, and contents."""
        found = []
        for path in self.paths:
            with reading(path):
                found += [str(path), content_hash(path)]
        return found

    def rows(self, whole_text: bool) -> Iterator[Raw]:
        """The rows as `readers.read_file` gives them."""
        for path in self.paths:
            yield from read_file(path, whole_text)


class HubSet:
    """Rows of a hub data set: downloaded and kept by `datasets`, or as they come."""

    def __init__(self, spec: DatasetSpec):
        self.spec, self.split = spec, spec.split or DEFAULT_SPLIT
        self.name = f"hub data set {spec.source}" + (f" ({spec.config})" if spec.config else "")

    def key(self) -> list[str]:
        """Identifies the rows: the commit, or what `datasets` has made of it."""
        named = [self.name, self.split]
        return [*named, str(self._commit) if self.spec.streaming else self._loaded._fingerprint]

    def rows(self, whole_text: bool) -> Iterator[Raw]:
        """The rows with their numbers; `whole_text` changes nothing."""
        with self._errors():
            for number, row in enumerate(self._loaded, 1):
                yield f"{self.name}, row {number}", without_gaps(row)

    @functools.cached_property
    def _commit(self) -> str | None:
        from huggingface_hub import HfApi

        with self._errors():
            return HfApi().dataset_info(self.spec.source, timeout=10).sha

    @functools.cached_property
    def _loaded(self) -> datasets.Dataset | datasets.IterableDataset:
        import datasets

        # Whatever is pushed meanwhile, the rows are those of the commit in the key.
        more = {"streaming": True, "revision": self._commit} if self.spec.streaming else {}
        with self._errors(), _offline_at_once(self.spec.source):
            return datasets.load_dataset(self.spec.source, self.spec.config, split=self.split, **more)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        from datasets.exceptions import DatasetGenerationError

        from uniattn_cli.models.hub import SETUP_ERRORS, transport_errors

        try:
            yield
        except ValueError as error:
            # Unknown configuration or split; the message lists the known ones.
            raise DataError(f"{self.name}, split {self.split}: {_first_line(error)}") from None
        except (*transport_errors(OSError, *SETUP_ERRORS), DatasetGenerationError) as error:
            raise DataError(
                f"'{self.spec.source}' is not a file (looked for {located(self.spec.source).absolute()}), and the "
                f"{self.name} could not be loaded: {_first_line(error)}. Without a network, use a local file "
                f"({' '.join(EXTENSIONS)}) in data.*"
            ) from None


def find(spec: DatasetSpec) -> Files | HubSet:
    """Where the rows of a data set are.

    Args:
        spec: the source; not the built-in one.

    Raises:
        DataError: there is no such file, or it is of no known type.
    """
    path, paths = located(spec.source), _paths(spec)
    if not paths:
        if may_be_on_hub(spec.source):
            return HubSet(spec)
        if "://" in spec.source:
            raise DataError(f"{spec.source} is an address; download it and name the file, or give the id of a data set")
        raise DataError(f"data file {spec.source} not found (looked for {path.absolute()}); check data.* in the recipe")
    for each in paths:
        _check(each)
    if spec.split or spec.config or spec.streaming:
        raise DataError(f"{path} is a local file; `split`, `config` and `streaming` are for hub data sets, remove them")
    return Files(paths)


def origins(spec: DatasetSpec) -> set[Hashable]:
    """What a data set reads, so that two can be compared: its files, or a split of a hub data set; opens nothing."""
    return {path.resolve() for path in _paths(spec)} or {(spec.source, spec.config, spec.split or DEFAULT_SPLIT)}


def _paths(spec: DatasetSpec) -> list[Path]:
    """The local files of a data set; none if it is on the hub, or nowhere."""
    path = located(spec.source)
    # A name with brackets may be that of a file.
    return [path] if path.exists() else [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]


def may_be_on_hub(source: str) -> bool:
    """Whether it has the form of a hub id, `name` or `owner/name`; anything else can only have been meant as a path."""
    return extension(Path(source)) not in EXTENSIONS and bool(re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", source))


def _check(path: Path) -> None:
    if path.is_dir():
        raise DataError(f"{path.absolute()} is a folder; name the files in it by a pattern such as {path / '*.jsonl'}")
    if not path.is_file():
        raise DataError(f"{path.absolute()} is not a file; give one ({' '.join(EXTENSIONS)}), or a hub data set")
    if extension(path) not in EXTENSIONS:
        raise DataError(f"{path} has the unsupported extension '{path.suffix}'; supported are {' '.join(EXTENSIONS)}")


@contextlib.contextmanager
def _offline_at_once(name: str) -> Iterator[None]:
    """Lets `datasets` go straight to its cache without a network; left alone it retries for half a minute."""
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    from uniattn_cli.models.hub import SETUP_ERRORS, transport_errors

    offline = datasets.config.HF_HUB_OFFLINE
    try:
        HfApi().dataset_info(name, timeout=10)
    except transport_errors(OfflineModeIsEnabled, *SETUP_ERRORS):
        datasets.config.HF_HUB_OFFLINE = True
    except (HfHubHTTPError, HFValidationError):
        pass  # unknown or gated: load_dataset says so
    except ValueError:
        # A sign-in page or a proxy in the hub's place; it speaks no JSON.
        datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = offline


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
