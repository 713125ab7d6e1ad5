"""Model files that must be refused: with what message, and with the model that was passed in unchanged."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from saved import RECORD, Net, read, trained
from torch import nn

import adq
from adq import artifact
from adq.functional import pack, unpack
from adq.nn import WeightQuantizer


def assert_refused(
    path: Path, message: str, error: type[Exception] = ValueError, model: nn.Module | None = None
) -> None:
    """Loading raises, reading the header at most, and the model that was passed in is as it was."""
    model = Net() if model is None else model
    before = copy.deepcopy(model.state_dict())
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(error, match=message):
        adq.load(path, model)
    assert [type(module) for module in model.modules()] == kinds
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[bool, bytes]:
    """A plain and a packed file."""
    path = tmp_path_factory.mktemp("files") / "m.safetensors"
    model, found = trained(), {}
    for packed in (False, True):
        adq.save(model, path, packed=packed)
        found[packed] = path.read_bytes()
    return found


def test_missing_file_and_folder(tmp_path):
    assert_refused(tmp_path / "none.safetensors", "no such file: .*none", FileNotFoundError)
    assert_refused(tmp_path, "no such file", FileNotFoundError)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("part", [0, 1, 7, 8, 9, 0.02, 0.3, 0.6, 0.99, -1])
def test_truncated_file(tmp_path, files, part, packed):
    data, path = files[packed], tmp_path / "m.safetensors"
    path.write_bytes(data[: part if isinstance(part, int) else int(part * len(data))])
    assert_refused(path, "m.safetensors is truncated or not a safetensors file")


@pytest.mark.parametrize("seed", range(3))
def test_random_bytes(tmp_path, seed):
    path = tmp_path / "m.safetensors"
    path.write_bytes(
        torch.randint(0, 256, (5000,), generator=torch.Generator().manual_seed(seed)).byte().numpy().tobytes()
    )
    assert_refused(path, "is truncated or not a safetensors file")


def test_files_of_others(tmp_path):
    path = tmp_path / "m.safetensors"
    for metadata in (None, {"format": "pt"}):
        save_file({"w": torch.zeros(3)}, path, metadata=metadata)
        assert_refused(path, "is not an adq model .*float checkpoint.* use load_float_weights")
    torch.save(Net().state_dict(), path)
    assert_refused(path, "is truncated or not a safetensors file")


def rewrite(path: Path, data: bytes, tensors=None, **changes) -> None:
    """The file with some metadata (None: taken out) and tensors (None: taken out) changed."""
    path.write_bytes(data)
    header, _ = read(path)
    metadata = {**header["__metadata__"], **{key: value for key, value in changes.items() if value is not None}}
    metadata = {key: value for key, value in metadata.items() if changes.get(key, "") is not None}
    stored = {key: value for key, value in {**load_file(path), **(tensors or {})}.items() if value is not None}
    save_file(stored, path, metadata=metadata)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": "2"}, "has format version '2', this adq reads up to 1; update adq"),
        ({"format_version": "one"}, "has format version 'one'"),
        ({"format_version": None}, "has format version ''"),
        ({"layers": None}, "damaged header: 'layers'"),
        ({"layers": "{"}, "damaged header"),
        ({"layers": "[1]"}, "damaged header"),
        ({"layers": '{"stem": 3}'}, "damaged header"),
        ({"layers": '{"stem": {"weight": {"bits": 12}, "activation": null, "pinned": false}}'}, "damaged header.*bits"),
        ({"layers": '{"stem": {"weight": {"bist": 2}, "activation": null, "pinned": false}}'}, "damaged header.*bist"),
        ({"packed": "3"}, "damaged header: packed must be true or false"),
        ({"architecture": "[]"}, "damaged header: .*architecture a mapping or null"),
        ({"aliases": "[]"}, "damaged header"),
        ({"aliases": '{"a": 3}'}, "damaged header: aliases"),
        ({"shapes": '{"body": "large"}'}, "damaged header: the shape of 'body'"),
        ({"shapes": '{"body": [-6, -5, 3, 3]}'}, r"damaged header: the shape of 'body' is \[-6, -5, 3, 3\]"),
        ({"shapes": '{"body": [1e30]}'}, "damaged header: the shape of 'body'"),
    ],
)
def test_damaged_header(tmp_path, files, changes, message):
    rewrite(tmp_path / "m.safetensors", files[True], **changes)
    assert_refused(tmp_path / "m.safetensors", message)


@pytest.mark.parametrize("shape", [[2**40, 2**40], [2**31, 2**31, 4], [6, 5, 3, 3000], [270], [10**30]])
def test_huge_shapes_are_refused_before_any_memory_is_taken(tmp_path, files, shape, monkeypatch):
    shapes = {"stem": [6, 1, 3, 3], "body": shape, "head": [3, 5]}
    rewrite(tmp_path / "m.safetensors", files[True], shapes=json.dumps(shapes))
    monkeypatch.setattr(artifact, "unpack", lambda *args: pytest.fail("codes were unpacked"))
    assert_refused(
        tmp_path / "m.safetensors", r"of another architecture: body\.weight is .* in the file, \(6, 5, 3, 3\)"
    )


CODES = torch.zeros(102, dtype=torch.uint8)  # 270 codes of 3 bits


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"body.codes": None}, "missing body.codes"),
        ({"body.codes": CODES[:-1].clone()}, r"body\.codes is \(101,\) in the file, not \(102,\)"),
        ({"body.codes": torch.zeros(103, dtype=torch.uint8)}, r"body\.codes is \(103,\) in the file, not \(102,\)"),
        ({"body.codes": CODES.int()}, r"body\.codes is torch\.int32 in the file, not torch\.uint8"),
        ({"body.weight_quantizer.codebook": None}, "missing body.weight_quantizer.codebook"),
        (
            {"body.weight_quantizer.codebook": torch.zeros(0)},
            r"body\.weight_quantizer\.codebook is \(0,\) in the file, not \(8,\)",
        ),
        (
            {"body.weight_quantizer.scale": torch.ones(5)},
            r"body\.weight_quantizer\.scale is \(5,\) in the file, not \(1, 5, 1, 1\)",
        ),
        (
            {"body.input_quantizer.interval": torch.ones(3)},
            r"body\.input_quantizer\.interval is \(3,\) in the file, not \(7,\)",
        ),
        ({"norm.bias": None}, "missing norm.bias"),
        ({"norm.bias": torch.zeros(6, dtype=torch.int64)}, r"norm\.bias is torch\.int64 in the file"),
        ({"extra": torch.zeros(2)}, "unexpected extra"),
    ],
)
def test_damaged_tensors(tmp_path, files, tensors, message):
    rewrite(tmp_path / "m.safetensors", files[True], tensors)
    assert_refused(tmp_path / "m.safetensors", f"is of another architecture: {message}")


def test_codes_beyond_the_codebook(tmp_path):
    path = tmp_path / "m.safetensors"
    adq.save(trained(levels="symmetric"), path, packed=True)
    code = unpack(load_file(path)["body.codes"], 3, (270,))
    assert int(code.max()) <= 6
    code[17] = 7
    rewrite(path, path.read_bytes(), {"body.codes": pack(code, 3)})
    assert_refused(path, "layer 'body' has codes beyond its 7 levels")


@pytest.mark.parametrize("packed", [False, True])
def test_another_architecture(tmp_path, files, packed):
    path = tmp_path / "m.safetensors"
    path.write_bytes(files[packed])
    assert_refused(path, r"another architecture: .*head\.", model=Net(num_classes=4))
    assert_refused(path, "no layer 'body' to quantize; no layer 'head'", model=nn.Sequential(nn.Linear(2, 2)))
    wider = Net()
    wider.more = nn.Linear(2, 2)
    assert_refused(path, "missing more.bias; missing more.weight", model=wider)
    with pytest.raises(ValueError, match="load takes a float model"):
        adq.load(path, trained())
    with pytest.raises(ValueError, match="names no registered architecture; pass the float model"):
        adq.load(path)


def test_an_unregistered_architecture(tmp_path):
    adq.save(trained(), tmp_path / "m.safetensors", architecture=RECORD)
    with pytest.raises(ValueError, match="unknown architecture 'artifact_net'"):
        adq.load(tmp_path / "m.safetensors")


def test_placeholders_are_not_fitted(monkeypatch, tmp_path, files):
    """Loading a file costs no Lloyd iterations."""
    (tmp_path / "m.safetensors").write_bytes(files[False])
    monkeypatch.setattr(WeightQuantizer, "_fit", lambda *args: pytest.fail("a codebook was fitted"))
    adq.load(tmp_path / "m.safetensors", Net())
