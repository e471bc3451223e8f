"""Where a model is: in a directory, or on the hub."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uniattn_cli.errors import CheckpointError, ModelError
from uniattn_cli.models.fingerprint import fingerprint
from uniattn_cli.recipe.paths import located
from uniattn_cli.run.files import read_json

ADAPTER = "adapter_config.json"
# What the HTTP client raises for a SOCKS proxy without its package, and where certificates are not in their place.
SETUP_ERRORS = (ImportError, FileNotFoundError)


@dataclass(frozen=True)
class Source:
    """Where a model's files are.

    Attributes:
        name: what the user gave.
        path: directory that holds `config.json`.
        fingerprint: identifies the weights; the commit for hub models.
        on_hub: weights and tokenizer may still have to be downloaded.
    """

    name: str
    path: Path
    fingerprint: str
    on_hub: bool = False


def locate(name: str, revision: str | None = None) -> Source:
    """Finds a model directory or a hub model; only the configuration of the latter is downloaded.

    Raises:
        ModelError: nothing is there, it is an adapter, it is gated, or there is no network and no copy in the cache.
        CheckpointError: the adapter's configuration is damaged.
    """
    path = located(name)
    if path.is_dir():
        if (path / ADAPTER).is_file():
            raise _adapter(name, path / ADAPTER, (entry.name for entry in path.iterdir()))
        if not (path / "config.json").is_file():
            raise ModelError(f"{name} is a directory without config.json; give a Hugging Face model directory")
        return Source(name, path, fingerprint(path))
    if path.is_file():
        raise ModelError(f"{name} is a file; give the directory with config.json and the weights")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"{name}: no such directory (looked for {path.absolute()})")
    return _locate_on_hub(name, revision)


def _adapter(name: str, config: Path, files: Iterable[str]) -> ModelError:
    """What to say of an adapter, or of a whole model beside one, which transformers would apply to it unasked.

    Args:
        name: what the user gave.
        config: the adapter's configuration.
        files: names of all files beside it.
    """
    base = read_json(config, "copy the adapter again", CheckpointError).get("base_model_name_or_path") or "unknown"
    if any(file.startswith(("model", "pytorch_model")) and file.endswith((".safetensors", ".bin")) for file in files):
        return ModelError(
            f"{name} is a whole model with an adapter beside it ({ADAPTER}, for {base}), which would be applied to it "
            f"silently; remove {ADAPTER} if the adapter is merged or not wanted, else merge it first"
        )
    return ModelError(
        f"{name} is an adapter for {base}, not a whole model; merge it with peft, add the tokenizer and give that "
        f"directory: AutoPeftModelForCausalLM.from_pretrained('{name}').merge_and_unload().save_pretrained('merged')"
    )


def _locate_on_hub(name: str, revision: str | None) -> Source:
    from huggingface_hub import HfApi, constants, hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    trouble = "cannot be reached"
    files: list[str] = []
    try:
        try:
            # Downloads retry for half a minute without a network; this one call tells at once.
            info = HfApi().model_info(name, revision=revision, timeout=10)
            files = [sibling.rfilename for sibling in info.siblings or ()]
            offline = False
        except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError):
            raise
        except transport_errors(OfflineModeIsEnabled, *SETUP_ERRORS) as error:
            offline = True
            if isinstance(error, SETUP_ERRORS):
                trouble += f" ({error})"
        except HfHubHTTPError as error:
            offline, trouble = True, f"returns HTTP status {error.response.status_code}"
        except ValueError:
            # A sign-in page or a proxy in the hub's place; it speaks no JSON.
            offline, trouble = True, "gives no valid answer"
        if ADAPTER in files:
            raise _adapter(name, Path(hf_hub_download(name, ADAPTER, revision=revision)), files)
        config = Path(hf_hub_download(name, "config.json", revision=revision, local_files_only=offline))
    except GatedRepoError:
        raise ModelError(f"{name} is gated: accept its terms on its hub page, then run `hf auth login`") from None
    except RepositoryNotFoundError:
        raise ModelError(f"{name}: no such model on the hub (private ones need `hf auth login`)") from None
    except RevisionNotFoundError:
        raise ModelError(f"{name} has no revision '{revision or 'main'}'") from None
    except LocalEntryNotFoundError:
        raise ModelError(
            f"{name} is neither a directory nor in the cache {constants.HF_HUB_CACHE}, and the hub {trouble}; "
            "check the name and the network, or give the directory of the model"
        ) from None
    except EntryNotFoundError:
        raise ModelError(f"{name} has no config.json; it is not a transformers model") from None
    except HfHubHTTPError as error:
        raise ModelError(f"{name}: the hub returns HTTP status {error.response.status_code}; try again later") from None
    except HFValidationError:
        raise ModelError(f"'{name}' is neither a directory nor a valid hub id (OWNER/NAME)") from None
    if (config.parent / ADAPTER).is_file():
        raise _adapter(name, config.parent / ADAPTER, (entry.name for entry in config.parent.iterdir()))
    return Source(name, config.parent, config.parent.name, on_hub=True)


def transport_errors(*others: type[Exception]) -> tuple[type[Exception], ...]:
    """What huggingface_hub raises without a network, with others; its HTTP client was httpx and is httpx2."""
    found = [name for name in ("httpx", "httpx2") if importlib.util.find_spec(name)]
    return (*others, *(importlib.import_module(name).TransportError for name in found))


def fetch(source: Source, *, weights: bool = True) -> Path:
    """The directory with all files of a model; downloads what a hub model still lacks, with or without its weights."""
    if not source.on_hub:
        return source.path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    patterns = ["*.json", "*.model", "*.txt", "*.jinja", *(["*.safetensors"] if weights else [])]
    try:
        return Path(snapshot_download(source.name, revision=source.fingerprint, allow_patterns=patterns))
    except transport_errors(LocalEntryNotFoundError):
        raise ModelError(f"{source.name}: the download was interrupted; run the same command again") from None


def context_window(config: Any) -> int | None:
    """The longest sequence that a model supports, None if its configuration does not say."""
    return getattr(config, "max_position_embeddings", None)
