"""Loads the compiled backends and registers them with torch's dispatcher.

A backend is a module with one function per operator of :data:`adq.ops.SCHEMAS`, same name, same
arguments. Which one serves CPU tensors can be forced by the environment variable ``ADQ_CPU_BACKEND``:
``cpp``, ``reference``, ``triton`` (needs ``TRITON_INTERPRET=1``) or ``auto``, the default: Triton's
interpreter where ``TRITON_INTERPRET=1`` asks for it, else C++, else the reference, with a warning.
"""

from __future__ import annotations

import importlib
import os
import warnings
from dataclasses import dataclass
from types import ModuleType

import torch

from adq import ops, reference

CPU_CHOICES = ("auto", "cpp", "reference", "triton")


@dataclass(frozen=True)
class Status:
    """Which implementation serves a device type, and why (or why another one does not)."""

    device: str
    backend: str
    detail: str


def _load(module: str) -> tuple[ModuleType | None, str]:
    try:
        loaded = importlib.import_module(f"adq.backends.{module}")
    except ImportError as error:
        return None, f"{type(error).__name__}: {error}"
    return loaded, loaded.describe()


def _register(backend: ModuleType, key: str) -> str:
    """Register what the backend has; returns a remark on what the reference serves in its place."""
    missing = [name for name in ops.SCHEMAS if not hasattr(backend, name)]
    native = backend.register_native() if hasattr(backend, "register_native") else set()
    for name in ops.SCHEMAS.keys() - missing - native:
        ops.LIBRARY.impl(name, getattr(backend, name), key)
    return f"; the torch reference serves {', '.join(missing)}" if missing else ""


def _cpu(cpp: tuple[ModuleType | None, str], triton: tuple[ModuleType | None, str]) -> Status:
    choice = os.environ.get("ADQ_CPU_BACKEND", "auto").lower()
    if choice not in CPU_CHOICES:
        raise ValueError(f"ADQ_CPU_BACKEND must be one of {', '.join(CPU_CHOICES)}, got {choice!r}")
    interpret = os.environ.get("TRITON_INTERPRET") == "1"
    forced = choice != "auto"
    if not forced:
        choice = "triton" if interpret and triton[0] else "cpp"
    if choice == "triton" and not interpret:
        raise RuntimeError("ADQ_CPU_BACKEND=triton needs TRITON_INTERPRET=1, set before torch is imported")
    if choice == "reference":
        return Status("cpu", "reference", "chosen by ADQ_CPU_BACKEND")
    backend, detail = {"cpp": cpp, "triton": triton}[choice]
    if backend is None:
        if forced:
            raise RuntimeError(f"ADQ_CPU_BACKEND={choice} cannot be served: {detail}")
        warnings.warn(
            f"adq: the C++ kernels are not available, the slower torch reference serves the CPU ({detail})",
            RuntimeWarning,
            stacklevel=3,
        )
        return Status("cpu", "reference", f"C++ kernels not available: {detail}")
    detail = detail if choice == "cpp" else "interpreter: TRITON_INTERPRET=1; slow"
    return Status("cpu", choice, detail + _register(backend, "CPU"))


def _cuda(triton: tuple[ModuleType | None, str]) -> Status:
    backend, detail = triton
    if backend is None:
        if torch.cuda.device_count() > 0:
            warnings.warn(
                f"adq: the Triton kernels are not available, the far slower torch reference serves the GPU ({detail})",
                RuntimeWarning,
                stacklevel=3,
            )
        return Status("cuda", "reference", f"Triton kernels not available: {detail}")
    return Status("cuda", "triton", detail + _register(backend, "CUDA"))


def _load_all() -> tuple[Status, ...]:
    cpp, triton = _load("cpu"), _load("cuda")
    return _cpu(cpp, triton), _cuda(triton)


assert reference  # registered as the default of every operator by being imported
STATUS = _load_all()
"""One :class:`Status` a device type, as ``adq info`` prints it."""
