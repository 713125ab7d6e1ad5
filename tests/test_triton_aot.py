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
fcntl = pytest.importorskip("fcntl", reason="a system without file locks")

TARGETS = ("sm_90", "sm_80", "gfx942")
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

BUDGET = [
    # kernel, operation, sizes up to; registers and instructions per element: NVIDIA, AMD
    ("codebook_kernel", "lookup", 2, (68, 9), (46, 14)),
    ("codebook_kernel", "lookup", 4, (68, 13.5), (66, 20)),
    ("codebook_kernel", "lookup", 8, (66, 16.5), (66, 26)),
    ("codebook_kernel", "lookup", 16, (68, 19.5), (67, 33)),
    ("codebook_kernel", "lookup", 32, (68, 23), (67, 38)),
    ("codebook_kernel", "lookup", 64, (70, 38), (84, 50)),
    ("codebook_kernel", "lookup", 128, (76, 43), (84, 58)),
    ("codebook_kernel", "lookup", 256, (76, 51), (84, 63)),
    ("codebook_kernel", "lookup with codes", 2, (63, 10.5), (55, 16.5)),
    ("codebook_kernel", "lookup with codes", 4, (68, 14.5), (60, 21)),
    ("codebook_kernel", "lookup with codes", 8, (68, 17.5), (66, 30)),
    ("codebook_kernel", "lookup with codes", 16, (67, 21), (61, 37)),
    ("codebook_kernel", "lookup with codes", 32, (68, 24), (63, 42)),
    ("codebook_kernel", "lookup with codes", 64, (76, 39), (68, 52)),
    ("codebook_kernel", "lookup with codes", 128, (76, 45), (70, 60)),
    ("codebook_kernel", "lookup with codes", 256, (76, 52), (69, 68)),
    ("codebook_cells_kernel", "both", 2, (66, 18), (60, 27)),
    ("codebook_cells_kernel", "both", 4, (66, 30), (71, 39)),
    ("codebook_cells_kernel", "both", 8, (73, 42), (80, 57)),
    ("codebook_cells_kernel", "both", 16, (110, 67), (135, 84)),
    ("codebook_cells_kernel", "statistics", 2, (52, 12.5), (34, 14.5)),
    ("codebook_cells_kernel", "statistics", 4, (57, 27), (63, 28)),
    ("codebook_cells_kernel", "statistics", 8, (63, 38), (67, 48)),
    ("codebook_cells_kernel", "statistics", 16, (101, 61), (122, 76)),
    ("codebook_statistics_kernel", "statistics", 32, (137, 601), (105, 738)),
    ("codebook_statistics_kernel", "statistics", 256, (145, 322), (114, 330)),
    ("codebook_reduce_kernel", None, 256, (114, 587), (140, 708)),
    ("threshold_kernel", "forward", 1, (61, 9), (46, 14.5)),
    ("threshold_kernel", "forward", 3, (67, 13.5), (65, 21)),
    ("threshold_kernel", "forward", 7, (62, 16.5), (66, 27)),
    ("threshold_kernel", "forward", 15, (63, 20), (65, 33)),
    ("threshold_kernel", "forward", 31, (68, 23), (65, 38)),
    ("threshold_kernel", "forward", 63, (68, 34), (63, 48)),
    ("threshold_kernel", "forward", 127, (68, 41), (61, 56)),
    ("threshold_kernel", "forward", 255, (76, 49), (63, 64)),
    ("threshold_kernel", "uniform forward", 255, (61, 27), (65, 30)),
    ("threshold_kernel", "levels", 1, (46, 7), (36, 8.5)),
    ("threshold_kernel", "levels", 3, (51, 14), (59, 13.5)),
    ("threshold_kernel", "levels", 7, (67, 15.5), (65, 21.5)),
    ("threshold_kernel", "levels", 15, (67, 20), (59, 27.5)),
    ("threshold_kernel", "levels", 31, (67, 23), (59, 32)),
    ("threshold_kernel", "levels", 63, (76, 31), (65, 39.5)),
    ("threshold_kernel", "levels", 127, (69, 38), (64, 47)),
    ("threshold_kernel", "levels", 255, (75, 45.5), (66, 54)),
    ("threshold_kernel", "uniform levels", 255, (61, 24), (64, 24.5)),
    ("threshold_table_kernel", None, 255, (26, 50), (6, 57)),
    ("threshold_backward_kernel", "backward", 1, (60, 21), (70, 30)),
    ("threshold_backward_kernel", "backward", 3, (68, 37), (82, 50)),
    ("threshold_backward_kernel", "backward", 7, (68, 53), (98, 67)),
    ("threshold_backward_kernel", "backward", 15, (101, 81), (147, 94)),
    ("threshold_backward_kernel", "uniform backward", 255, (76, 37), (72, 45)),
    ("threshold_backward_search_kernel", "backward", 255, (196, 612), (135, 382)),
    ("threshold_reduce_kernel", None, 255, (59, 260), (71, 373)),
    ("pack_kernel", "pack", 1, (31, 4), (32, 4.5)),
    ("pack_kernel", "pack", 2, (31, 3.5), (30, 4.5)),
    ("pack_kernel", "pack", 3, (34, 9), (34, 8)),
    ("pack_kernel", "pack", 4, (34, 3.5), (30, 4.5)),
    ("pack_kernel", "pack", 5, (34, 12), (36, 10.5)),
    ("pack_kernel", "pack", 6, (34, 7.5), (36, 8.5)),
    ("pack_kernel", "pack", 7, (34, 15), (36, 12)),
    ("pack_kernel", "pack", 8, (42, 2), (53, 2.5)),
    ("unpack_kernel", "unpack", 1, (28, 3.5), (17, 4.5)),
    ("unpack_kernel", "unpack", 2, (29, 3.5), (19, 4.5)),
    ("unpack_kernel", "unpack", 3, (32, 5.5), (24, 6)),
    ("unpack_kernel", "unpack", 4, (30, 3.5), (21, 4.5)),
    ("unpack_kernel", "unpack", 5, (34, 6), (26, 5.5)),
    ("unpack_kernel", "unpack", 6, (34, 5), (28, 5.5)),
    ("unpack_kernel", "unpack", 7, (34, 6.5), (30, 7)),
    ("unpack_kernel", "unpack", 8, (40, 2), (53, 2.5)),
    ("decode_kernel", "decode", 1, (66, 7), (33, 8)),
    ("decode_kernel", "decode", 2, (49, 6.5), (25, 7)),
    ("decode_kernel", "decode", 3, (67, 9.5), (36, 9)),
    ("decode_kernel", "decode", 4, (55, 6.5), (25, 7)),
    ("decode_kernel", "decode", 5, (67, 8.8), (37, 10)),
    ("decode_kernel", "decode", 6, (49, 10.5), (28, 8.5)),
    ("decode_kernel", "decode", 7, (59, 12.5), (40, 11)),
    ("decode_kernel", "decode", 8, (53, 8), (29, 6.5)),
    ("decode_kernel", "decode rows", 8, (67, 23), (46, 20)),
    ("decode_kernel", "decode columns", 8, (67, 45.5), (67, 49.5)),
    ("linear_kernel", "linear", 1, (76, 6.5), (74, 7)),
    ("linear_kernel", "linear", 2, (68, 6.5), (68, 5.5)),
    ("linear_kernel", "linear", 3, (76, 8), (79, 9.5)),
    ("linear_kernel", "linear", 4, (68, 6.5), (84, 6.5)),
    ("linear_kernel", "linear", 5, (68, 8), (78, 9.5)),
    ("linear_kernel", "linear", 6, (76, 9.5), (99, 9.5)),
    ("linear_kernel", "linear", 7, (70, 11.5), (130, 10)),
    ("linear_kernel", "linear", 8, (76, 8), (97, 5)),
    ("linear_kernel", "linear, rows", 3, (177, 11.5), (185, 11)),
    ("linear_kernel", "linear, rows", 4, (164, 10), (196, 9.5)),
    ("linear_kernel", "linear, rows", 8, (195, 12), (177, 8)),
    ("integer_weight_kernel", None, 1, (59, 26.5), (72, 33.5)),
    ("integer_weight_kernel", None, 2, (74, 33), (75, 41)),
    ("integer_weight_kernel", None, 3, (90, 44.5), (91, 49.5)),
    ("integer_weight_kernel", None, 4, (107, 46), (108, 57)),
    ("integer_weight_kernel", None, 8, (67, 22), (105, 28.5)),
    ("integer_dense_kernel", "integer", 8, (255, 35.5), (248, 5)),
    ("integer_dense_kernel", "integer, residual", 8, (255, 41), (315, 5)),
    ("integer_depthwise_kernel", None, 9, (71, 63), (76, 6)),
    ("foreach_quantize_kernel", None, 4, (75, 31), (63, 38)),
    ("foreach_quantize_kernel", None, 8, (76, 39), (76, 52)),
    ("foreach_quantize_kernel", None, 16, (100, 74), (93, 78)),
    ("foreach_quantize_kernel", None, 256, (134, 116), (136, 127)),
    ("foreach_statistics_kernel", None, 4, (111, 52), (75, 41)),
    ("foreach_statistics_kernel", None, 8, (126, 78), (100, 67)),
    ("foreach_statistics_kernel", None, 16, (232, 127), (169, 117)),
    ("foreach_statistics_kernel", None, 256, (255, 126), (256, 124)),
    ("foreach_update_kernel", "foreach step", 16, (172, 153), (105, 176)),
    ("foreach_update_kernel", "foreach step", 256, (255, 182), (344, 263)),
    ("foreach_update_kernel", "foreach step, quantize", 4, (176, 32), (104, 37)),
    ("foreach_update_kernel", "foreach step, quantize", 8, (176, 40), (104, 49)),
    ("foreach_update_kernel", "foreach step, quantize", 16, (176, 74), (107, 75)),
    ("foreach_update_kernel", "foreach step, quantize", 256, (255, 117), (344, 124)),
]
"""Highest of the figures of Triton 3.6 and 3.8 over the dtypes, and 5 % more. Instructions are those of the
shortest way around the main loop, or through a program without one, for the elements of one thread."""

PRODUCT_KERNELS = ("foreach_statistics_kernel",)
"""Kernels in which the compiler may fuse products and sums: those of matrices, whose results are sums."""

DTYPES = ("float32", "bfloat16", "float16")
WIDTHS = range(1, 9)


def unavailable(target: str) -> str | None:
    """Why kernels cannot be compiled for a target, if so."""
    if target.startswith("sm") and not all((NVIDIA_TOOLS / tool).exists() for tool in ("ptxas", "cuobjdump")):
        return f"this build of Triton bundles no ptxas and cuobjdump in {NVIDIA_TOOLS}"
    if target.startswith("gfx") and not (NVIDIA_TOOLS.parents[1] / "amd").exists():
        return "this build of Triton has no AMD backend"
    return None


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """One dictionary of figures a compiled kernel, for every target."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "ADQ_CPU_BACKEND": "reference"}
    targets = [target for target in TARGETS if not unavailable(target)]
    command = [sys.executable, str(Path(__file__).with_name("aot.py")), *targets]
    # parallel test processes share the folder above their own: one compiles, the others wait for its rows
    folder = (
        tmp_path_factory.getbasetemp().parent if "PYTEST_XDIST_WORKER" in os.environ else tmp_path_factory.mktemp("aot")
    )
    rows = folder / "aot.jsonl"
    with open(folder / "aot.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not rows.exists():
            run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
            assert run.returncode == 0, run.stderr[-4000:]
            rows.write_text(run.stdout)
    return [json.loads(line) for line in rows.read_text().splitlines()]


@pytest.fixture(scope="module", params=TARGETS)
def compiled(request: pytest.FixtureRequest) -> list[dict]:
    """The figures of one target."""
    if reason := unavailable(request.param):
        pytest.skip(reason)
    return [row for row in request.getfixturevalue("measured") if row["target"] == request.param]


def name(row: dict) -> str:
    return f"{row['target']} {row['kernel']} ({row['operation']} {row['dtype']} {row['size']})"


def test_every_kernel_is_compiled(compiled: list[dict]) -> None:
    package = importlib.import_module("adq.kernels")
    modules = [
        importlib.import_module(f"adq.kernels.{module.name}") for module in pkgutil.iter_modules(package.__path__)
    ]
    written = {attribute for module in modules for attribute in vars(module) if attribute.endswith("_kernel")}
    assert written == {row["kernel"] for row in compiled}


def test_every_dtype_and_width_is_compiled(compiled: list[dict]) -> None:
    whole = compiled[0]["target"] == TARGETS[0]  # the others go without float16 and symmetric codebooks
    dtypes = DTYPES if whole else DTYPES[:2]
    codebooks, quantizers = ("lookup", "lookup with codes", "statistics"), ("forward", "backward", "levels")
    wanted = {(name, dtype, 2**bits) for name in codebooks for dtype in dtypes for bits in WIDTHS}
    wanted |= {(name, dtype, 2**bits - 1) for name in quantizers for dtype in dtypes for bits in WIDTHS}
    wanted |= {(f"uniform {name}", dtype, 255) for name in quantizers for dtype in dtypes}
    wanted |= {("statistics", dtype, 2**bits - 1) for dtype in dtypes for bits in WIDTHS[1:] if whole}
    wanted |= {("both", dtype, levels) for dtype in dtypes for levels in (2, 4, 8, 16)}
    wanted |= {("both", dtype, levels) for dtype in dtypes for levels in (3, 7, 15) if whole}
    wanted |= {("integer", "uint8", bits) for bits in (1, 2, 3, 4, 8, 9)} | {("integer, residual", "uint8", 9)}
    of_codes = ("pack", "unpack", "decode", "decode rows", "decode columns")
    wanted |= {(name, "uint8", bits) for name in of_codes for bits in WIDTHS}
    wanted |= {("linear", "float32", bits) for bits in WIDTHS} | {("linear", dtype, 4) for dtype in dtypes}
    wanted |= {("linear, rows", "bfloat16", bits) for bits in (3, 4, 8)}
    assert wanted <= {(row["operation"], row["dtype"], row["size"]) for row in compiled}


def test_nothing_spills(compiled: list[dict]) -> None:
    failures = [f"{name(row)}: {row['spills']} bytes of local memory" for row in compiled if row["spills"]]
    assert not failures, "\n".join(failures)


def test_full_tiles_move_16_bytes_at_once(compiled: list[dict]) -> None:
    wide = {  # kernel: wide loads, wide stores; two vectors a lane where there is nothing to add up
        "codebook_kernel": lambda row: (2, 2),
        "codebook_cells_kernel": lambda row: (1, int(row["operation"] == "both")),
        "threshold_kernel": lambda row: (2, 0 if "levels" in row["operation"] else 2),
        "threshold_backward_kernel": lambda row: (2, 1),
        "pack_kernel": lambda row: (1, int(row["size"] == 8)),
        "unpack_kernel": lambda row: (int(row["size"] == 8), 1),
        "decode_kernel": lambda row: (0, 2),
        "linear_kernel": lambda row: (4 * (row["dtype"] == "float32"), 0),  # of x; codes come a unit at a time
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


def test_integers_are_multiplied_by_the_matrix_units(compiled: list[dict]) -> None:
    """And reach them 16 bytes at a time, past the registers where the hardware has copies of its own."""
    rows = [row for row in compiled if row["kernel"] == "integer_dense_kernel"]
    assert rows
    failures = [
        f"{name(row)}: {row['integer_products']} products, {row['wide_copies']} copies of 16 bytes"
        for row in rows
        if not row["integer_products"] or not row["wide_copies"]
    ]
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
