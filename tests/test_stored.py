"""Rows and sequences that are kept on disk: made once for the same content and settings, and anew for any other."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import sys
import time
import zipfile
from importlib import metadata
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pytest
from test_data import CHATML, INST, make_tokenizer, turns, write

from uniattn_cli.data import sequences, splits, stored
from uniattn_cli.data.rows import LOOKED_AT, read_rows
from uniattn_cli.data.screen import Screen
from uniattn_cli.data.splits import stored_rows
from uniattn_cli.errors import DataError, DataWarning
from uniattn_cli.recipe.schema import DatasetSpec, DataSpec

ZSTD = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
CHATS = [{"messages": turns(f"What comes after {n}?", f"It is {n + 1}.")} for n in range(40)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def made(monkeypatch) -> list[str]:
    """What was made and not found: `rows` or `sequences`, one entry each time."""
    found: list[str] = []
    records, encode = splits._records, sequences._encode
    monkeypatch.setattr(splits, "_records", lambda rows: found.append("rows") or records(rows))
    monkeypatch.setattr(sequences, "_encode", lambda *args: found.append("sequences") or encode(*args))
    # A function of a test cannot be handed to other processes, and need not.
    monkeypatch.setattr(stored, "usual_workers", lambda: 1)
    return found


def prepare(path, *, tokenizer=None, holdout=0.1, seed=0, loss="responses", max_length=64, part="train", **spec):
    """Mix and sequences of a file as `train` makes them."""
    tokenizer = tokenizer or make_tokenizer()
    specs = (DatasetSpec(source=str(path), **spec),)
    mix = splits.load_mix(specs, part, holdout=holdout, seed=seed, screen=Screen(tokenizer=tokenizer))
    return mix, sequences.tokenize(mix, tokenizer, max_length=max_length, loss=loss)


def test_what_was_made_is_found_and_lies_on_disk(tmp_path, made, cache):
    path = write(tmp_path / "a.jsonl", *CHATS)
    first = prepare(path)
    assert made == ["rows", "sequences"]
    mix, again = prepare(path)
    assert made == ["rows", "sequences"]
    assert [*mix.rows] == [*first[0].rows] and again.dataset.to_dict() == first[1].dataset.to_dict()
    assert (again.digest, again.counts.to_dict()) == (first[1].digest, first[1].counts.to_dict())
    for found in (*mix.sets, again.dataset):
        assert found.cache_files and all(Path(file["filename"]).is_relative_to(cache) for file in found.cache_files)


@pytest.mark.parametrize("others", [{"seed": 5}, {"holdout": 0.4}, {"part": "heldout"}])
def test_the_choice_of_rows_makes_nothing_anew(tmp_path, made, others):
    path = write(tmp_path / "a.jsonl", *CHATS)
    prepare(path)
    _, chosen = prepare(path, **others)
    assert made == ["rows", "sequences"] and chosen.digest != prepare(path)[1].digest


@pytest.mark.parametrize(
    ("others", "again"),
    [
        ({"max_length": 44}, ["sequences"]),
        ({"loss": "all"}, ["sequences"]),
        ({"limit": 30}, ["rows", "sequences"]),
        ({"format": "messages"}, ["rows", "sequences"]),
        ({"tokenizer": make_tokenizer(INST)}, ["rows", "sequences"]),
        ({"tokenizer": make_tokenizer(CHATML, bos=True)}, ["rows", "sequences"]),
        ({"tokenizer": make_tokenizer(CHATML, eos="<s>")}, ["rows", "sequences"]),
    ],
)
def test_other_settings_make_anew(tmp_path, made, others, again):
    path = write(tmp_path / "a.jsonl", *CHATS)
    prepare(path)
    del made[:]
    prepare(path, **others)
    assert made == again


def test_other_bytes_make_anew_even_of_the_same_size_and_time(tmp_path, made):
    path = Path(write(tmp_path / "a.jsonl", *CHATS))
    before, time = prepare(path)[1].digest, path.stat().st_mtime_ns
    replaced = tmp_path / "b.jsonl"
    replaced.write_text(path.read_text().replace("It is 7.", "It is 8."))
    os.replace(replaced, path)
    os.utime(path, ns=(time, time))
    assert prepare(path)[1].digest != before and made == ["rows", "sequences"] * 2


def test_other_rules_make_anew(tmp_path, made, monkeypatch):
    path = write(tmp_path / "a.jsonl", *CHATS)
    prepare(path)
    monkeypatch.setattr(stored, "_rules", lambda: "other code")
    prepare(path)
    assert made == ["rows", "sequences"] * 2


def test_the_key_of_a_tokenizer_is_of_what_decides_its_tokens(monkeypatch):
    tokenizer = make_tokenizer()
    key = stored.tokenizer_key(tokenizer)
    tokenizer(["a", "b c"], padding=True, truncation=True, max_length=3)
    assert stored.tokenizer_key(tokenizer) == key, "of no call before"
    tokenizer.split_special_tokens = True
    assert tokenizer("<s>", add_special_tokens=False)["input_ids"] != [tokenizer.bos_token_id]
    keys = [key, stored.tokenizer_key(tokenizer)]
    version = metadata.version
    for package in ("tokenizers", "transformers"):
        monkeypatch.setattr(metadata, "version", lambda name, other=package: "9" if name == other else version(name))
        keys.append(stored.tokenizer_key(tokenizer))
    assert len(set(map(str, keys))) == 4


def test_several_processes_make_the_same_sequences(tmp_path, monkeypatch):
    tokenizer = make_tokenizer()
    texts = [{"text": f"{n}" * n} for n in range(1, 80)]
    specs = tuple(DatasetSpec(write(tmp_path / name, *rows)) for name, rows in (("a.jsonl", CHATS), ("b.jsonl", texts)))
    mix = splits.load_mix(specs, "train", holdout=0.1, seed=0)
    alone = sequences.tokenize(mix, tokenizer, max_length=64, loss="responses", workers=1)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "other")
    monkeypatch.setattr(stored, "PART", 16)
    mix = splits.load_mix(specs, "train", holdout=0.1, seed=0)
    shared = sequences.tokenize(mix, tokenizer, max_length=64, loss="responses", workers=2)
    assert len(shared.dataset.cache_files) == 4, "two files of each data set"
    assert shared.dataset.to_dict() == alone.dataset.to_dict() and shared.digest == alone.digest
    assert shared.counts.to_dict() == alone.counts.to_dict()
    assert np.array_equal(shared.counts.lengths, alone.counts.lengths)


STRANGE = {"messages": [*turns("q", "a"), {"role": "user", "content": "hide"}, {"role": "assistant", "content": "b"}]}
HIDES = CHATML.replace("{% if add", "{% if messages[-1].content == 'hide' %}?{% endif %}{% if add")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_template_that_cannot_be_masked_is_told_whichever_process_finds_it(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(stored, "PART", 16)
    mix = splits.load_mix((DatasetSpec(write(tmp_path / "a.jsonl", *CHATS, STRANGE)),), "train", holdout=1e-9, seed=0)
    assert mix.rows[0]["messages"] != STRANGE["messages"], "which would be told before others are tried"
    for _ in range(2):
        with pytest.raises(DataError, match="does not continue its own prompt in turn 4") as caught:
            sequences.tokenize(mix, make_tokenizer(HIDES), max_length=64, loss="responses", workers=workers)
        assert "\n" not in str(caught.value)


def test_a_template_of_which_nothing_can_be_masked_is_told_before_all_is_tried(tmp_path, made):
    path = write(tmp_path / "a.jsonl", *CHATS)
    with pytest.raises(DataError, match="does not continue its own prompt in turn 2"):
        prepare(path, tokenizer=make_tokenizer(CHATML.replace("{% if add", "?{% if add")))
    assert made == ["rows"]


def test_only_rows_that_are_drawn_stop_training_where_they_cannot_be_masked(tmp_path):
    path, tokenizer = write(tmp_path / "a.jsonl", STRANGE, *CHATS), make_tokenizer(HIDES)

    mixes = [splits.load_mix((DatasetSpec(path),), part, holdout=0.5, seed=0) for part in ("train", "heldout")]
    drawn, others = sorted(mixes, key=lambda mix: STRANGE["messages"] not in [row["messages"] for row in mix.rows])
    with pytest.raises(DataError, match="does not continue its own prompt in turn 4"):
        sequences.tokenize(drawn, tokenizer, max_length=64, loss="responses")
    found = sequences.tokenize(others, tokenizer, max_length=64, loss="responses")
    assert found.counts.used == len(others.rows) > 5
    plain = sequences.tokenize(others, make_tokenizer(), max_length=64, loss="responses")
    assert found.dataset.to_dict() == plain.dataset.to_dict() and found.digest == plain.digest


def test_a_cache_that_cannot_be_written_to_is_told_and_done_without(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", *CHATS)
    (tmp_path / "file").touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    with pytest.warns(DataWarning, match=r"file/cache/uniattn cannot be written to, .*; set HF_DATASETS_CACHE"):
        _, found = prepare(path)
    assert found.counts.rows > 20


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path, monkeypatch, cache):
    path = write(tmp_path / "a.jsonl", *CHATS)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(datasets.arrow_writer.ArrowWriter, "finalize", full)
        with pytest.raises(DataError, match="No space left on device; make room there"):
            prepare(path)
    assert not [*cache.rglob("*.arrow"), *cache.rglob("*.incomplete")]
    assert prepare(path)[1].counts.rows > 20
    # All that another process hands over of its error is text.
    error = datasets.exceptions.DatasetGenerationError("…")
    error.__cause__ = RuntimeError('Traceback …\nOSError: [Errno 28] No space left on device\n"""')
    assert "No space left on device" in str(stored._in_words(error, cache))


def test_the_same_is_said_of_rows_whether_they_are_read_or_found(tmp_path):
    bad = [{"messages": None}, {"messages": []}, {"text": "x"}, [1]]
    path = write(tmp_path / "a.jsonl", *bad, *({**row, "stage": 3} for row in CHATS), {**CHATS[0], "stars": 5})
    spec, settings, said = DatasetSpec(source=path), DataSpec(max_bad_rows=0.1), []
    for read in (
        lambda screen: [*read_rows(spec, screen=screen)],
        *[lambda screen: stored_rows(spec, "train", screen)] * 2,
    ):
        told: list[str] = []
        read(Screen(settings, make_tokenizer(), told.append))
        said.append(told)
    assert said[0] == said[1] == said[2]
    left_out, unused = said[0]
    assert "4 of 45 rows cannot be used" in left_out and "line 3" in left_out and "line 4" not in left_out
    assert "column stage in 40 of 45 rows; column stars in 1 of 45 rows: not used" in unused
    # A share that is given later counts for what was made before.
    with pytest.raises(DataError, match=r"4 of 45 rows .* \(8\.9%, data\.max_bad_rows allows 1\.0%\)"):
        stored_rows(spec, "train", Screen(DataSpec(), make_tokenizer()))


# Where rows come from


def compressed(path: Path, ending: str, text: str) -> None:
    if ending == "gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("rows", text)


@pytest.mark.parametrize("ending", ["gz", "zip"])
def test_compressed_files_are_read_as_the_others(tmp_path, ending):
    lines = "".join(json.dumps(row) + "\n" for row in CHATS)
    compressed(tmp_path / f"a.jsonl.{ending}", ending, lines)
    write(tmp_path / "a.jsonl", *CHATS)
    plain, packed = (prepare(tmp_path / name)[0].rows for name in ("a.jsonl", f"a.jsonl.{ending}"))
    assert [*plain] == [*packed]
    compressed(tmp_path / f"t.txt.{ending}", ending, "One\n\nTwo")
    assert sorted(prepare(tmp_path / f"t.txt.{ending}", holdout=1e-9)[0].rows["text"]) == ["One", "Two"]
    (tmp_path / f"b.jsonl.{ending}").write_text(lines)
    with pytest.raises(DataError, match=rf"b\.jsonl\.{ending}"):
        prepare(tmp_path / f"b.jsonl.{ending}")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines.encode())[:90])
    with pytest.raises(DataError, match=r"c\.jsonl\.gz is damaged"):
        prepare(tmp_path / "c.jsonl.gz")


def test_a_zip_is_read_where_it_holds_one_file(tmp_path):
    path, lines = tmp_path / "a.jsonl.zip", "".join(json.dumps(row) + "\n" for row in CHATS)

    def packed(**members: str) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)

    packed(**{"rows/": "", "__MACOSX/rows/._a.jsonl": "?", "rows/a.jsonl": lines})
    assert len(prepare(path, holdout=1e-9)[0].rows) == len(CHATS)
    for number, members in ((2, {"a.jsonl": lines, "b.jsonl": lines}), (0, {}), (0, {"rows/": ""})):
        packed(**members)
        with pytest.raises(DataError, match=rf"a\.jsonl\.zip holds {number} files .*a pattern such as rows/\*\.jsonl"):
            prepare(path)
    # The flag of encryption and the method, before the file and in the directory.
    for place, value, said in ((6, 1, r"is encrypted"), (8, 9, r"cannot be unpacked here \(.*not supported\)")):
        packed(**{"a.jsonl": lines})
        whole = bytearray(path.read_bytes())
        whole[place] = whole[whole.rindex(b"PK\x01\x02") + place + 2] = value
        path.write_bytes(whole)
        with pytest.raises(DataError, match=rf"a\.jsonl\.zip {said}; unpack it"):
            prepare(path)


def test_a_zst_file_needs_a_package_that_notices_where_it_is_cut_off(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl.zst"
    path.touch()
    monkeypatch.setitem(sys.modules, ZSTD, None)
    with pytest.raises(DataError, match=r"a\.jsonl\.zst needs .*`pip install backports\.zstd`"):
        prepare(path)


def test_a_zst_file_is_read_as_a_whole_or_not_at_all(tmp_path):
    zstd = pytest.importorskip(ZSTD)
    path, lines = tmp_path / "a.jsonl.zst", [f"{json.dumps(row)}\n".encode() for row in CHATS]
    content = zstd.compress(b"".join(lines[:20])) + zstd.compress(b"".join(lines[20:]))
    path.write_bytes(content)
    assert len(prepare(path, holdout=1e-9)[0].rows) == len(CHATS)
    middle = len(content) // 2
    for damaged in (content[:-9], content[:middle] + b"????" + content[middle + 4 :], b"".join(lines)):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"a\.jsonl\.zst is damaged or not compressed as its name says"):
            prepare(path)


def test_a_pattern_names_all_its_files_and_a_file_with_brackets_itself(tmp_path):
    for number in range(3):
        write(tmp_path / f"part-{number}.jsonl", *CHATS[number::3])
    mix, _ = prepare(tmp_path / "part-*.jsonl", holdout=1e-9)
    assert sorted(row["messages"][0]["content"] for row in mix.rows) == sorted(
        row["messages"][0]["content"] for row in CHATS
    )
    write(tmp_path / "part-1.jsonl", *CHATS[1::3], {"messages": None})
    told: list[str] = []
    spec = DatasetSpec(source=str(tmp_path / "part-*.jsonl"))
    with pytest.raises(DataError, match=r"1 of 41 rows .*; the first: .*/part-1\.jsonl, line 14"):
        splits.load_mix((spec,), "train", holdout=0.1, seed=0, screen=Screen(tell=told.append))
    write(tmp_path / "[part-0].jsonl", CHATS[0])
    assert len(prepare(tmp_path / "[part-0].jsonl", holdout=1e-9)[0].rows) == 1
    with pytest.raises(DataError, match=r"none-\*\.jsonl not found"):
        prepare(tmp_path / "none-*.jsonl")
    (tmp_path / "part-x.md").touch()
    with pytest.raises(DataError, match=r"part-x\.md has the unsupported extension '\.md'"):
        prepare(tmp_path / "part-*")


def test_rows_of_the_hub_may_be_read_as_they_come(monkeypatch, made):
    read: list[int] = []

    def rows():
        for number in range(1000):
            read.append(number)
            yield CHATS[number % 40]

    def load_dataset(*_, streaming: bool = False, revision: str | None = None, **__):
        assert streaming and revision == Api.commit, "rows of the commit that the key names, whatever comes meanwhile"
        return datasets.IterableDataset.from_generator(rows)

    class Api:
        commit = "a"

        def dataset_info(self, *_, **__):
            return huggingface_hub.hf_api.DatasetInfo(id="owner/name", sha=self.commit, private=False, gated=False,
                disabled=False, downloads=0, likes=0, tags=[])  # fmt: skip

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    for commit, made_so_far in (("a", 1), ("a", 1), ("b", 2)):
        monkeypatch.setattr(Api, "commit", commit)
        mix, _ = prepare("owner/name", holdout=1e-9, limit=12, streaming=True)
        assert len(mix.rows) == 12 and made.count("rows") == made_so_far
    assert len(read) <= 2 * LOOKED_AT, "no more than the format is decided by, which is more than the limit asks for"


def test_arguments_of_calls_are_kept_to_the_last_digit(tmp_path):
    arguments = {"x": 0.1234567890123456789, "n": 10**30, "small": 1e-12, "none": None, "list": [1, "a"]}
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]}
    spec = DatasetSpec(write(tmp_path / "a.jsonl", row))
    assert splits.load_mix((spec,), "train", holdout=1e-9, seed=0).rows[0] == row


# Several processes


def test_of_processes_that_ask_at_the_same_time_one_makes_the_rows(tmp_path, cache):
    path, log = write(tmp_path / "a.jsonl", *CHATS), tmp_path / "log"
    records = splits._records

    def ask(number: int) -> None:
        def noted(rows):
            with log.open("a") as file:
                file.write(f"{number}\n")
            time.sleep(0.3)
            yield from records(rows)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(splits, "_records", noted)
            mix = splits.load_mix((DatasetSpec(source=path),), "train", holdout=0.1, seed=0)
        os._exit(0 if len(mix.rows) > 20 else 1)

    started = [multiprocessing.get_context("fork").Process(target=ask, args=(number,)) for number in range(3)]
    for each in started:
        each.start()
    for each in started:
        each.join(60)
    assert [each.exitcode for each in started] == [0, 0, 0] and len(log.read_text().splitlines()) == 1
