"""`uniattn doctor`: what this machine supports, and how to install what is missing."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from importlib import metadata
from pathlib import Path
from types import ModuleType

from uniattn_cli import __version__
from uniattn_cli.recipe.paths import at_home
from uniattn_cli.tables import Result, Table

PACKAGES = ("torch", "transformers", "trl", "datasets", "accelerate", "huggingface_hub", "safetensors", "tokenizers")
# Extra -> (distribution, what it is for).
EXTRAS = {
    "eval": ("lm_eval", "lm-evaluation-harness tasks in `uniattn eval`"),
    "gguf": ("gguf", "base models in GGUF files"),
    "lora": ("peft", "LoRA training"),
}
DTYPES = ("float32", "bfloat16", "float16")


def examine() -> Result:
    """Looks at versions, devices, attention backends, caches, disk and extras; changes nothing."""
    tables = [_versions()]
    notes = []
    torch = _import_torch()
    if torch is None:
        notes.append("torch cannot be imported; reinstall it: pip install --force-reinstall torch")
    else:
        tables += [_devices(torch), _backends(torch)]
    tables.append(_places())
    missing = [name for name, (package, _) in EXTRAS.items() if _version(package) is None]
    notes += [f"{EXTRAS[name][1]}: pip install 'uniattn[{name}]'" for name in missing]
    if not missing:
        notes.append("No extras are missing.")
    return Result(title=f"uniattn {__version__}", tables=tables, notes=notes)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _versions() -> Table:
    rows = [["python", platform.python_version()], ["system", f"{platform.system()} {platform.machine()}"]]
    rows += [[name, _version(name) or "missing"] for name in PACKAGES]
    rows += [[f"{package} (extra: {name})", _version(package) or "missing"] for name, (package, _) in EXTRAS.items()]
    return Table("Versions", ["component", "version"], rows)


def _import_torch() -> ModuleType | None:
    try:
        import torch
    except (ImportError, OSError):
        # OSError: a shared library of the installation is missing.
        return None
    return torch


def _devices(torch: ModuleType) -> Table:
    rows = [["cpu", f"{_cpu_name()}, {torch.get_num_threads()} threads", _gigabytes(_cpu_memory())]]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, _ = torch.cuda.mem_get_info(index)
        memory = f"{_gigabytes(properties.total_memory)}, {_gigabytes(free)} free"
        rows.append([f"cuda:{index}", properties.name, memory])
    if torch.backends.mps.is_available():
        rows.append(["mps", platform.processor(), _gigabytes(torch.mps.recommended_max_memory())])
    rows = [[*row, ", ".join(name for name in DTYPES if _dtype_works(torch, row[0], name))] for row in rows]
    return Table("Devices", ["device", "name", "memory", "dtypes"], rows)


def _dtype_works(torch: ModuleType, device: str, name: str) -> bool:
    try:
        ones = torch.ones(8, 8, dtype=getattr(torch, name), device=device)
        return bool((ones @ ones)[0, 0].item() == 8)
    except (RuntimeError, TypeError):
        return False


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cpu_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        # Windows has no sysconf.
        return None


def _gigabytes(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 2**30:.1f} GiB"


def _backends(torch: ModuleType) -> Table:
    cuda = torch.cuda.is_available()
    rows = [["eager", "yes", "plain PyTorch"], ["sdpa", "yes", "PyTorch's fused attention"]]
    for name, module, package in (
        ("flash_attention_2", "flash_attn", "flash-attn"),
        ("flash_attention_3", "flash_attn_interface", "flash-attn 3"),
    ):
        installed = importlib.util.find_spec(module) is not None
        reason = "ready" if installed and cuda else "needs a CUDA device" if not cuda else f"{package} is not installed"
        rows.append([name, "yes" if installed and cuda else "no", reason])
    flex = importlib.util.find_spec("torch.nn.attention.flex_attention") is not None
    rows.append(["flex_attention", "yes" if flex else "no", "compiled on first use" if flex else "needs torch 2.5"])
    return Table("Attention backends", ["backend", "usable", "note"], rows)


def _places() -> Table:
    home = at_home(os.environ.get("HF_HOME", "~/.cache/huggingface"))
    places = {
        "this folder": Path.cwd(),
        "HF_HOME": home,
        "hub cache": at_home(os.environ.get("HF_HUB_CACHE", home / "hub")),
        "datasets cache": at_home(os.environ.get("HF_DATASETS_CACHE", home / "datasets")),
    }
    rows = [[name, str(path), _gigabytes(_free(path))] for name, path in places.items()]
    return Table("Folders", ["folder", "path", "free disk"], rows)


def _free(path: Path) -> int:
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
