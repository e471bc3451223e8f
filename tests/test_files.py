"""Files of a run: written as a whole, and checked when they are read."""

from __future__ import annotations

import math
import os
import stat
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from uniattn_cli.errors import CheckpointError
from uniattn_cli.recipe.schema import Recipe
from uniattn_cli.run.directory import RunDir
from uniattn_cli.run.files import read_json, read_lines, write_json


def test_what_cannot_be_written_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "known.json"
    write_json(path, {"text": "ä"})
    assert "ä" in path.read_text(encoding="utf-8") and read_json(path, "") == {"text": "ä"}
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"value": math.nan})

    def fail(self: Path, text: str, **options: str) -> None:
        self.write_bytes(text.encode()[:3])
        raise OSError("the disk is full")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match="disk is full"):
        write_json(path, {"text": "another"})
    assert read_json(path, "") == {"text": "ä"} and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, r"known\.json is missing; mend it"),
        (b'{"cut', r"known\.json is damaged \(Unterminated.*\); mend it"),
        (b'"\xff"', r"known\.json is damaged \(.*can't decode.*\); mend it"),
        (b"[1]", r"known\.json is damaged \(a list, not an object\); mend it"),
    ],
)
def test_what_cannot_be_read_is_told_in_one_line(content, words, tmp_path):
    path = tmp_path / "known.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=words):
        read_json(path, "mend it", CheckpointError)


def test_a_line_that_is_no_object_is_left_out(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n[]\n5\n{"\xfc": 3}\n' + b"[" * 100_000 + b'\n{"step": 2}\n{"st')
    assert read_lines(path) == [{"step": 1}, {"step": 2}]


def test_an_infinite_setting_can_be_recorded(tmp_path):
    recipe = Recipe.from_tree({"model": {"name": "m"}}, "recipe.yaml", ["train.max_rise=.inf"])
    run = RunDir(tmp_path)
    with run.write("convert", recipe, {}):
        pass
    assert run.record("convert")["settings"]["train"]["max_rise"] == math.inf


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_weights_have_the_permissions_that_the_user_wants(umask, tmp_path):
    run, before = RunDir(tmp_path), os.umask(umask)
    try:
        with run.write("convert", None, {}) as folder:
            (folder / "deep").mkdir()
            for path in (folder / "model.safetensors", folder / "deep" / "model.safetensors"):
                save_file({"x": np.zeros(1)}, path)
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in run.output("convert").rglob("*") if path.is_file()}
    assert modes == {0o666 & ~umask}
