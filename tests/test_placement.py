"""Where models are kept and run, planned from the free memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from uniattn_cli.models import device as devices
from uniattn_cli.models import placement as module
from uniattn_cli.models.placement import MOST_OF_MEMORY, placement

# Weights that just fit, and just not, on a GPU with 1,000 bytes free and in a computer with 10,000.
GPU, CPU = (int(free * MOST_OF_MEMORY) for free in (1000, 10000))


@pytest.mark.parametrize(
    ("offload", "device", "weights", "expected"),
    [
        ("auto", "cpu", CPU - 1, ("cpu", None, False)),
        ("auto", "cpu", CPU + 1, ("cpu", None, True)),
        ("always", "cpu", 1, ("cpu", None, False)),
        ("never", "cpu", CPU + 1, ("cpu", None, False)),
        ("disk", "cpu", 1, ("cpu", None, True)),
        ("auto", "cuda", GPU - 1, ("cuda", None, False)),
        ("auto", "cuda", GPU + 1, ("cpu", "cuda", False)),
        ("auto", "cuda", CPU + 1, ("cpu", "cuda", True)),
        ("always", "cuda", 1, ("cpu", "cuda", False)),
        ("disk", "cuda", 1, ("cpu", "cuda", True)),
        ("never", "cuda", CPU + 1, ("cuda", None, False)),
    ],
)
def test_where_a_model_is_kept_and_run(offload, device, weights, expected, monkeypatch):
    monkeypatch.setattr(module, "available_bytes", lambda device: 1000 if device.type == "cuda" else 10000)
    placed = placement(offload, weights, torch.device(device))
    assert (placed.home.type, placed.device and placed.device.type, placed.on_disk) == expected
    assert placed.whole == (expected[1:] == (None, False))


def test_layers_that_cannot_be_read_one_by_one_stay_in_memory(monkeypatch):
    monkeypatch.setattr(module, "available_bytes", lambda device: 10000)
    for offload in ("auto", "disk"):
        assert placement(offload, CPU + 1, torch.device("cpu"), separable=False).whole


def test_a_container_may_allow_less_than_the_machine_has(tmp_path, monkeypatch):
    groups = Path("/proc/self/cgroup")
    own = [line[3:] for line in groups.read_text().splitlines() if line.startswith("0::")] if groups.exists() else []
    if not own:
        pytest.skip("needs control groups of version 2")
    folder = tmp_path / own[0].lstrip("/")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.stat").write_text("anon 300\nfile 5000\n")
    monkeypatch.setattr(devices, "CGROUPS", tmp_path)
    for limit, expected in (("1000\n", 700), ("200\n", 0)):
        (folder / "memory.max").write_text(limit)
        assert devices.available_bytes(torch.device("cpu")) == expected
    (folder / "memory.max").write_text("max\n")
    assert devices.available_bytes(torch.device("cpu")) > 1000
