"""What goes to a hub: the card against the reports it is made from, the files, and every answer of the hub."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import yaml
from huggingface_hub.errors import (
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import filter_repo_objects
from tiny import FAMILIES, make_base, make_layout
from tiny_run import make_tokenizer

from uniattn_cli import push
from uniattn_cli.errors import CheckpointError, HubError, ModelError, UsageError
from uniattn_cli.evaluation.figures import read_results
from uniattn_cli.evaluation.wording import as_difference, as_value
from uniattn_cli.models.building import build_converted, save_checkpoint
from uniattn_cli.models.hub import transport_errors
from uniattn_cli.options import RunOptions
from uniattn_cli.publishing.card import ranges

# huggingface_hub's HTTP client, httpx or its successor.
TRANSPORT = transport_errors()[-1]
http = importlib.import_module(TRANSPORT.__module__.partition(".")[0])


@pytest.fixture
def finished(tiny_runs):
    """A run directory with all stages done, made from a base with a card and terms of its own."""
    return tiny_runs / "finished"


@pytest.fixture
def run(finished, tmp_path):
    """A copy that a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


class Hub:
    """What `HfApi` would do, with repositories in memory."""

    def __init__(self):
        self.repos: dict[str, dict] = {}
        self.commits: list[SimpleNamespace] = []
        self.cards: dict[str, dict] = {}
        self.failing: dict[str, Exception] = {}

    def _answer(self, name):
        if name in self.failing:
            raise self.failing[name]

    def model_info(self, name, revision=None, timeout=None):
        self._answer("model_info")
        return SimpleNamespace(card_data=SimpleNamespace(to_dict=lambda: self.cards.get(name, {})))

    def repo_info(self, repo_id, timeout=None):
        self._answer("repo_info")
        if repo_id not in self.repos:
            raise answered(404, RepositoryNotFoundError)
        return SimpleNamespace(private=self.repos[repo_id]["private"])

    def create_repo(self, repo_id, private=None):
        self._answer("create_repo")
        self.repos[repo_id] = {"private": bool(private), "main": {".gitattributes": b""}}

    def create_branch(self, repo_id, branch):
        self.repos[repo_id][branch] = dict(self.repos[repo_id]["main"])

    def list_repo_files(self, repo_id, revision=None):
        if (revision or "main") not in self.repos[repo_id]:
            raise answered(404, RevisionNotFoundError)
        return sorted(self.repos[repo_id][revision or "main"])

    def upload_folder(self, *, repo_id, folder_path, commit_message, revision=None, delete_patterns=()):
        self._answer("upload_folder")
        files = self.repos[repo_id][revision or "main"]
        for name in list(filter_repo_objects(files, allow_patterns=delete_patterns)):
            del files[name]
        files |= {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        self.commits.append(SimpleNamespace(message=commit_message, revision=revision))
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")


def answered(status, kind=HfHubHTTPError):
    request = http.Request("GET", "https://hub")
    return kind("no", response=http.Response(status, request=request))


@pytest.fixture
def hub(monkeypatch):
    found = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: found)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_token")
    return found


def metadata(card):
    return yaml.safe_load(card.split("---\n")[1])


# --- the card ---------------------------------------------------------------------------------------------------------


def test_the_card_states_what_the_reports_hold(finished):
    card = push(finished / "trained", "me/small", dry_run=True).card
    conversion = json.loads((finished / "converted" / "uniattn_report.json").read_text())
    training = json.loads((finished / "trained" / "uniattn_report.json").read_text())
    results = read_results(finished / "evaluation" / "results.json")
    # Cost and layout.
    for pair in (conversion["costs"]["parameters"], conversion["costs"]["kv_bytes"]):
        assert f"{pair['base']:,} |" in card and f"{pair['converted']:,} |" in card
    followers = [index for index, entry in enumerate(conversion["layout"]) if entry["kind"] == "softmax"]
    assert len(followers) == 4
    row = next(line for line in card.splitlines() if line.startswith("| softmax"))
    assert [cell.strip() for cell in row.split("|")][2:4] == ["4", ranges(followers)]
    # Quality: this checkpoint's own figures beside the base's, to the digit.
    own, base = results["models"]["trained"], results["models"]["base"]
    for key in ("perplexity", "response_loss"):
        assert as_value(own["quality"][key], error=True) in card and as_value(base["quality"][key], error=True) in card
        assert as_difference(own["quality"][key]) in card
    assert own["verdict"]["sentence"].removeprefix("trained") in card and "\nThis model" in card
    # Data and training.
    counts = training["data"]
    assert f"{counts['used']:,} rows of `rows.jsonl`" in card and f"{counts['supervised']:,} count in the loss" in card
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in card.splitlines() if line.startswith("|")]
    rates = {"compensation": "0.003", "all": "0.001"}
    assert [stage["name"] for stage in training["stages"]] == list(rates)
    for stage in training["stages"]:
        name = stage["name"]
        assert [name, stage["trains"], rates[name], str(stage["steps"]), f"{stage['tokens']:,}"] in rows


def test_the_metadata_name_licence_base_and_library(finished):
    result = push(finished / "trained", "me/small", base_model="owner/tiny", dry_run=True)
    found = metadata(result.card)
    assert (
        found["license"] == "other" and found["license_name"] == "tiny" and found["license_link"] == "https://x.org/t"
    )
    assert found["base_model"] == "owner/tiny" and found["library_name"] == "transformers"
    assert {"uniattn", "custom_code", "uniattn-softmax", "conversational"} <= set(found["tags"])
    assert "datasets" not in found
    assert "[tiny](https://x.org/t), as the base" in result.card and "trust_remote_code=True" in result.card
    plain = push(finished / "trained", "me/small", licence="mit", dry_run=True)
    assert metadata(plain.card)["license"] == "mit" and "base_model" not in metadata(plain.card)
    assert any("--base-model" in note for note in plain.notes)


def test_hub_data_and_a_hub_base_are_linked(run, hub):
    for stage in ("converted", "trained"):
        path = run / stage / "stage.json"
        content = json.loads(path.read_text())
        content["settings"]["model"] = {"name": "owner/base", "revision": "v2"}
        content["settings"]["data"]["train"][0] |= {"source": "owner/data", "config": "en"}
        path.write_text(json.dumps(content))
    hub.cards["owner/base"] = {"license": "apache-2.0"}
    push(run / "trained", "me/small")
    card = hub.repos["me/small"]["main"]["README.md"].decode()
    found = metadata(card)
    assert found["base_model"] == "owner/base" and found["license"] == "apache-2.0"
    assert found["datasets"] == ["owner/data"]
    assert "[owner/data](https://huggingface.co/datasets/owner/data) (en)" in card and "(revision `v2`)" in card
    # The preview asks nobody.
    hub.failing["model_info"] = AssertionError("asked the hub")
    preview = push(run / "trained", "me/small", dry_run=True)
    assert "license" not in metadata(preview.card)
    assert any("licence is unknown" in note for note in preview.notes)


def test_figures_of_other_weights_stay_out(run):
    shown = push(run / "trained", "me/small", dry_run=True)
    path = run / "trained" / "generation_config.json"
    path.write_text(path.read_text().replace("{", '{"max_length": 7,', 1))
    changed = push(run / "trained", "me/small", dry_run=True)
    assert "− base, paired" in shown.card and "− base, paired" not in changed.card
    assert "Not evaluated." in changed.card
    assert any("no figures of exactly these weights" in note for note in changed.notes)
    # The stages' own losses are there instead.
    training = json.loads((run / "trained" / "uniattn_report.json").read_text())
    assert f"{training['heldout_responses']['trained']['mean']:.4f}" in changed.card
    assert "Fit: up to" in changed.card
    path = run / "converted" / "generation_config.json"
    path.write_text(path.read_text().replace("{", '{"max_length": 7,', 1))
    again = push(run / "trained", "me/small", dry_run=True)
    assert "Fit: up to" not in again.card and any("changed since training" in note for note in again.notes)


def test_an_untrained_and_an_unrecorded_checkpoint_have_cards(run, tmp_path):
    converted = push(run / "converted", "me/small", dry_run=True).card
    assert "not post-trained" in converted and "Training:" not in converted and "− base, paired" in converted
    base = make_base(FAMILIES[0])
    save_checkpoint(build_converted(base, make_layout("mixed")), make_tokenizer(), tmp_path / "alone")
    alone = push(tmp_path / "alone", "me/small", dry_run=True)
    assert "| kv " in alone.card and "| linear " in alone.card and "Not recorded." in alone.card
    assert "A llama model" in alone.card


def test_a_card_of_ones_own_is_taken(run):
    (run / "trained" / "README.md").write_text("# Mine\n")
    result = push(run / "trained", "me/small", dry_run=True)
    assert result.card == "# Mine\n" and [name for name, _ in result.files].count("README.md") == 1


def test_the_preview_needs_no_network_and_shows_card_and_files(finished, uniattn):
    done = uniattn("push", "trained", "me/small", "--dry-run", "-C", finished, env={"HF_TOKEN": ""})
    assert done.returncode == 0, done.stderr
    assert "library_name: transformers" in done.stdout and "nothing was uploaded" in done.stdout
    for name in ("model.safetensors", "modeling_uniattn_llama.py", "LICENSE"):
        assert name in done.stdout


# --- the upload -------------------------------------------------------------------------------------------------------


def test_one_commit_holds_what_loading_needs_and_no_path_of_ours(finished, hub):
    result = push(finished / "trained", "me/small", private=True, message="First")
    repo = hub.repos["me/small"]
    assert repo["private"] and [commit.message for commit in hub.commits] == ["First"]
    assert result.url == "https://hub/me/small/commit/1"
    files = repo["main"]
    assert {name: len(content) for name, content in files.items() if name != ".gitattributes"} == dict(result.files)
    needed = {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "generation_config.json"}
    code = {"modeling_uniattn_llama.py", "configuration_uniattn.py", "layout_uniattn.py", "sharing_uniattn.py"}
    assert needed | code | {"README.md", "LICENSE"} <= set(files) and "stage.json" not in files
    for name, content in files.items():
        assert str(finished.parent).encode() not in content, name


def test_a_repository_with_files_is_changed_only_by_force(finished, hub):
    push(finished / "trained", "me/small")
    files = hub.repos["me/small"]["main"]
    files |= {"model-00001-of-00002.safetensors": b"", "old.py": b"", "notes.txt": b"keep"}
    with pytest.raises(HubError, match="already has files; use --force"):
        push(finished / "converted", "me/small")
    assert len(hub.commits) == 1
    push(finished / "converted", "me/small", options=RunOptions(force=True))
    assert "notes.txt" in files and not {"model-00001-of-00002.safetensors", "old.py"} & set(files)
    assert files["model.safetensors"] == (finished / "converted" / "model.safetensors").read_bytes()


def test_a_branch_is_made_and_the_main_one_left_alone(finished, hub):
    push(finished / "converted", "me/small")
    push(finished / "trained", "me/small", revision="trained")
    assert hub.commits[-1].revision == "trained"
    repo = hub.repos["me/small"]
    assert repo["main"]["model.safetensors"] != repo["trained"]["model.safetensors"]


def test_an_empty_repository_left_by_a_failed_upload_is_used(finished, hub):
    hub.failing["upload_folder"] = TRANSPORT("gone")
    with pytest.raises(HubError, match=r"cannot be reached .*run the same command again"):
        push(finished / "trained", "me/small")
    hub.failing.clear()
    push(finished / "trained", "me/small")
    assert "model.safetensors" in hub.repos["me/small"]["main"]


def test_a_public_repository_does_not_become_private_in_silence(finished, hub):
    hub.create_repo("me/small")
    with pytest.raises(HubError, match="exists and is public"):
        push(finished / "trained", "me/small", private=True)
    assert not hub.commits


@pytest.mark.parametrize(
    ("where", "error", "words"),
    [
        ("repo_info", answered(401), "rejected the token; run `hf auth login`"),
        ("create_repo", answered(403), "has no write access to me"),
        ("upload_folder", answered(429), "limits the rate"),
        ("upload_folder", answered(500), "HTTP status 500"),
        ("upload_folder", ValueError("Invalid metadata in README.md.\n- Error: no"), "README.md.* no; correct it"),
        ("repo_info", OfflineModeIsEnabled("off"), "HF_HUB_OFFLINE is set"),
        ("repo_info", TRANSPORT("no route"), "cannot be reached"),
    ],
)
def test_what_the_hub_refuses_is_one_line(where, error, words, finished, hub):
    hub.failing[where] = error
    with pytest.raises(HubError, match=words) as caught:
        push(finished / "trained", "me/small")
    assert "\n" not in str(caught.value) and not hub.commits


def test_without_a_token_nothing_is_tried(finished, uniattn, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(finished / "none"))
    done = uniattn("push", "trained", "me/small", "-C", finished, env={"HF_TOKEN": ""})
    assert done.returncode == 1 and done.stderr == "error: there is no hub token; run `hf auth login` or set HF_TOKEN\n"
    done = uniattn("push", "traind", "me/small", "-C", finished, env={"HF_TOKEN": ""})
    assert done.returncode == 1 and "traind" in done.stderr and "token" not in done.stderr


# --- what cannot be pushed --------------------------------------------------------------------------------------------


def test_what_is_not_a_whole_converted_checkpoint_is_refused(run, hub):
    with pytest.raises(CheckpointError, match="not a converted checkpoint"):
        push(_base_of(run), "me/small")
    with pytest.raises(ModelError, match="no such directory"):
        push(run / "nowhere", "me/small")
    damages = {
        "modeling_uniattn_llama.py": "lacks its model code",
        "layout_uniattn.py": r"lacks its model code \(layout_uniattn\.py\)",  # which the others name
        "model.safetensors": "has no weights",
        "tokenizer.json": "has no tokenizer",
    }
    for name, words in damages.items():
        folder = Path(shutil.copytree(run / "trained", run / f"without-{name}"))
        (folder / name).unlink()
        if name == "tokenizer.json":
            (folder / "tokenizer_config.json").unlink()
        with pytest.raises(CheckpointError, match=words):
            push(folder, "me/small")
    card = run / "trained" / "README.md"
    card.write_bytes("Müller".encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"README\.md is not UTF-8 text"):
        push(run / "trained", "me/small")
    card.unlink()
    path = run / "trained" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged or cut off"):
        push(run / "trained", "me/small")
    assert not hub.repos


def _base_of(run):
    return json.loads((run / "converted" / "stage.json").read_text())["settings"]["model"]["name"]


def test_a_report_of_another_layout_is_refused(run):
    path = run / "converted" / "uniattn_report.json"
    content = json.loads(path.read_text())
    content["layout"][1] = {"kind": "none"}
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="belongs to another layout"):
        push(run / "converted", "me/small", dry_run=True)


@pytest.mark.parametrize("name", ["small", "me/two words", "a/b/c", "-x/y"])
def test_a_name_that_no_hub_allows_is_refused(name, finished):
    with pytest.raises(UsageError, match="not a valid hub id"):
        push(finished / "trained", name, dry_run=True)


def test_ranges():
    assert ranges([]) == "" and ranges([1, 2, 3, 7, 9, 10]) == "1-3, 7, 9-10"
