"""The model file: what comes back, what it weighs, and what is left when writing fails."""

from __future__ import annotations

import copy
import json
import math
import os

import pytest
import torch
from saved import RECORD, Net, images, parts_of, read, save_version_1, tensors_of, train, trained
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import adq
from adq import ADQConfig, artifact, container, models
from adq.convert import is_packed
from adq.functional import unpack


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(models, "_REGISTRY", dict(models._REGISTRY))
    adq.register_architecture("artifact_net", Net, num_classes=3)


CONFIGS = [
    {"bits": 3},
    {"bits": 1, "scale": "tensor"},
    {"bits": 4, "levels": "symmetric", "snap": "int8"},
    {"bits": 5, "update": "gradient"},
    {"bits": 2, "update": "frozen", "init": "uniform", "refine": False},
]


# ---- round trips -------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", CONFIGS, ids=lambda weight: "-".join(map(str, weight.values())))
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("source", ["caller", "record"])
def test_round_trip_predicts_the_same(tmp_path, registered, weight, packed, source):
    model, path = trained(**weight), tmp_path / "deep" / "model.safetensors"
    assert adq.save(model, path, packed=packed, architecture=RECORD) == path
    loaded = adq.load(path, Net() if source == "caller" else None)
    assert not loaded.training
    assert torch.equal(loaded(images(7)), model(images(7)))
    kinds = [type(module) for module in (adq.pack_(copy.deepcopy(model)) if packed else model).modules()]
    assert [type(module) for module in loaded.modules()] == kinds
    for name in ("stem", "body", "head"):
        ours, theirs = loaded.get_submodule(name), model.get_submodule(name)
        assert ours.weight_quantizer.config == theirs.weight_quantizer.config
        assert ours.weight_quantizer.pinned == theirs.weight_quantizer.pinned
        assert ours.input_quantizer.config == theirs.input_quantizer.config
    state = model.state_dict()
    if not packed:
        assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    else:
        quantized = {name: model.get_submodule(name).quantized_weight() for name in ("stem", "body", "head")}
        assert all(torch.equal(loaded.get_submodule(name).weight, value) for name, value in quantized.items())
        assert not any(tensor.requires_grad for tensor in loaded.parameters())
        adq.save(loaded, tmp_path / "again.safetensors", packed=True, architecture=RECORD)
        assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("weight", CONFIGS[:4], ids=lambda weight: "-".join(map(str, weight.values())))
def test_a_plain_file_trains_on_identically(tmp_path, weight):
    model = trained(**weight)
    adq.save(model, tmp_path / "m.safetensors")
    loaded = adq.load(tmp_path / "m.safetensors", Net())
    one, other = train(model).state_dict(), train(loaded).state_dict()
    assert list(one) == list(other)
    assert [key for key in one if not torch.equal(one[key], other[key])] == []
    assert int(loaded.body.weight_quantizer.steps) == 6


def test_an_architecture_of_create_model_is_noted(tmp_path):
    torch.manual_seed(0)
    model = adq.quantize_(adq.create_model("digits_cnn", num_classes=4, width=4))
    adq.calibrate_(model, [torch.randn(4, 1, 8, 8)]).eval()
    x = torch.randn(2, 1, 8, 8)
    for packed in (False, True):
        adq.save(model, tmp_path / "m.safetensors", packed=packed)
        loaded = adq.load(tmp_path / "m.safetensors")
        assert torch.equal(loaded(x), model(x))
        assert loaded.adq_architecture == {"name": "digits_cnn", "num_classes": 4, "kwargs": {"width": 4}}


def test_other_bits_layers_in_float_and_an_uncalibrated_model(tmp_path):
    torch.manual_seed(0)
    model = adq.quantize_(Net(), ADQConfig(overrides={"head": None, "stem": {"weight": None}}))
    adq.apply_allocation_(model, {"body": 2})
    adq.save(model, tmp_path / "m.safetensors")
    loaded = adq.load(tmp_path / "m.safetensors", Net())
    assert type(loaded.head) is nn.Linear
    assert isinstance(loaded.stem.weight_quantizer, nn.Identity)
    assert loaded.body.weight_quantizer.bits == 2
    with pytest.raises(RuntimeError, match="layer 'stem' is not calibrated"):
        loaded(images())


class Tied(nn.Module):
    """Two layers that share a weight; with ``embedding``, the last one shares that of a layer in float."""

    def __init__(self, embedding: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 8)
        self.a, self.b, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight
        if embedding:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.b(torch.relu(self.a(self.embed(x))))))


@pytest.mark.parametrize("embedding", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_shared_weights(tmp_path, packed, embedding):
    torch.manual_seed(0)
    model, x = Tied(embedding), torch.arange(8)
    adq.calibrate_(adq.quantize_(model, ADQConfig(first_last_bits=3)), [x]).eval()
    adq.save(model, tmp_path / "m.safetensors", packed=packed)
    loaded = adq.load(tmp_path / "m.safetensors", Tied(embedding))
    assert torch.equal(loaded(x), model(x))
    assert (loaded.a.weight is loaded.b.weight) != packed
    assert loaded.a.weight_quantizer is loaded.b.weight_quantizer
    stored = tensors_of(tmp_path / "m.safetensors")
    assert ("head.codes" in stored) == (packed and not embedding)
    assert "b.codes" not in stored
    if packed:
        assert parts_of(tmp_path / "m.safetensors")["aliases"]["b.codes"] == "a.codes"
        assert loaded.b.codes is loaded.a.codes


class Repeated(nn.Module):
    """A block that is registered twice, with a layer norm in float, and a layer that has a second name."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.MultiheadAttention(8, 2))
        self.stem, self.blocks, self.head = nn.Linear(8, 8), nn.ModuleList([block, block]), nn.Linear(8, 8)
        self.tail = self.head

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for linear, norm, attention in self.blocks:
            x = norm(linear(x))
            x = x + attention(x, x, x)[0]
        return self.tail(torch.relu(self.head(x)))


@pytest.mark.parametrize("packed", [False, True])
def test_layers_that_are_registered_twice(tmp_path, packed):
    torch.manual_seed(0)
    model, x, path = Repeated(), torch.randn(4, 3, 8), tmp_path / "m.safetensors"
    adq.calibrate_(adq.quantize_(model, ADQConfig()), [x]).eval()
    adq.save(model, path, packed=packed)
    loaded = adq.load(path, Repeated())
    assert torch.equal(loaded(x), model(x))
    assert loaded.tail is loaded.head and loaded.blocks[0] is loaded.blocks[1]
    stored = tensors_of(path)
    assert not any(key.startswith(("tail.", "blocks.1.")) for key in stored)
    codes = {"stem.codes", "blocks.0.0.codes", "blocks.0.2.codes", "blocks.0.2.out_proj.codes", "head.codes"}
    assert {key for key in stored if key.endswith(".codes")} == (codes if packed else set())
    again = adq.save(loaded, tmp_path / "again.safetensors", packed=packed)
    assert again.read_bytes() == path.read_bytes()


# ---- the file ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_the_file_is_json_and_numbers(tmp_path, packed):
    """Every byte is accounted for by the header and the tensors that it lists: there is no room for a pickle."""
    path = tmp_path / "m.safetensors"
    adq.save(trained(), path, packed=packed, architecture=RECORD)
    header, data = read(path)
    metadata = header.pop("__metadata__")
    assert metadata["format"] == "adq-model"
    assert metadata["format_version"] == "2"
    parts = parts_of(path)
    assert parts["architecture"] == RECORD
    assert parts["layers"]["body"]["weight"]["bits"] == 3
    assert ("header" in header) == packed
    assert packed or json.loads(metadata["header"]) == parts
    spans = sorted(tuple(entry["data_offsets"]) for entry in header.values())
    assert [start for start, _ in spans] == [0, *(end for _, end in spans[:-1])]
    assert spans[-1][1] == len(data)
    size = {"F32": 4, "U8": 1, "I64": 8, "BOOL": 1}
    assert all(
        math.prod(entry["shape"]) * size[entry["dtype"]] == entry["data_offsets"][1] - entry["data_offsets"][0]
        for entry in header.values()
    )
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("bits", [1, 3, 5, 8])
def test_packed_size(tmp_path, bits):
    model, path = trained(bits=bits), tmp_path / "m.safetensors"
    adq.save(model, path, packed=True)
    entries, data = read(path)
    begin, end = entries["header"]["data_offsets"]
    weights = {"stem": (54, 8, 6), "body": (270, bits, 5), "head": (15, 8, 3)}  # numel, bits, scales
    codes = sum(math.ceil(n * b / 8) for n, b, _ in weights.values())
    tables = sum(4 * (2**b + scales) for _, b, scales in weights.values())
    activations = sum(4 * (4 + (2**b - 1 if b <= 5 else 1)) + 1 for _, b, _ in ((0, 8, 0), (0, 3, 0), (0, 8, 0)))
    others = 4 * (6 + 5 + 3) + 4 * 4 * 6  # biases and batch normalization
    assert len(data) - (end - begin) == codes + tables + activations + others == artifact.packed_bytes(model)
    stored = tensors_of(path)
    assert not any(key.endswith(("ema_count", "ema_total", "steps", "tracked", "body.weight")) for key in stored)
    quantizer = model.body.weight_quantizer
    code = unpack(stored["body.codes"], bits, (6, 5, 3, 3)).long()
    assert torch.equal(quantizer.codebook[code] * quantizer.scale, model.body.quantized_weight())


def test_packed_size_of_a_resnet20(tmp_path):
    """Within 2 % of what the bits promise, the header included."""
    torch.manual_seed(0)
    model, path = adq.quantize_(adq.create_model("resnet20")), tmp_path / "m.safetensors"
    adq.save(model, path, packed=True)
    quantizers = adq.convert.weight_quantizers(model).values()
    codes = sum(layer.weight.numel() * quantizer.bits for layer, quantizer in quantizers) / 8
    rest = sum(tensor.nbytes for key, tensor in tensors_of(path).items() if not key.endswith(".codes"))
    assert path.stat().st_size <= 1.02 * (codes + rest)


def test_the_same_model_gives_the_same_bytes(tmp_path):
    model, files = trained(), []
    for packed in (False, True, False, True):
        adq.save(model, tmp_path / "m.safetensors", packed=packed)
        files.append((tmp_path / "m.safetensors").read_bytes())
    assert files[:2] == files[2:]


# ---- version 1 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", CONFIGS[:4], ids=lambda weight: "-".join(map(str, weight.values())))
@pytest.mark.parametrize("packed", [False, True])
def test_version_1_loads(tmp_path, registered, weight, packed):
    model = trained(**weight)
    save_version_1(model, tmp_path / "old.safetensors", packed, RECORD)
    loaded = adq.load(tmp_path / "old.safetensors")
    assert torch.equal(loaded(images(7)), model(images(7)))
    adq.save(loaded, tmp_path / "new.safetensors", packed=packed, architecture=RECORD)
    assert torch.equal(adq.load(tmp_path / "new.safetensors")(images(7)), model(images(7)))


@pytest.mark.parametrize("packed", [False, True])
def test_version_1_with_shared_weights(tmp_path, packed):
    torch.manual_seed(0)
    model, x = Tied(False), torch.arange(8)
    adq.calibrate_(adq.quantize_(model, ADQConfig(first_last_bits=3)), [x]).eval()
    save_version_1(model, tmp_path / "old.safetensors", packed)
    loaded = adq.load(tmp_path / "old.safetensors", Tied(False))
    assert torch.equal(loaded(x), model(x))
    assert loaded.a.weight_quantizer is loaded.b.weight_quantizer


# ---- saving fails ------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("spoil", ["norm.weight", "head.bias", "body.weight_quantizer.codebook"])
def test_nan_is_not_saved_and_the_old_file_stays(tmp_path, packed, spoil):
    path = tmp_path / "m.safetensors"
    model = trained()
    adq.save(model, path)
    before = path.read_bytes()
    model.state_dict()[spoil].view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match=f"not saved: {spoil} holds NaN or infinity"):
        adq.save(model, path, packed=packed)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


class Masked(nn.Module):
    """A buffer of its own holds what no weight may."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))
        self.register_buffer("same", self.mask)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b((self.a(x) + self.mask).softmax(-1))


@pytest.mark.parametrize("packed", [False, True])
def test_buffers_of_the_model_may_be_infinite_but_no_nan(tmp_path, packed):
    x = torch.randn(4, 4)
    model = adq.calibrate_(adq.quantize_(Masked()), [x]).eval()
    adq.save(model, tmp_path / "m.safetensors", packed=packed)
    assert torch.equal(adq.load(tmp_path / "m.safetensors", Masked())(x), model(x))
    model.mask[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not saved: mask holds NaN"):
        adq.save(model, tmp_path / "m.safetensors", packed=packed)
    model.mask[0, 0] = 0.0
    model.a.bias.data[0] = torch.inf
    with pytest.raises(ValueError, match="not saved: a.bias holds NaN or infinity"):
        adq.save(model, tmp_path / "m.safetensors", packed=packed)


@pytest.mark.parametrize("packed", [False, True])
def test_an_architecture_that_the_model_is_no_more_is_not_noted(tmp_path, packed):
    model = adq.create_model("digits_cnn")
    model.linear = nn.Linear(64, 7)
    model = adq.calibrate_(adq.quantize_(model), [torch.randn(4, 1, 8, 8)]).eval()
    with pytest.warns(UserWarning, match="is no 'digits_cnn' of 10 classes any more, so the file"):
        adq.save(model, tmp_path / "m.safetensors", packed=packed)
    with pytest.raises(ValueError, match=r"names no registered architecture; pass the float model"):
        adq.load(tmp_path / "m.safetensors")
    float_model = adq.create_model("digits_cnn", 7)
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(adq.load(tmp_path / "m.safetensors", float_model)(x), model(x))


def test_architectures_that_nothing_can_be_built_from_are_not_saved(tmp_path):
    for record, message in (({"name": "digits_cnn"}, "lacks num_classes"), ("digits_cnn", "must be a mapping")):
        with pytest.raises(ValueError, match=message):
            adq.save(trained(), tmp_path / "m.safetensors", architecture=record)
    assert not list(tmp_path.iterdir())


def test_a_run_folder_that_has_but_a_packed_model_is_that(tmp_path):
    model = adq.calibrate_(adq.quantize_(Masked()), [torch.randn(4, 4)]).eval()
    adq.save(model, tmp_path / "model-packed.safetensors", packed=True)
    x = torch.randn(4, 4)
    assert torch.equal(adq.load(tmp_path, Masked())(x), model(x))


def test_a_run_folder_is_the_model_in_it(tmp_path):
    model = adq.calibrate_(adq.quantize_(adq.create_model("digits_cnn")), [torch.randn(4, 1, 8, 8)])
    adq.save(model, tmp_path / "model.safetensors")
    assert torch.equal(adq.load(tmp_path).conv1.weight, model.conv1.weight)


def test_what_is_no_tensor_is_not_saved(tmp_path):
    model = trained()
    type(model).get_extra_state = lambda self: {"epoch": 3}
    try:
        with pytest.raises(ValueError, match="not saved: _extra_state is dict, which files do not hold"):
            adq.save(model, tmp_path / "m.safetensors")
    finally:
        del type(model).get_extra_state


@pytest.mark.parametrize("existing", [False, True])
def test_a_failing_write_leaves_nothing_behind(tmp_path, monkeypatch, existing):
    path, model = tmp_path / "m.safetensors", trained()
    if existing:
        adq.save(model, path)
    before = path.read_bytes() if existing else None

    def half_written(file, tensors, metadata):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(container, "_write_safetensors", half_written)
    with pytest.raises(OSError, match="No space left"):
        adq.save(model, path, packed=True)
    assert list(tmp_path.iterdir()) == ([path] if existing else [])
    assert not existing or path.read_bytes() == before


def test_a_float_model_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="the model is not quantized"):
        adq.save(Net(), tmp_path / "m.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "wrap", [torch.compile, nn.DataParallel, lambda model: nn.DataParallel(torch.compile(model)), AveragedModel]
)
def test_wrappers_are_left_out_of_files(tmp_path, wrap):
    torch.manual_seed(0)
    model = adq.calibrate_(adq.quantize_(adq.create_model("digits_cnn")), [torch.randn(4, 1, 8, 8)])
    adq.save(model, tmp_path / "plain.safetensors")
    adq.save(wrap(model), tmp_path / "wrapped.safetensors")
    assert (tmp_path / "wrapped.safetensors").read_bytes() == (tmp_path / "plain.safetensors").read_bytes()
    wrapped = wrap(adq.create_model("digits_cnn")).train()
    assert adq.load(tmp_path / "plain.safetensors", wrapped) is wrapped and not wrapped.training
    loaded, expected = artifact.unwrapped(wrapped).state_dict(), model.state_dict()
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)


@pytest.mark.parametrize("quantizer", ["weight_quantizer", "input_quantizer"])
def test_disabled_quantizers_are_refused(tmp_path, quantizer):
    model = adq.calibrate_(adq.quantize_(adq.create_model("digits_cnn")), [torch.randn(4, 1, 8, 8)])
    getattr(model.conv2, quantizer).enabled = False
    for refused in (
        lambda: adq.save(model, tmp_path / "file"),
        lambda: adq.save(model, tmp_path / "file", packed=True),
        lambda: adq.pack_(model),
    ):
        with pytest.raises(ValueError, match="a quantizer of layer 'conv2' is disabled"):
            refused()
    assert not (tmp_path / "file").exists() and not is_packed(model)


@pytest.mark.parametrize("packed", [False, True])
def test_a_model_that_asks_for_its_version(tmp_path, packed):
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    model, path = adq.create_model("mnasnet0_5", 10), tmp_path / "m.safetensors"
    adq.save(adq.quantize_(model, ADQConfig(activation=None)), path, packed=packed)
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(adq.load(path)(x), model.eval()(x))


class Counting(nn.Module):
    """Its own buffer has the name of what batch norms count."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.InstanceNorm2d(4, track_running_stats=True)
        self.register_buffer("num_batches_tracked", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) * self.num_batches_tracked


def test_packed_files_leave_out_counters_of_norms_alone(tmp_path, monkeypatch):
    path, model = tmp_path / "m.safetensors", adq.quantize_(Counting(), ADQConfig(activation=None)).eval()
    model.num_batches_tracked.fill_(3.0)
    adq.save(model, path, packed=True)
    assert [key for key in tensors_of(path) if "tracked" in key] == ["num_batches_tracked"]
    assert torch.equal(adq.load(path, Counting())(images()), model(images()))
    monkeypatch.setattr(artifact, "_counters", lambda model: {key for key in model.state_dict() if "tracked" in key})
    adq.save(model, path, packed=True)
    monkeypatch.undo()
    assert adq.load(path, Counting()).num_batches_tracked == 0  # as files had it before


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3), torch.jit.script(nn.BatchNorm2d(4))
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.conv(x))))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
@pytest.mark.parametrize("packed", [False, True])
def test_a_model_with_a_torchscript_module(tmp_path, packed):
    path, model = tmp_path / "m.safetensors", adq.calibrate_(adq.quantize_(Scripted()), [images()]).eval()
    adq.save(model, path, packed=packed)
    x = images()
    assert torch.equal(adq.load(path, Scripted())(x), model(x))
    failing = Scripted()
    failing.head.register_load_state_dict_pre_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        adq.load(path, failing)
    assert type(failing.conv) is nn.Conv2d
    assert torch.equal(failing(x), failing(x))


class Vectors(nn.Module):
    """Has modules of its own that are called as adq's quantizers are."""

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.encoder, self.vector_quantizer = nn.Linear(12, 8), nn.Embedding(5, 8)
        self.weight_quantizer, self.input_quantizer = nn.LayerNorm(8), nn.Module()
        self.input_quantizer.register_buffer("calibrated", torch.tensor(0.25))
        self.head = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        z = self.weight_quantizer(self.encoder(x))
        nearest = self.vector_quantizer((z @ self.vector_quantizer.weight.T).argmax(-1))
        return self.head(nearest + z * self.input_quantizer.calibrated)


@pytest.mark.parametrize("packed", [False, True])
def test_modules_that_are_called_as_quantizers_are(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "_REGISTRY", dict(models._REGISTRY))
    adq.register_architecture("vectors", Vectors, num_classes=3)
    torch.manual_seed(0)
    x, model = torch.randn(6, 12), adq.create_model("vectors", 3)
    numbers = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    adq.calibrate_(adq.quantize_(model), [x]).eval()
    assert adq.summary(model).bytes_float == 4 * numbers
    assert adq.sensitivity(model, [x], estimator="kl").float_weights == numbers - 1 - 12 * 8 - 8 * 3
    path = adq.save(model, tmp_path / "m.safetensors", packed=packed)
    assert torch.equal(adq.load(path)(x), model(x))
    adq.save(model.bfloat16(), path, packed=packed)
    loaded = adq.load(path, Vectors())
    assert torch.equal(loaded.vector_quantizer.weight, model.vector_quantizer.weight.float())
