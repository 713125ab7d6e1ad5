"""The table of layers that the ``foreach`` kernels of :mod:`adq.kernels.foreach` read.

It is worked out on the host from shapes alone, but for the addresses, and copied to the device once for a set of
tensors. Tables are kept by addresses, and used for the same dtypes, shapes and strides: not by the tensors, which they
do not keep alive.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter, eq
from typing import Any

import torch
from torch import Tensor

from adq import ops
from adq.backends.capture import check_not_capturing, is_capturing
from adq.kernels.foreach import FIELDS

MOST_TABLES = 4096
"""Sets of tensors whose tables are kept, those used last: under ``torch.compile`` each layer has one of its own."""
VECTOR_BYTES = 16
ALIGNMENT = 256
"""Bytes that a weight begins at a multiple of, in a tensor that holds those of many layers."""
PIECE = 512
"""Elements of a row where one scale serves the layer."""
SHORT, LONG = 2, 5
"""Logarithm of the lanes that share a row of up to four vectors, and a longer one."""
KINDS = (4, 8, 16, ops.MAX_LEVELS)
"""Levels of the chains of compares, and of the search."""
ITEM = {4: 8192, 8: 8192, 16: 8192, ops.MAX_LEVELS: 4096}
"""Elements that an item should have, for each kind: those of a search take longer."""
MOST_ITEMS = {4: 256, 8: 256, 16: 256, ops.MAX_LEVELS: 128}
"""Most items of a layer: each has a partial sum for every level."""

Layout = tuple[torch.Size, tuple[int, ...], int]
"""Shape, strides and first element of a weight in a tensor that holds those of many layers."""


@dataclass(frozen=True)
class Table:
    """The layers of one dtype, in the order of their rows in the table.

    Attributes:
        data: int64 on the device: ``[layers, FIELDS]``, then the row of each program.
        dtype: of the weights.
        members: the layers' places in the arguments.
        programs: items of all layers.
        kinds: sum of the kinds that occur.
        workspace: elements of the workspace, without and with the new codebook of every item.
        outputs: where each layer's result lies in a tensor that holds all of them.
        staged: the same for copies of the weights that are not dense, None for the others.
        sizes: elements of these two tensors.
    """

    data: Tensor
    dtype: torch.dtype
    members: tuple[int, ...]
    programs: int
    kinds: int
    workspace: int
    outputs: tuple[Layout, ...]
    staged: tuple[Layout | None, ...]
    sizes: tuple[int, int]


def _kind(levels: int) -> int:
    return next(kind for kind in KINDS if levels <= kind)


class _Packing:
    """Places for tensors in one, each at an aligned address."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.size = dtype, 0

    def place(self, like: Tensor) -> Layout:
        at, unit = self.size, ALIGNMENT // self.dtype.itemsize
        self.size += -(-like.numel() // unit) * unit
        return like.shape, like.stride(), at


def _rows(w: Tensor, scale: Tensor) -> dict[str, int]:
    """How the memory of a dense weight is cut into rows of one scale."""
    axis = ops.scale_axis(w.shape, scale)
    if axis is None:
        return {"rows": -(-w.numel() // PIECE), "length": PIECE, "inner": PIECE, "jump": 0, "channels": 0}
    channels = w.shape[axis]
    inner = max(1, w.stride(axis))
    length = w.numel() // max(1, channels)
    return {"rows": channels, "length": length, "inner": inner, "jump": channels * inner, "channels": 1}


def _items(rows: int, length: int, kind: int, vector: int, lanes: int) -> dict[str, int]:
    """How many rows an item has, by their size alone, and how many lanes share one."""
    shift = SHORT if length <= vector << SHORT else LONG
    group = lanes >> shift
    groups = max(ITEM[kind] // max(1, group * length), -(-rows // (group * MOST_ITEMS[kind])), 1)
    height = group * groups
    return {"shift": shift, "height": height, "items": max(1, -(-rows // height))}


def _describe(w: Tensor, scale: Tensor, codebook: Tensor, lanes: int) -> dict[str, int]:
    """What a layer's row of the table says of its shape; ``w`` stands for the dense weight."""
    kind, vector = _kind(codebook.numel()), VECTOR_BYTES // w.element_size()
    rows = _rows(w, scale)
    fields = rows | _items(rows["rows"], rows["length"], kind, vector, lanes)
    whole = rows["length"] == rows["inner"] and rows["length"] % vector == w.numel() % vector == 0
    return fields | {"numel": w.numel(), "levels": codebook.numel(), "kind": kind, "vectors": int(whole)}


def _on_device(numbers: list[int], device: torch.device) -> Tensor:
    """int64 tensor that outlives the pass.

    While ``torch.compile`` warms up a CUDA graph, what this thread allocates comes from a pool that must be empty again
    when the pass ends; another thread's memory does not.
    """
    if device.type != "cuda":
        return torch.tensor(numbers, device=device)
    with ThreadPoolExecutor(1) as other:
        return other.submit(torch.tensor, numbers, device=device).result()


def _make(
    dtype: torch.dtype,
    members: Sequence[int],
    tensors: dict[str, Sequence[Tensor]],
    snap: Sequence[bool],
    lanes: int,
) -> Table:
    outputs, stage = _Packing(dtype), _Packing(dtype)
    layers: list[tuple[int, dict[str, int], Layout, Layout | None]] = []
    for i in members:
        w = tensors["weights"][i]
        dense = torch.empty_like(w, device="meta")
        fields = _describe(dense, tensors["scales"][i], tensors["codebooks"][i], lanes)
        output = outputs.place(dense)
        staged = None if w.stride() == dense.stride() else stage.place(dense)
        addresses = {name: tensors[plural][i].data_ptr() for name, plural in _PLURALS.items() if tensors.get(plural)}
        addresses = {"count": 0, "total": 0, "output": output[2] * dtype.itemsize} | addresses
        if staged:
            addresses["weight"] = staged[2] * dtype.itemsize
        aligned = not (addresses["weight"] | addresses["output"]) % VECTOR_BYTES
        fields |= addresses | {"vectors": fields["vectors"] * aligned, "in_stage": int(staged is not None)}
        layers.append((i, fields | {"index": i, "snap": int(bool(snap) and snap[i])}, output, staged))
    # the items that take longest begin first
    layers.sort(key=lambda layer: (-(layer[1]["kind"] // 256), -layer[1]["height"] * layer[1]["length"]))
    rows: list[int] = []
    owners: list[int] = []
    work = 0
    for place, (_, fields, _, _) in enumerate(layers):
        fields |= {"first": len(owners), "work": work}
        owners += [place] * fields["items"]
        work += fields["levels"] * (3 * fields["items"] + 3)
        rows += [fields[name] for name in FIELDS]
    order, _, places, copies = zip(*layers, strict=True)
    return Table(
        data=_on_device(rows + owners, tensors["weights"][order[0]].device),
        dtype=dtype,
        members=order,
        programs=len(owners),
        kinds=sum({fields["kind"] for _, fields, _, _ in layers}),
        workspace=work,
        outputs=places,
        staged=copies,
        sizes=(outputs.size, stage.size),
    )


_PLURALS = {
    "weight": "weights",
    "scale": "scales",
    "codebook": "codebooks",
    "count": "counts",
    "total": "totals",
    "output": "quantized",
}
_SHAPE, _DTYPE = attrgetter("shape"), attrgetter("dtype")
_TABLES: dict[Hashable, tuple[list[list[Any]], tuple[Table, ...]]] = {}
"""By addresses, which are quickly hashed: what else the tables depend on, and the tables."""
_CAPTURED: dict[int, tuple[Table, ...]] = {}
"""Tables that a CUDA graph reads, by their identity: never given up."""


def tables(
    lanes: int,
    check: Callable[[], None],
    options: Hashable = (),
    snap: Sequence[bool] = (),
    **tensors: Sequence[Tensor],
) -> tuple[Table, ...]:
    """The tables of these layers, one a dtype of the weights.

    Args:
        lanes: vectors that a program holds.
        check: called when the layers are new, or ``options`` are.
        options: what ``check`` looks at besides.
        snap: as in :func:`adq.reference.foreach_codebook_step_`.
        tensors: the lists of the operator's arguments.

    Raises:
        RuntimeError: the layers are new, and a CUDA graph is being captured.
    """
    every = list(chain.from_iterable(tensors.values()))
    weights = tensors["weights"]
    device = weights[0].device if weights else torch.device("cpu")
    key = lanes, options, tuple(snap), device, tuple(map(len, tensors.values())), tuple(map(Tensor.data_ptr, every))
    # these differ where memory was freed and used again, or a tensor's data was set; of all but weights and results,
    # ``check`` accepts one dtype, and one order in memory
    laid = [*weights, *tensors.get("quantized", ())]
    aspects: tuple[tuple[Any, list[Tensor]], ...] = (_SHAPE, every), (_DTYPE, laid), (Tensor.stride, laid)
    known, found = _TABLES.get(key) or ([], ())
    # one after the other: thousands of tuples at a time would start Python's garbage collector
    if not known or not all(all(map(eq, map(of, some), old)) for (of, some), old in zip(aspects, known, strict=True)):
        check()
        check_not_capturing(device)
        known, found = [list(map(of, some)) for of, some in aspects], _make_all(lanes, snap, tensors)
        while len(_TABLES) >= MOST_TABLES:
            _TABLES.pop(next(iter(_TABLES), None), None)
    _TABLES.pop(key, None)
    _TABLES[key] = known, found  # the last one to be given up
    if device.type == "cuda":
        _hold(found, device)
    return found


def _make_all(lanes: int, snap: Sequence[bool], tensors: dict[str, Sequence[Tensor]]) -> tuple[Table, ...]:
    members: dict[torch.dtype, list[int]] = {}
    for i, w in enumerate(tensors["weights"]):
        members.setdefault(w.dtype, []).append(i)
    return tuple(_make(dtype, which, tensors, snap, lanes) for dtype, which in members.items())


def _hold(found: tuple[Table, ...], device: torch.device) -> None:
    """Keep the memory of tables that were given up from new tensors until the current stream has read them."""
    if is_capturing(device):
        _CAPTURED[id(found)] = found
        return
    stream = torch.cuda.current_stream(device)
    for table in found:
        table.data.record_stream(stream)  # another one than that of the thread that made it, maybe
