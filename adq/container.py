"""The bytes of a model file: safetensors that carries its own digest, with all else in one JSON header.

Plain files hold tensors under their own names, and the header as text in the metadata. Packed ones hold the tensors of
a dtype one after another as a single tensor, and the header, which lists them, compressed as another: an entry a
tensor would cost a small network a quarter of its size.

The digest is BLAKE2b-256 of the whole file, its own digits taken as zeros. A CRC would find the same accidents in small
files; a cryptographic hash finds them in any, whatever their pattern, and names a model for good. It is no signature:
who can write the file can write a digest.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

FORMAT = "adq-model"
FORMAT_VERSION = 2
HEADER = "header"
PARTS = ("architecture", "layers", "shapes", "aliases")
"""Of the header; version 1 has each in a metadata entry of its own."""
DTYPES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.bool: "BOOL",
}
"""Names of dtypes in safetensors, by falling alignment."""
INFLATION = 200
"""How many times larger than its compressed form a header may be, beyond a MiB: no zlib bombs."""
MOST_TEXT = 2**24
"""Bytes of a header, some ten thousand layers; read as JSON they take many times as much memory."""
MOST_DIMENSIONS = 32
PIECE = 2**20

_DIGEST = re.compile(rb'"checksum":"([0-9a-f]{64})"')


@dataclass(frozen=True)
class Contents:
    """What a file says of itself: format version, whether weights are codes, and the parts of its header."""

    version: int
    packed: bool
    header: dict[str, Any]


# ---- writing -----------------------------------------------------------------------------------------


def write(path: Path, tensors: Mapping[str, Tensor], header: dict[str, Any], packed: bool, library: str) -> None:
    """Write contiguous CPU tensors and a header; equal arguments give equal bytes."""
    metadata = {"format": FORMAT, "format_version": str(FORMAT_VERSION), "adq_version": library}
    metadata |= {"packed": json.dumps(packed), "checksum": "0" * 64}
    if packed:
        tensors, index = _merge(tensors)
        text = json.dumps({**header, "tensors": index}, separators=(",", ":"))
        if len(text) > MOST_TEXT:
            raise ValueError(f"adq: a packed file's header has at most {MOST_TEXT:,} bytes, this one {len(text):,}")
        compressed = bytearray(zlib.compress(text.encode(), 9))
        tensors[HEADER] = torch.frombuffer(compressed, dtype=torch.uint8)
    else:
        metadata[HEADER] = json.dumps(header, separators=(",", ":"))
    with open(path, "wb") as file:
        _write_safetensors(file, tensors, metadata)
    _seal(path)


def _merge(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, dict[str, list[int]]]]:
    """The tensors of each dtype as one, and their names and shapes in order."""
    members: dict[str, list[Tensor]] = {}
    index: dict[str, dict[str, list[int]]] = {}
    for name, tensor in tensors.items():
        kind = DTYPES[tensor.dtype]
        members.setdefault(kind, []).append(tensor.flatten())
        index.setdefault(kind, {})[name] = list(tensor.shape)
    return {kind: torch.cat(parts) for kind, parts in members.items()}, index


def _write_safetensors(file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """As the library writes it, but with the metadata in the given order: it has none of its own."""
    kinds = list(DTYPES)
    ordered = sorted(tensors.items(), key=lambda item: (kinds.index(item[1].dtype), item[0]))
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.nbytes
        entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for _, tensor in ordered:
        file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


def _seal(path: Path) -> None:
    """Put the digest where its zeros are."""
    with open(path, "r+b") as file:
        place, digest = _digest(file)
        file.seek(place)
        file.write(digest)


def _digest(file: BinaryIO) -> tuple[int, bytes]:
    """Where a file's digest stands, or -1, and what it should be."""
    start = file.read(8)
    start += file.read(*struct.unpack("<Q", start))
    found = _DIGEST.search(start)
    digest = hashlib.blake2b(digest_size=32)
    digest.update(start if found is None else start[: found.start(1)] + b"0" * 64 + start[found.end(1) :])
    while piece := file.read(PIECE):
        digest.update(piece)
    return -1 if found is None else found.start(1), digest.hexdigest().encode()


# ---- reading -----------------------------------------------------------------------------------------


def read(path: Path) -> tuple[Contents, dict[str, Tensor]]:
    """Header and tensors of a file, once its digest is right.

    Raises:
        FileNotFoundError, ValueError: no such file; not safetensors, not of adq, of a newer format, changed since it
            was written, or with a header that does not describe it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"adq: no such file: {path}")
    try:
        with safe_open(path, framework="pt") as file:
            version = _version(file.metadata(), path)
            if version > 1:
                _verify(path)
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
    except SafetensorError as error:
        raise ValueError(f"adq: {path} is truncated or not a safetensors file: {error}") from error
    try:
        packed, header = _header(version, metadata, stored)
        tensors = _split(stored, header["tensors"]) if packed and version > 1 else stored
    except (KeyError, AttributeError, TypeError, ValueError, RecursionError, zlib.error) as error:
        raise ValueError(f"adq: {path} has a damaged header: {error}") from error
    return Contents(version, packed, header), tensors


def _version(metadata: Mapping[str, str] | None, path: Path) -> int:
    if not metadata or metadata.get("format") != FORMAT:
        raise ValueError(f"adq: {path} is not an adq model (a float checkpoint? use load_float_weights)")
    number = metadata.get("format_version", "")
    if not re.fullmatch("[1-9][0-9]{0,8}", number) or int(number) > FORMAT_VERSION:
        raise ValueError(
            f"adq: {path} has format version {number!r}, this adq reads up to {FORMAT_VERSION}; update adq"
        )
    return int(number)


def _verify(path: Path) -> None:
    with open(path, "rb") as file:
        place, digest = _digest(file)
        file.seek(max(place, 0))
        if place < 0 or file.read(64) != digest:
            raise ValueError(f"adq: {path} is damaged: its checksum is {'wrong' if place >= 0 else 'missing'}")


def _header(version: int, metadata: Mapping[str, str], stored: dict[str, Tensor]) -> tuple[bool, dict[str, Any]]:
    packed = json.loads(metadata["packed"])
    if not isinstance(packed, bool):
        raise ValueError("packed must be true or false")
    if version == 1:
        return packed, {part: json.loads(metadata[part]) for part in PARTS}
    text = _inflate(stored.pop(HEADER)) if packed else metadata[HEADER]
    header = json.loads(text)
    if not isinstance(header, dict) or not {*PARTS} <= header.keys():
        raise ValueError(f"the header must be a mapping of {', '.join(PARTS)}")
    return packed, header


def _inflate(compressed: Tensor) -> bytes:
    data = compressed.numpy().tobytes()
    inflater = zlib.decompressobj()
    text = inflater.decompress(data, min(PIECE + INFLATION * len(data), MOST_TEXT))
    if not inflater.eof or inflater.unused_data:
        raise ValueError("its compressed part is cut off, followed by something, or far too large")
    return text


def check_shape(name: str, shape: Any) -> int:
    """The number of elements of a shape that a header states; ValueError if it is none."""
    if not isinstance(shape, list) or len(shape) > MOST_DIMENSIONS or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"the shape of {name!r} is {shape!r:.200}")
    return math.prod(shape)


def _split(stored: Mapping[str, Tensor], index: Any) -> dict[str, Tensor]:
    """The tensors that lie one after another in those of the file: views, which claim no memory."""
    if set(index) != set(stored):
        raise ValueError(f"it lists tensors of {', '.join(sorted(index))}, the file has {', '.join(sorted(stored))}")
    tensors: dict[str, Tensor] = {}
    for kind, shapes in index.items():
        whole, place = stored[kind].flatten(), 0
        for name, shape in shapes.items():
            if name in tensors:
                raise ValueError(f"{name!r} is there twice")
            size = check_shape(name, shape)
            if place + size > whole.numel():
                raise ValueError(f"{name!r}, of shape {shape}, reaches beyond the end of the file's {kind} data")
            tensors[name] = whole[place : place + size].view(shape)
            place += size
        if place != whole.numel():
            raise ValueError(f"its tensors of {kind} take {place} elements, the file has {whole.numel()}")
    return tensors
