"""What a figure depends on: the machine, the versions, the commit."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import adq
from adq.artifact import installed_version


def environment(device: torch.device) -> dict[str, Any]:
    """Device, CPU model, threads, versions, commit and date, ready for JSON."""
    backend = next(status for status in adq.backends.STATUS if status.device == device.type)
    return {
        "device": device_name(device),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "backend": f"{backend.backend} ({backend.detail})",
        "adq": installed_version(),
        "commit": commit(),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def cpu_model() -> str:
    """The CPU's name as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """Commit of the checkout that adq is imported from, ``-dirty`` with changes in it; None if it is installed."""
    folder = Path(adq.__file__).parent
    if _git(folder, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    head = _git(folder, "rev-parse", "HEAD")
    dirty = _git(folder, "status", "--porcelain", "--untracked-files=no", ".", "../csrc", "../kernels")
    return f"{head}-dirty" if dirty else head


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()


def slug(device: torch.device) -> str:
    """A folder name for the results of a device: ``amd-epyc-2-threads``, ``nvidia-h200``."""
    name = device_name(device)
    if device.type == "cpu":
        name = f"{name} {torch.get_num_threads()} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
