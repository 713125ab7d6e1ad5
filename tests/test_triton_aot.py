"""The Triton kernels compiled ahead of time, with no GPU: what the compiler made of them, kernel by kernel.

Every launch of the product is compiled by ``tests/aot.py``, in a process of its own, because this one runs
Triton's interpreter. Nothing here has run on a GPU: the figures are the compiler's.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")

TARGETS = ("sm_90", "sm_80", "gfx942")
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

BUDGET = [
    # kernel, operation, sizes up to; registers and instructions per element: NVIDIA, AMD
    ("codebook_kernel", "lookup", 2, (40, 12.5), (32, 18)),
    ("codebook_kernel", "lookup", 4, (48, 22), (32, 23)),
    ("codebook_kernel", "lookup", 8, (72, 36), (56, 39)),
    ("codebook_kernel", "lookup", 16, (96, 76), (64, 65)),
    ("codebook_kernel", "lookup", 32, (56, 49), (40, 49)),
    ("codebook_kernel", "lookup", 256, (64, 71), (40, 69)),
    ("codebook_kernel", "lookup with codes", 2, (40, 17), (40, 18)),
    ("codebook_kernel", "lookup with codes", 4, (48, 26), (40, 25)),
    ("codebook_kernel", "lookup with codes", 8, (72, 45), (64, 53)),
    ("codebook_kernel", "lookup with codes", 16, (112, 93), (80, 141)),
    ("codebook_kernel", "lookup with codes", 32, (56, 47), (40, 49)),
    ("codebook_kernel", "lookup with codes", 256, (56, 68), (40, 71)),
    ("codebook_kernel", "statistics", 2, (40, 17), (40, 18)),
    ("codebook_kernel", "statistics", 4, (48, 37), (40, 34)),
    ("codebook_kernel", "statistics", 8, (72, 56), (72, 60)),
    ("codebook_kernel", "statistics", 16, (144, 107), (96, 129)),
    ("codebook_kernel", "both", 2, (64, 30), (48, 26)),
    ("codebook_kernel", "both", 4, (72, 51), (48, 44)),
    ("codebook_kernel", "both", 8, (104, 90), (80, 74)),
    ("codebook_kernel", "both", 16, (176, 164), (96, 140)),
    ("codebook_statistics_kernel", "statistics", 256, (208, 688), (120, 343)),
    ("codebook_reduce_kernel", None, 256, (40, 212), (40, 280)),
    ("threshold_kernel", "forward", 1, (40, 15), (32, 20)),
    ("threshold_kernel", "forward", 3, (40, 20), (32, 25)),
    ("threshold_kernel", "forward", 7, (64, 42), (48, 41)),
    ("threshold_kernel", "forward", 15, (56, 73), (72, 66)),
    ("threshold_kernel", "forward", 31, (56, 49), (48, 49)),
    ("threshold_kernel", "forward", 255, (56, 71), (40, 71)),
    ("threshold_kernel", "uniform", 255, (48, 31), (32, 31)),
    ("threshold_table_kernel", None, 255, (32, 53), (8, 57)),
    ("threshold_backward_kernel", "backward", 1, (56, 44), (56, 44)),
    ("threshold_backward_kernel", "backward", 3, (72, 60), (72, 56)),
    ("threshold_backward_kernel", "backward", 7, (96, 105), (144, 104)),
    ("threshold_backward_kernel", "backward", 15, (144, 199), (248, 189)),
    ("threshold_backward_kernel", "uniform backward", 255, (64, 58), (48, 54)),
    ("threshold_backward_search_kernel", "backward", 255, (255, 979), (104, 399)),
    ("threshold_reduce_kernel", None, 255, (32, 122), (24, 186)),
    ("foreach_quantize_kernel", None, 4, (104, 31), (128, 32)),
    ("foreach_quantize_kernel", None, 8, (128, 48), (128, 48)),
    ("foreach_quantize_kernel", None, 16, (136, 82), (128, 82)),
    ("foreach_quantize_kernel", None, 256, (128, 117), (136, 121)),
    ("foreach_statistics_kernel", None, 4, (128, 43), (256, 43)),
    ("foreach_statistics_kernel", None, 8, (128, 68), (256, 68)),
    ("foreach_statistics_kernel", None, 16, (168, 145), (256, 145)),
    ("foreach_statistics_kernel", None, 256, (168, 152), (256, 152)),
    ("foreach_update_kernel", "foreach step", 256, (255, 184), (352, 264)),
    ("foreach_update_kernel", "foreach step, quantize", 256, (255, 119), (352, 124)),
    ("pack_kernel", "pack", 8, (48, 11), (56, 12)),
    ("unpack_kernel", "unpack", 8, (40, 6.5), (56, 7)),
]
"""Highest of the figures of Triton 3.6 and 3.9 over the dtypes, and 5 % more. Instructions are those of the
shortest way around the main loop, or through a program without one, for the elements of one thread."""

PRODUCT_KERNELS = ("codebook_statistics_kernel", "threshold_backward_search_kernel", "foreach_statistics_kernel")
"""Kernels that multiply matrices, so that they fuse products and sums; no output bit-exact to the reference."""


@pytest.fixture(scope="module", params=TARGETS)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """One dictionary of figures a compiled kernel, for one target."""
    if request.param.startswith("sm") and not all((NVIDIA_TOOLS / tool).exists() for tool in ("ptxas", "cuobjdump")):
        pytest.skip(f"this build of Triton bundles no ptxas and cuobjdump in {NVIDIA_TOOLS}")
    if request.param.startswith("gfx") and not (NVIDIA_TOOLS.parents[1] / "amd").exists():
        pytest.skip("this build of Triton has no AMD backend")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "ADQ_CPU_BACKEND": "reference"}
    command = [sys.executable, str(Path(__file__).with_name("aot.py")), request.param]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr[-4000:]
    return [{"target": request.param, **json.loads(line)} for line in run.stdout.splitlines()]


def name(row: dict) -> str:
    return f"{row['target']} {row['kernel']} ({row['operation']} {row['dtype']} {row['size']})"


def test_every_kernel_is_compiled(compiled: list[dict]) -> None:
    package = importlib.import_module("adq.kernels")
    modules = [
        importlib.import_module(f"adq.kernels.{module.name}") for module in pkgutil.iter_modules(package.__path__)
    ]
    written = {attribute for module in modules for attribute in vars(module) if attribute.endswith("_kernel")}
    assert written == {row["kernel"] for row in compiled}


def test_nothing_spills(compiled: list[dict]) -> None:
    failures = [f"{name(row)}: {row['spills']} bytes of local memory" for row in compiled if row["spills"]]
    assert not failures, "\n".join(failures)


def test_full_tiles_move_16_bytes_at_once(compiled: list[dict]) -> None:
    wide = {  # kernel: wide loads, wide stores
        "codebook_kernel": lambda row: (1, int(row["operation"] != "statistics")),
        "threshold_kernel": lambda row: (1, 1),
        "threshold_backward_kernel": lambda row: (2, 1),
        "pack_kernel": lambda row: (1, int(row["size"] == 8)),
        "unpack_kernel": lambda row: (int(row["size"] == 8), 1),
    }
    failures = [
        f"{name(row)}: {row['wide_loads']} wide loads, {row['wide_stores']} wide stores, expected {expected}"
        for row in compiled
        if row["kernel"] in wide and (row["wide_loads"], row["wide_stores"]) != (expected := wide[row["kernel"]](row))
    ]
    assert not failures, "\n".join(failures)


def test_rows_of_many_layers_move_16_bytes_at_once(compiled: list[dict]) -> None:
    """Each chain, and the search, reads and writes vectors; the search's statistics read one weight at a time."""
    failures = []
    for row in compiled:
        kinds = 4 if row["size"] == 256 else 1
        loads, stores = {
            ("foreach_quantize_kernel", "foreach quantize"): (kinds, kinds),
            ("foreach_statistics_kernel", "foreach step"): (3 if kinds == 4 else 1, 0),
            ("foreach_update_kernel", "foreach step, quantize"): (kinds, kinds),
        }.get((row["kernel"], row["operation"]), (0, row["wide_stores"]))
        if row["wide_loads"] < loads or row["wide_stores"] != stores:
            failures.append(f"{name(row)}: {row['wide_loads']} wide loads, {row['wide_stores']} wide stores")
    assert not failures, "\n".join(failures)


def test_products_and_sums_are_not_fused(compiled: list[dict]) -> None:
    failures = [
        f"{name(row)}: {row['fused']} fused multiply-adds"
        for row in compiled
        if row["fused"] and not (row["kernel"] in PRODUCT_KERNELS and row["size"] > 16)
    ]
    assert not failures, "\n".join(failures)


def test_within_budget(compiled: list[dict]) -> None:
    failures = []
    for row in compiled:
        registers, instructions = next(
            amd if row["target"].startswith("gfx") else nvidia
            for kernel, operation, size, nvidia, amd in BUDGET
            if kernel == row["kernel"] and operation in (None, row["operation"]) and row["size"] <= size
        )
        if row["registers"] > registers:
            failures.append(f"{name(row)}: {row['registers']} registers, budget {registers}")
        if row["per_element"] > instructions:
            failures.append(f"{name(row)}: {row['per_element']} instructions an element, budget {instructions}")
    assert not failures, "\n".join(failures)
