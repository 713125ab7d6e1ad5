"""Model files that must be refused: with what message, and with the model that was passed in unchanged."""

from __future__ import annotations

import copy
import math
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from saved import RECORD, Net, forge, images, parts_of, read, tensors_of, trained
from torch import nn

import adq
from adq import artifact, container, models
from adq.functional import pack, unpack
from adq.nn import WeightQuantizer

resource = pytest.importorskip("resource", reason="a system without resource usage")
NAN, INF = math.nan, math.inf


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


REFUSED = "this adq reads up to 2; update adq"


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format_version": "3"}, f"has format version '3', {REFUSED}"),
        ({"format_version": "0"}, "has format version '0'"),
        ({"format_version": "one"}, "has format version 'one'"),
        ({"format_version": "9" * 5000}, "has format version '999"),
        ({"format_version": "1"}, "damaged header: 'architecture'"),
        ({"format_version": None}, "has format version ''"),
        ({"checksum": None}, "is damaged: its checksum is missing"),
        ({"packed": "3"}, "damaged header: packed must be true or false"),
        ({"packed": None}, "damaged header: 'packed'"),
        ({"packed": "false"}, "damaged header: 'header'"),
    ],
)
def test_damaged_metadata(tmp_path, files, metadata, message):
    forge(tmp_path / "m.safetensors", files[True], metadata=metadata)
    assert_refused(tmp_path / "m.safetensors", message)


LAYER = {"weight": {"bits": 2}, "activation": None, "pinned": False}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"text": "{"}, "damaged header"),
        ({"text": "[1]"}, "damaged header: the header must be a mapping of"),
        ({"text": "[" * 100_000}, "damaged header"),
        ({"text": '{"a":' * 100_000}, "damaged header"),
        ({"layers": None}, "damaged header: the header must be a mapping of"),
        ({"layers": [1]}, "damaged header"),
        ({"layers": {"stem": 3}}, "damaged header"),
        ({"layers": {"stem": {**LAYER, "weight": {"bits": 12}}}}, "damaged header.*bits"),
        ({"layers": {"stem": {**LAYER, "weight": {"bits": 10**30}}}}, "damaged header.*bits"),
        ({"layers": {"stem": {**LAYER, "weight": {"bist": 2}}}}, "damaged header.*bist"),
        ({"layers": {"stem": {**LAYER, "weight": {"scale": ["channel"]}}}}, "damaged header.*scale"),
        ({"architecture": []}, "damaged header: architecture must be a mapping or null"),
        ({"architecture": {"name": 3, "num_classes": 2}}, "damaged header: name of the architecture is 3"),
        ({"architecture": {"name": "a", "num_classes": "2"}}, "damaged header: num_classes of the architecture is '2'"),
        (
            {"architecture": {"name": "a", "num_classes": 2, "kwargs": [1]}},
            "damaged header: kwargs of the architecture",
        ),
        ({"aliases": []}, "damaged header"),
        ({"aliases": {"a": 3}}, "damaged header: aliases"),
        ({"aliases": {"a": "none"}}, "damaged header: a cannot share the tensor of none"),
        ({"aliases": {"a": "b", "b": "a"}}, "damaged header: a cannot share the tensor of b"),
        ({"aliases": {"a": "a"}}, "damaged header: a cannot share the tensor of a"),
        ({"aliases": {"head.bias": "norm.bias"}}, "damaged header: head.bias cannot share the tensor of norm.bias"),
        ({"aliases": {"a": "b", "b": "norm.bias"}}, "damaged header: a cannot share the tensor of b"),
        ({"shapes": {"body": "large"}}, "damaged header: the shape of 'body'"),
        ({"shapes": {"body": [-6, -5, 3, 3]}}, r"damaged header: the shape of 'body' is \[-6, -5, 3, 3\]"),
        ({"shapes": {"body": [1e30]}}, "damaged header: the shape of 'body'"),
        ({"shapes": {"body": [True]}}, "damaged header: the shape of 'body'"),
        ({"shapes": {"body": [1] * 100}}, "damaged header: the shape of 'body'"),
        ({"shapes": {"nobody": [3]}}, "another architecture: no quantized layer 'nobody' for the codes"),
        ({"tensors": None}, "damaged header: 'tensors'"),
        ({"tensors": []}, "damaged header: it lists tensors of , the file has BOOL, F32, U8"),
    ],
)
def test_damaged_header(tmp_path, files, parts, message):
    forge(tmp_path / "m.safetensors", files[True], **parts)
    assert_refused(tmp_path / "m.safetensors", message)


@pytest.mark.parametrize("packed", [False, True])
def test_every_flipped_bit_is_noticed(tmp_path, files, packed):
    data, path = files[packed], tmp_path / "m.safetensors"
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(0, len(data), (150,), generator=generator).tolist()
    for place in [*range(24), *range(len(data) - 8, len(data)), *places]:
        damaged = bytearray(data)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"adq: .*m\.safetensors"):
            adq.load(path, Net())


def index_of(path: Path, data: bytes) -> dict:
    path.write_bytes(data)
    return parts_of(path)["tensors"]


@pytest.mark.parametrize(
    ("kind", "shapes", "message"),
    [
        (
            "F32",
            {"norm.bias": [10**12]},
            r"'norm.bias', of shape \[1000000000000\], reaches beyond the end .* F32 data",
        ),
        ("F32", {"norm.bias": [2**40, 2**40]}, "'norm.bias'.* reaches beyond the end"),
        ("F32", {"norm.bias": [-6]}, r"the shape of 'norm.bias' is \[-6\]"),
        ("F32", {"norm.bias": [6.0]}, r"the shape of 'norm.bias' is \[6.0\]"),
        ("F32", {"norm.bias": None}, "the shape of 'norm.bias' is None"),
        ("F32", {"norm.bias": [1]}, "its tensors of F32 take .* elements, the file has"),
        ("U8", {"norm.bias": [0]}, "'norm.bias' is there twice"),
        ("U8", {"body.codes": [2**62]}, "'body.codes'.* reaches beyond the end of the file's U8 data"),
    ],
)
def test_the_index_of_a_packed_file_must_fit_its_data(tmp_path, files, kind, shapes, message):
    path = tmp_path / "m.safetensors"
    index = index_of(path, files[True])
    forge(path, files[True], tensors={**index, kind: {**index[kind], **shapes}})
    assert_refused(path, f"damaged header: {message}")


def test_a_header_that_inflates_without_end(tmp_path, files):
    path = tmp_path / "m.safetensors"
    path.write_bytes(files[True])
    entries, _ = read(path)
    stored = {**container._merge(tensors_of(path))[0]}
    numbers = zlib.compress(b"[%s0]" % b"".join(b"%d," % i for i in range(2_500_000)), 1)
    bombs = [(zlib.compress(b" " * 2**24), "far too large"), (numbers, "far too large"), (b"junk", "")]
    bombs += [(zlib.compress(b"{}")[:-1], "cut off"), (zlib.compress(b"{}") + b"x", "followed by something")]
    for bomb, message in bombs:
        stored["header"] = torch.frombuffer(bytearray(bomb), dtype=torch.uint8)
        with open(path, "wb") as file:
            container._write_safetensors(file, stored, {**entries["__metadata__"], "checksum": "0" * 64})
        container._seal(path)
        assert_refused(path, f"damaged header: .*{message}")


@pytest.mark.parametrize("shape", [[2**40, 2**40], [2**31, 2**31, 4], [6, 5, 3, 3000], [270], [10**30]])
def test_huge_shapes_are_refused_before_any_memory_is_taken(tmp_path, files, shape, monkeypatch):
    shapes = {"stem": [6, 1, 3, 3], "body": shape, "head": [3, 5]}
    forge(tmp_path / "m.safetensors", files[True], shapes=shapes)
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
            {"body.weight_quantizer.codebook": torch.arange(8.0).half()},
            r"body\.weight_quantizer\.codebook is torch\.float16 in the file, not torch\.float32",
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
    forge(tmp_path / "m.safetensors", files[True], tensors)
    assert_refused(tmp_path / "m.safetensors", f"is of another architecture: {message}")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"body.weight_quantizer.codebook": torch.arange(7.0, -1.0, -1.0)}, "the codebook of layer 'body' is not asc"),
        ({"body.weight_quantizer.codebook": torch.full((8,), NAN)}, "body.weight_quantizer.codebook holds NaN or inf"),
        (
            {"body.weight_quantizer.scale": torch.full((1, 5, 1, 1), INF)},
            "body.weight_quantizer.scale holds NaN or inf",
        ),
        ({"body.input_quantizer.start": torch.tensor([NAN])}, "body.input_quantizer.start holds NaN or infinity"),
        ({"norm.running_var": torch.full((6,), NAN)}, "norm.running_var holds NaN or infinity"),
        (
            {"body.input_quantizer.calibrated": torch.tensor([7], dtype=torch.uint8).view(torch.bool)[0]},
            "body.input_quantizer.calibrated holds bytes that are neither true nor false",
        ),
    ],
)
def test_values_that_no_model_has(tmp_path, files, tensors, message):
    forge(tmp_path / "m.safetensors", files[True], tensors)
    assert_refused(tmp_path / "m.safetensors", message)


def test_a_dtype_of_no_model(tmp_path, files, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(container.DTYPES, torch.float8_e4m3fn, "F8_E4M3")
        forge(tmp_path / "m.safetensors", files[False], {"norm.bias": torch.zeros(6).to(torch.float8_e4m3fn)})
    assert_refused(tmp_path / "m.safetensors", r"norm\.bias is torch\.float8_e4m3fn")


def test_codes_beyond_the_codebook(tmp_path):
    path = tmp_path / "m.safetensors"
    adq.save(trained(levels="symmetric"), path, packed=True)
    code = unpack(tensors_of(path)["body.codes"], 3, (270,))
    assert int(code.max()) <= 6
    code[17] = 7
    forge(path, path.read_bytes(), {"body.codes": pack(code, 3)})
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


class Pair(nn.Module):
    def __init__(self, shared: bool, norms: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.norm, self.tail = nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.LayerNorm(4)
        if shared:
            self.b.weight = self.a.weight
        if norms:
            self.tail.weight = self.norm.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tail(self.b(self.norm(self.a(x))))


@pytest.mark.parametrize("packed", [False, True])
def test_a_model_that_shares_what_the_file_does_not(tmp_path, packed):
    """Either weight would be lost, and the model predict something else."""
    path, x = tmp_path / "m.safetensors", torch.randn(3, 4)
    model = adq.calibrate_(adq.quantize_(Pair(False), adq.ADQConfig(first_last_bits=3)), [x]).eval()
    adq.save(model, path, packed=packed)
    message = "another architecture: b.* is not a.* in the file, the model shares them"
    assert_refused(path, message, model=Pair(True))
    assert torch.equal(adq.load(path, Pair(False))(x), model(x))
    assert torch.equal(adq.load(path, Pair(False, norms=True))(x), model(x))  # their values are the same
    with torch.no_grad():
        model.tail.weight.mul_(2)
    adq.save(model, path, packed=packed)
    assert_refused(path, "tail.weight is not norm.weight in the file", model=Pair(False, norms=True))


@pytest.mark.parametrize("config", [{"bits": 2}, {"scale": "tensor"}])
def test_a_model_that_shares_weights_of_unlike_codebooks(tmp_path, config):
    path, x = tmp_path / "m.safetensors", torch.randn(3, 4)
    whole = adq.ADQConfig(first_last_bits=3, overrides={"b": {"weight": config}})
    adq.save(adq.calibrate_(adq.quantize_(Pair(False), whole), [x]), path, packed=True)
    assert_refused(path, "another architecture: b.* is not a.* in the file, the model shares them", model=Pair(True))


# ---- architectures -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"num_classes": 10**12}, "it would be far larger than the file's tensors"),
        ({"num_classes": 10**30}, "cannot be built"),
        ({"num_classes": -1}, "num_classes must be positive"),
        ({"kwargs": {"width": 10**6}}, "it would be far larger than the file's tensors"),
        ({"kwargs": {"width": "wide"}}, "cannot be built"),
        ({"kwargs": {"depth": 3}}, "cannot be built: .*unexpected keyword argument 'depth'"),
        ({"kwargs": {"checkpoint_path": "x.pth"}}, "create_model takes no checkpoint_path="),
        ({"name": "resnet20", "kwargs": {"depth": 6 * 10**12 + 2}}, "cannot be built"),
        ({"name": "torchvision/resnet50", "kwargs": {"width_per_group": 10**7}}, "it would be far larger"),
        ({"name": "torchvision/vit_b_16", "kwargs": {"image_size": 10**7}}, "cannot be built"),
        ({"name": "../../etc/passwd"}, "cannot be built: unknown architecture"),
    ],
)
def test_architectures_that_are_not_built(tmp_path, record, message):
    """The message comes within the memory of the process and a little: nothing is made of what is claimed."""
    path = tmp_path / "m.safetensors"
    torch.manual_seed(0)
    model = adq.quantize_(adq.create_model("digits_cnn", width=4))
    adq.save(model, path, packed=True)
    architecture = {**parts_of(path)["architecture"], **record}
    forge(path, path.read_bytes(), architecture=architecture)
    if architecture["name"].startswith("torchvision"):
        pytest.importorskip("torchvision")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=f"adq: .*m.safetensors names an architecture that .*{message}"):
        adq.load(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KiB


def test_an_architecture_of_many_small_layers(tmp_path, monkeypatch):
    """Its modules would take a thousand times what their tensors do."""
    path, made = tmp_path / "m.safetensors", []

    def norms(num_classes: int, depth: int) -> nn.Module:
        own = []
        for _ in range(depth):
            own.append(nn.BatchNorm1d(1))
            made.append(depth)
        return nn.Sequential(*own, nn.Linear(1, num_classes))

    monkeypatch.setattr(models, "_REGISTRY", dict(models._REGISTRY))
    adq.register_architecture("norms", norms)
    adq.save(adq.quantize_(adq.create_model("norms", 2, depth=1)), path, packed=True)
    forge(path, path.read_bytes(), architecture={"name": "norms", "num_classes": 2, "kwargs": {"depth": 20_000}})
    with pytest.raises(ValueError, match="far larger than the file's tensors"):
        adq.load(path)
    assert len(made) < 5_000


def test_an_unregistered_architecture(tmp_path):
    adq.save(trained(), tmp_path / "m.safetensors", architecture=RECORD)
    with pytest.raises(ValueError, match="unknown architecture 'artifact_net'"):
        adq.load(tmp_path / "m.safetensors")


def test_placeholders_are_not_fitted(monkeypatch, tmp_path, files):
    """Loading a file costs no Lloyd iterations."""
    (tmp_path / "m.safetensors").write_bytes(files[False])
    monkeypatch.setattr(WeightQuantizer, "_fit", lambda *args: pytest.fail("a codebook was fitted"))
    adq.load(tmp_path / "m.safetensors", Net())


class Failing(Net):
    """Its head loads nothing, and a cache of it is a list."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = [1]
        self.head.register_load_state_dict_pre_hook(self.fail)

    def fail(self, *args) -> None:
        self.cache.append(2)
        raise RuntimeError("of its own")


@pytest.mark.parametrize("packed", [False, True])
def test_a_model_that_fails_while_it_is_loaded(tmp_path, files, packed):
    path, model = tmp_path / "m.safetensors", Failing()
    path.write_bytes(files[packed])
    assert_refused(path, "of its own", RuntimeError, model)
    assert all(p.requires_grad for p in model.parameters()) and model.training and model.cache == [1]
    assert not model._forward_pre_hooks
    adq.quantize_(model)


@pytest.mark.parametrize("packed", [False, True])
def test_a_model_without_memory(tmp_path, files, packed):
    path = tmp_path / "m.safetensors"
    path.write_bytes(files[packed])
    with torch.device("meta"):
        model = Net()
    with pytest.raises(ValueError, match=r"has memory: on the meta device are stem.weight; .* and \d+ more"):
        adq.load(path, model)
    assert type(model.stem) is nn.Conv2d
    empty = model.to_empty(device="cpu")
    assert torch.equal(adq.load(path, empty)(images()), adq.load(path, Net())(images()))


def test_a_device_that_is_not_there(tmp_path, files):
    path, model = tmp_path / "m.safetensors", Net()
    path.write_bytes(files[False])
    with pytest.raises(RuntimeError, match="device"):
        adq.load(path, model, device="none")
    assert type(model.stem) is nn.Conv2d
