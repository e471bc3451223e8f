"""`uniattn push`: a converted checkpoint and its model card to the hub."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from uniattn_cli.errors import CheckpointError, HubError, UsageError
from uniattn_cli.models.building import TOKENIZER_FILES
from uniattn_cli.models.hub import locate, transport_errors
from uniattn_cli.models.loading import load_config
from uniattn_cli.models.own_code import check_own_code
from uniattn_cli.models.weight_files import check_weight_files
from uniattn_cli.options import RunOptions
from uniattn_cli.publishing.card import model_card
from uniattn_cli.publishing.facts import CARD, Facts, gather
from uniattn_cli.run.directory import STAGE_FILE
from uniattn_cli.tables import Result, Table

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# `stage.json` holds the user's own paths; the card states what others need of it.
PRIVATE = (STAGE_FILE,)
TERMS = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
# What a new checkpoint replaces even where its own files have other names.
REPLACED = ["*.safetensors", "*.safetensors.index.json", "*.py"]


@dataclass(frozen=True)
class Push(Result):
    """Result of `push`.

    Attributes:
        repo_id: OWNER/NAME.
        url: of the last commit; None for a dry run.
        files: names in the repository and their bytes, the card first.
        card: text of the model card, which a dry run shows.
    """

    repo_id: str
    url: str | None
    files: list[tuple[str, int]]
    card: str


def push(
    directory: Path | str,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    base_model: str | None = None,
    licence: str | None = None,
    dry_run: bool = False,
    options: RunOptions = RunOptions(),
) -> Push:
    """Uploads a converted checkpoint with a model card; creates the repository if it is missing.

    Args:
        directory: the checkpoint, such as `trained`. A README.md in it replaces the card.
        repo_id: OWNER/NAME.
        private: make the repository private.
        revision: branch, created if it is missing; None is the main one.
        message: of the commit.
        base_model: hub id of the base, where the recipe names a local directory.
        licence: identifier of the licence, if the base's own card has none.
        dry_run: only report what would be uploaded; needs no network.
        options: `force` adds a commit to a repository that already has files.

    Raises:
        ModelError: there is no model in the directory.
        CheckpointError: it is not a converted checkpoint, or incomplete.
        StageError: its evaluation is damaged, or of another version of this tool.
        HubError: no token, no network, or the hub rejects the upload.
        UsageError: a name that the hub does not allow.
    """
    folder = Path(directory)
    for name in filter(None, (repo_id, base_model)):
        _check_name(name)
    load_config(locate(str(folder.absolute())), converted=True)  # a wrong directory is told before a missing token
    if not dry_run:
        _check_token()
    facts = gather(folder, base_model=base_model, licence=licence, online=not dry_run)
    files = _files(facts)
    own = files.pop(CARD, None)
    card = _own_card(own) if own else model_card(facts, repo_id)
    sizes = [(CARD, len(card.encode())), *((name, path.stat().st_size) for name, path in files.items())]
    total = sum(size for _, size in sizes)
    notes = list(facts.notes)
    if own:
        notes.append(f"the card is {own}")
    elif not facts.base.licence:
        notes.append("the base's licence is unknown; set it with --license ID")
    if not own and facts.base.hub_id is None:
        notes.append("the base is a local directory; give --base-model OWNER/NAME to name it in the card")
    table = Table(
        f"{len(sizes)} files, {_bytes(total)}", ["file", "size"], [[name, _bytes(size)] for name, size in sizes]
    )
    if dry_run:
        notes.append("dry run: nothing was uploaded")
        title = f"{CARD} of {repo_id}"
        return Push(repo_id, None, sizes, card, title=title, picture=card, tables=[table], notes=notes)
    options.progress.note(f"uploading {len(sizes)} files, {_bytes(total)}, to {repo_id}")
    message = message or f"{'Update' if options.force else 'Add'} the checkpoint converted by uniattn"
    url = _upload(repo_id, card, files, message, private=private, revision=revision, force=options.force)
    notes.append(f'load it with AutoModelForCausalLM.from_pretrained("{repo_id}", trust_remote_code=True)')
    return Push(repo_id, url, sizes, card, title=f"{folder} is at {url}", tables=[table], notes=notes)


def _own_card(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text ({error}); save it as UTF-8, or remove it") from None


def _check_name(name: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
        if "/" not in name:
            raise HFValidationError
    except HFValidationError:
        raise UsageError(f"'{name}' is not a valid hub id; give OWNER/NAME") from None


def _check_token() -> None:
    from huggingface_hub import get_token

    if get_token() is None:
        raise HubError("there is no hub token; run `hf auth login` or set HF_TOKEN")


def _files(facts: Facts) -> dict[str, Path]:
    """What is uploaded: name in the repository and place here; also checks that nothing is missing.

    Raises:
        CheckpointError: weights, model code or tokenizer are missing or cut off.
    """
    source = facts.source
    if not any((source.path / name).is_file() for name in TOKENIZER_FILES):
        raise CheckpointError(f"{source.name} has no tokenizer; copy tokenizer.json and tokenizer_config.json into it")
    check_own_code(source.path)
    weights = {path.name for path in check_weight_files(source.path)}
    found = {
        path.name: path
        for path in sorted(source.path.iterdir())
        if path.is_file() and not path.name.startswith(".") and path.name not in PRIVATE
    }
    stray = [name for name in found if name.endswith(".safetensors") and name not in weights]
    for name in stray:
        del found[name]
    if facts.base.folder is not None:
        terms = [path for pattern in TERMS for path in sorted(facts.base.folder.glob(pattern)) if path.is_file()]
        found = {path.name: path for path in terms} | found
    return found


def _bytes(count: int) -> str:
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} B"


def _upload(
    repo_id: str, card: str, files: dict[str, Path], message: str, *, private: bool, revision: str | None, force: bool
) -> str:
    """Makes repository and branch where they are missing, and uploads; returns the address of the last commit."""
    from huggingface_hub import HfApi

    api = HfApi()
    # One folder of links, because the card and the base's licence do not lie beside the weights.
    with _hub_errors(repo_id), tempfile.TemporaryDirectory() as folder:
        _prepare(api, repo_id, private=private, revision=revision, force=force)
        (Path(folder) / CARD).write_text(card, encoding="utf-8")
        for name, path in files.items():
            (Path(folder) / name).symlink_to(path.absolute())
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=message,
            revision=revision,
            delete_patterns=REPLACED,
        )
    return commit.commit_url


def _prepare(api: HfApi, repo_id: str, *, private: bool, revision: str | None, force: bool) -> None:
    """Makes repository and branch where they are missing.

    Raises:
        HubError: the repository holds files and may not be changed, or is public and should not be.
    """
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = api.repo_info(repo_id, timeout=10)
    except RepositoryNotFoundError:
        api.create_repo(repo_id, private=private)
    else:
        if private and not info.private:
            raise HubError(f"{repo_id} exists and is public; make it private on its page, or remove --private")
    try:
        present = api.list_repo_files(repo_id, revision=revision)
    except RevisionNotFoundError:
        # A new branch begins with the files of the main one, which stay there.
        api.create_branch(repo_id, branch=str(revision))
        return
    if not force and any(name != ".gitattributes" for name in present):
        raise HubError(f"{repo_id} already has files; use --force to add a commit to it")


@contextlib.contextmanager
def _hub_errors(repo_id: str) -> Iterator[None]:
    """What the hub answers, as one line with the next step."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    owner = repo_id.partition("/")[0]
    reasons = {
        401: "the hub rejected the token; run `hf auth login` again",
        403: f"the token has no write access to {owner}; use one that has, or another owner",
        404: f"{owner} does not exist on the hub, or the token has no access to it",
        409: "the repository was changed at the same time; run the same command again",
        413: "the hub rejected the upload as too large; request more storage",
        429: "the hub limits the rate of requests; try again later",
    }
    try:
        yield
    except OfflineModeIsEnabled:
        raise HubError(f"{repo_id}: HF_HUB_OFFLINE is set; unset it to upload") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        reason = reasons.get(status, f"the hub returns HTTP status {status}; try again later")
        raise HubError(f"{repo_id}: {reason}") from None
    except transport_errors() as error:
        raise HubError(
            f"{repo_id}: the hub cannot be reached ({type(error).__name__}); check the network and "
            "run the same command again"
        ) from None
    except ValueError as error:
        # The hub reads a card of the user's own before anything is uploaded.
        if CARD not in str(error):
            raise
        reason = " ".join(str(error).split())
        raise HubError(f"{repo_id}: {reason}; correct it and run the same command again") from None
