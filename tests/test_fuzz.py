"""Model files and packed codes that hypothesis makes up: refused with a ValueError or read, never a crash.

Under AddressSanitizer (CONTRIBUTING.md) the same cases show that the C++ kernels stay inside their memory.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from saved import Net, forge, images, parts_of, trained

import adq
from adq import container, reference
from adq.convert import activation_quantizers
from adq.ops import packed_size

resource = pytest.importorskip("resource", reason="a system without resource usage")

MEMORY_KIB = 2**19
"""By which the process may grow over all examples of a test."""
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def bounded_memory() -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY_KIB


FORMS = {"plain": {}, "packed": {"packed": True}, "folded": {"packed": True, "fold_batch_norm": True}}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, bytes]:
    """A file of each form."""
    path, model = tmp_path_factory.mktemp("files") / "m.safetensors", trained()
    return {form: adq.save(model, path, **options).read_bytes() for form, options in FORMS.items()}


def load(path: Path) -> bool:
    """Whether a file is read: then the model runs, if it is calibrated. If not, it is refused for a reason, and the
    model that was passed is as it was.
    """
    model = Net()
    before = copy.deepcopy(model.state_dict())
    try:
        loaded = adq.load(path, model)
    except ValueError as error:
        reason = str(error)
    else:
        calibrated = all(quantizer.is_calibrated for quantizer in activation_quantizers(loaded).values())
        assert not calibrated or loaded(images()).shape == (6, 3)
        return True
    assert reason.startswith("adq: ") and path.name in reason
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(before[key], after[key]) for key in before)
    return False


# ---- bytes -------------------------------------------------------------------------------------------


def edits() -> st.SearchStrategy[list[tuple[str, float, bytes]]]:
    """What is done to a file, and where, as a share of its length."""
    kind = st.sampled_from(["overwrite", "insert", "delete"])
    return st.lists(st.tuples(kind, st.floats(0, 1), st.binary(min_size=1, max_size=12)), min_size=1, max_size=4)


def edited(data: bytes, changes: list[tuple[str, float, bytes]]) -> bytes:
    for kind, share, piece in changes:
        place = int(share * (len(data) - 1))
        kept = place if kind == "insert" else place + len(piece)
        data = data[:place] + (b"" if kind == "delete" else piece) + data[kept:]
    return data


@pytest.mark.parametrize("form", FORMS)
@FUZZ
@given(changes=edits())
def test_a_changed_file_is_refused(tmp_path, files, form, changes):
    """Whatever the change: the digest covers every byte."""
    path = tmp_path / "m.safetensors"
    path.write_bytes(edited(files[form], changes))
    assert load(path) == (path.read_bytes() == files[form])


@pytest.mark.parametrize("form", FORMS)
@FUZZ
@given(changes=edits())
def test_a_changed_file_whose_digest_is_right(tmp_path, files, form, changes):
    """What the digest would stop: the checks behind it stand alone."""
    path, data = tmp_path / "m.safetensors", edited(files[form], changes)
    path.write_bytes(data)
    size = int.from_bytes(data[:8], "little")
    if size < len(data) and container._DIGEST.search(data[8 : 8 + size]):
        container._seal(path)
    load(path)


# ---- headers -----------------------------------------------------------------------------------------

HOSTILE = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 2, 3, 255, 256, 2**31, 2**63, 2**64, -(2**63), 10**40]),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.integers(-2, 2**40), max_size=5),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
)


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place of a JSON value but its root."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [place for key, value in items for place in [(*path, key), *places(value, (*path, key))]]


def put(node: Any, path: tuple[Any, ...], value: Any, action: str) -> None:
    for key in path[:-1]:
        node = node[key]
    if action == "replace":
        node[path[-1]] = value
    elif action == "remove":
        del node[path[-1]]
    elif isinstance(node, list):
        node.append(value)
    else:
        node[json.dumps(value)] = node[path[-1]]


@pytest.mark.parametrize("form", FORMS)
@FUZZ
@given(data=st.data())
def test_a_header_with_parts_changed(tmp_path, files, form, data):
    path = tmp_path / "m.safetensors"
    path.write_bytes(files[form])
    header = copy.deepcopy(parts_of(path))
    for _ in range(data.draw(st.integers(1, 3))):
        where = data.draw(st.sampled_from(places(header)))
        put(header, where, data.draw(HOSTILE), data.draw(st.sampled_from(["replace", "replace", "remove", "add"])))
    forge(path, files[form], text=json.dumps(header))
    load(path)


# ---- kernels -----------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(
    bits=st.integers(1, 8),
    n=st.one_of(st.integers(0, 300), st.sampled_from([4095, 4096, 4097, 65535, 65536, 65537, 70001])),
    seed=st.integers(0, 2**31),
)
def test_any_bytes_unpack_and_pack_again(bits, n, seed):
    """Codes of arbitrary bytes equal the reference's; packed again they are the same bytes, unused bits zero."""
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (packed_size(n, bits),), generator=generator, dtype=torch.uint8)
    codes = torch.ops.adq.unpack_bits(packed, bits, n)
    assert torch.equal(codes, reference.unpack_bits(packed, bits, n))
    assert n == 0 or int(codes.max()) < 2**bits
    again = torch.ops.adq.pack_bits(codes, bits)
    assert torch.equal(again, reference.pack_bits(codes, bits))
    unused = 8 * packed.numel() - n * bits
    assert torch.equal(again[: n * bits // 8], packed[: n * bits // 8])
    assert unused == 0 or int(again[-1]) == int(packed[-1]) & (255 >> unused)


@settings(max_examples=300, deadline=None)
@given(
    bits=st.integers(1, 8),
    levels=st.integers(1, 256),
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    axis=st.integers(-1, 3),
    seed=st.integers(0, 2**31),
)
def test_any_codes_decode(bits, levels, shape, axis, seed):
    """Codes beyond the codebook take its last level."""
    levels = min(levels, 2**bits)
    generator = torch.Generator().manual_seed(seed)
    size = packed_size(torch.Size(shape).numel(), bits)
    packed = torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8)
    codebook = torch.randn(levels, generator=generator).sort().values
    scale = torch.rand([n if d == axis else 1 for d, n in enumerate(shape)], generator=generator) + 0.5
    decoded = torch.ops.adq.codebook_decode(packed, codebook, scale, bits, shape)
    assert torch.equal(decoded, reference.codebook_decode(packed, codebook, scale, bits, shape))


@settings(max_examples=200, deadline=None)
@given(
    bits=st.integers(1, 8),
    levels=st.integers(1, 256),
    shape=st.tuples(st.integers(0, 40), st.integers(0, 90)),
    rows=st.integers(0, 9),
    seed=st.integers(0, 2**31),
)
def test_any_codes_multiply(bits, levels, shape, rows, seed):
    """Small whole numbers, whose sums are exact in any order."""
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (packed_size(torch.Size(shape).numel(), bits),), generator=generator).byte()
    codebook = torch.randint(-9, 9, (min(levels, 2**bits),), generator=generator).float()
    x = torch.randint(-9, 9, (rows, shape[1]), generator=generator).float()
    scale = torch.randint(-9, 9, (shape[0], 1), generator=generator).float()
    y = torch.ops.adq.codebook_linear(x, packed, codebook, scale, bits, shape[0])
    assert torch.equal(y, reference.codebook_linear(x, packed, codebook, scale, bits, shape[0]))


@settings(max_examples=200, deadline=None)
@given(
    bits=st.integers(-(2**33), 2**33) | st.integers(-1, 9),
    n=st.integers(-(2**62), 2**62) | st.integers(-1, 40),
    size=st.integers(0, 40),
)
def test_sizes_that_do_not_fit_are_refused(bits, n, size):
    """Before a byte is read or taken: the number of codes and their bits must be those of the packed tensor."""
    packed = torch.zeros(size, dtype=torch.uint8)
    fits = 1 <= bits <= 8 and n >= 0 and size == -(-n * bits // 8)
    for kernel in (torch.ops.adq.unpack_bits, reference.unpack_bits):
        if fits:
            assert kernel(packed, bits, n).shape == (n,)
        else:
            with pytest.raises((ValueError, RuntimeError), match="adq"):
                kernel(packed, bits, n)
