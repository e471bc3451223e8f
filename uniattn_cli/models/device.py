"""The device that models run on: its name, its memory, and the stopwatch for everything that is timed on it."""

from __future__ import annotations

import contextlib
import gc
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

Name = TypeVar("Name")
Result = TypeVar("Result")
# Where Linux says what a group of processes may use.
CGROUPS = Path("/sys/fs/cgroup")
# The first call compiles, the next ones may still set a library up.
CALLS_BEFORE_CAPTURE = 3


def describe_device(device: torch.device) -> str:
    """The device as a reader knows it, such as `cuda (NVIDIA H100)` or `cpu (x86_64)`."""
    import torch

    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"{device.type} ({platform.processor() or platform.machine()})"


def available_bytes(device: torch.device) -> int:
    """Memory that can still be taken on a device; for MPS that of the machine, which it shares.

    Containers and batch systems may allow less than the machine has.
    """
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return min([psutil.virtual_memory().available, *_allowed(CGROUPS)])


def _allowed(root: Path) -> Iterator[int]:
    """Bytes that each control group (version 2) of this process still allows; pages of files do not count."""
    with contextlib.suppress(OSError, StopIteration):
        own = next(line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
        folder = root / own.lstrip("/")
        for group in (folder, *folder.parents):
            with contextlib.suppress(OSError, ValueError):
                counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                yield max(int((group / "memory.max").read_text()) - int(counts["anon"]), 0)
            if group == root:
                break


def release_memory(device: torch.device) -> None:
    """Gives memory of dropped tensors back to the device."""
    gc.collect()
    if device.type == "cuda":
        import torch

        torch.cuda.empty_cache()


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says, in one of the ways in which devices do, that memory is short; does not load PyTorch."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    # The CPU allocator and MPS raise a plain RuntimeError.
    words = ("allocate memory", "not enough memory", "out of memory")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def clock(device: torch.device) -> float:
    """Seconds, after everything queued on the device is done; only differences mean anything."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


@contextlib.contextmanager
def timed(times: list[float], device: torch.device) -> Iterator[None]:
    """Appends the seconds that the block took, work queued on the device included."""
    started = clock(device)
    yield
    times.append(clock(device) - started)


@contextlib.contextmanager
def coarse_products() -> Iterator[None]:
    """Multiplies float32 matrices with ten bits of mantissa where that is faster: plenty where things are compared."""
    import torch

    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


@dataclass(frozen=True)
class Series:
    """Seconds of repeated measurements.

    Attributes:
        values: in the order in which they were taken.
    """

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def spread(self) -> float:
        """Largest minus smallest, relative to the median."""
        return (max(self.values) - min(self.values)) / self.median


def take_turns(
    calls: Mapping[Name, Callable[[], Result]], rounds: int, advance: Callable[[int], None] = lambda steps: None
) -> dict[Name, list[Result]]:
    """Calls everything once in each round, so that a slow moment of the machine hits them all.

    Args:
        calls: what is compared, by name; each returns what it measured.
        rounds: how often.
        advance: told the number of finished calls.

    Returns:
        The results by name, in the order of the rounds.
    """
    results: dict[Name, list[Result]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            results[name].append(call())
            advance(1)
    return results


def captured(calls: Sequence[Callable[[], object]]) -> Callable[[], float]:
    """A function that replays calls from a CUDA graph and returns the milliseconds of one on average.

    Nothing of the host is in the time, as in a decoding step that is replayed from a graph.
    """
    import torch

    for _ in range(CALLS_BEFORE_CAPTURE):
        calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def replay(calls: Sequence[Callable[[], object]] = calls) -> float:
        # Holding on to `calls` keeps the memory that the graph works on.
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / len(calls)

    return replay
