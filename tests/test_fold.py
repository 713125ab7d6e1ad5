"""Batch norms folded into packed weights: the same function, fewer numbers, and files that keep it so."""

from __future__ import annotations

import copy
import operator
import pickle
from collections import OrderedDict, deque
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from saved import forge, parts_of, tensors_of
from torch import Tensor, nn

import adq
from adq import ActivationConfig, ADQConfig, WeightConfig

KINDS = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), nn.BatchNorm1d, (5, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d, (5, 4, 7, 7)),
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d, (5, 4, 7, 7)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2, bias=False), nn.BatchNorm3d, (5, 4, 4, 4, 4)),
    "transposed1d": (lambda: nn.ConvTranspose1d(4, 6, 3, bias=False), nn.BatchNorm1d, (5, 4, 9)),
    "transposed2d": (lambda: nn.ConvTranspose2d(4, 6, 3), nn.BatchNorm2d, (5, 4, 7, 7)),
    "transposed3d": (lambda: nn.ConvTranspose3d(4, 6, 2, bias=False), nn.BatchNorm3d, (5, 4, 4, 4, 4)),
}


def settled(norm: nn.Module) -> nn.Module:
    """A batch norm as training leaves it: some factors are negative, one is zero."""
    generator = torch.Generator().manual_seed(3)

    def draw() -> Tensor:
        return torch.randn(norm.num_features, generator=generator)

    with torch.no_grad():
        norm.running_mean.copy_(draw())
        norm.running_var.copy_(draw().square() + 0.1)
        if norm.affine:
            norm.weight.copy_(draw())
            norm.weight[1] = 0.0
            norm.bias.copy_(draw())
    return norm


class Residual(nn.Module):
    """Two blocks, one with a shortcut that has a batch norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), settled(nn.BatchNorm2d(8))
        self.body, self.body_norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), settled(nn.BatchNorm2d(8))
        self.short = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), settled(nn.BatchNorm2d(8, affine=False)))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.body_norm(self.body(x)) + self.short(x))
        return self.head(x.mean((2, 3)))


SIGNED = {"re:.*": {"activation": {"signed": True, "bits": 8}}}
FOLDED = {"stem": "norm", "body": "body_norm", "short.0": "short.1"}
X = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def residual(activation: int | None = 4, **weight) -> nn.Module:
    torch.manual_seed(0)
    config = ADQConfig(WeightConfig(**weight), None if activation is None else ActivationConfig(bits=activation))
    model = adq.quantize_(Residual(), config)
    return adq.calibrate_(model, [X], batch_norm=False).eval()


def without(norm: nn.Module, name: str) -> nn.Module:
    """A batch norm without its weight or its bias; torch 2.14 makes such ones."""
    norm.register_parameter(name, None)
    return norm


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_batch_norms_without_weight_or_bias(name, tmp_path):
    def make() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Conv2d(3, 6, 3), without(settled(nn.BatchNorm2d(6)), name), nn.ReLU())

    model = adq.quantize_(make(), ADQConfig(WeightConfig(snap="int8")))
    adq.calibrate_(model, [X], batch_norm=False).eval()
    adq.save(model, tmp_path / "m.safetensors", packed=True, fold_batch_norm=True)
    loaded = adq.load(tmp_path / "m.safetensors", make())
    for other in (adq.to_integer(model, X), loaded, adq.fold_batch_norm_(copy.deepcopy(model))):
        torch.testing.assert_close(other(X), model(X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", ["tensor", "channel"])
@pytest.mark.parametrize("kind", KINDS)
def test_weight_and_bias_take_factor_and_shift(kind, scale):
    """Against the batch norm in float64."""
    make, norm, shape = KINDS[kind]
    torch.manual_seed(1)
    model = nn.Sequential(make(), settled(norm(6)))
    adq.quantize_(model, ADQConfig(WeightConfig(scale=scale), activation=None)).eval()
    x = torch.randn(shape, dtype=torch.float64)
    oracle = make()
    oracle.load_state_dict({**model[0].state_dict(), "weight": model[0].quantized_weight()}, strict=False)
    with torch.no_grad():
        expected = copy.deepcopy(model[1]).double()(oracle.double()(x))
        result = adq.fold_batch_norm_(model)(x.float())
    assert type(model[1]) is nn.Identity and model.adq_folded == {"0": "1"}
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)
    assert bool((model[0].weight_quantizer.scale < 0).any()) and not any(p.requires_grad for p in model.parameters())


def test_a_model_cast_to_bfloat16():
    model = adq.quantize_(nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), settled(nn.BatchNorm2d(6))))
    adq.calibrate_(model, [torch.randn(4, 4, 7, 7)], batch_norm=False)
    folded = adq.fold_batch_norm_(model.bfloat16())
    assert folded[0].bias.dtype == folded[0].weight.dtype == torch.bfloat16
    assert folded[0].weight_quantizer.scale.dtype == torch.float32


def test_predictions_and_sizes():
    model = residual()
    before = model(X)
    folded = adq.fold_batch_norm_(copy.deepcopy(model))
    assert folded.adq_folded == FOLDED
    assert not any("norm" in key or "short.1" in key for key in folded.state_dict())
    off = (folded(X) - before).abs().amax(1)
    assert (off <= 1e-4).float().mean() >= 0.9  # elsewhere an activation took the next level
    assert torch.equal(folded(X).argmax(1), before.argmax(1))
    exact, without = residual(activation=None), adq.fold_batch_norm_(residual(activation=None))
    torch.testing.assert_close(without(X), exact(X), rtol=1e-5, atol=1e-5)
    assert adq.summary(folded).average_bits_quantized == adq.summary(model).average_bits_quantized


class Odd(nn.Module):
    """Batch norms that must stay, each for a reason of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.after_twice = nn.Conv2d(3, 3, 1), settled(nn.BatchNorm2d(3))
        self.read_twice, self.after_read = nn.Conv2d(3, 3, 1), settled(nn.BatchNorm2d(3))
        self.one, self.other, self.common = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), settled(nn.BatchNorm2d(3))
        self.tied, self.after_tied = nn.Conv2d(3, 3, 1), settled(nn.BatchNorm2d(3))
        self.with_tied = nn.Conv2d(3, 3, 1)
        self.with_tied.weight = self.tied.weight
        self.grouped, self.after_grouped = nn.ConvTranspose2d(3, 3, 1, groups=3), settled(nn.BatchNorm2d(3))
        self.between, self.after_relu = nn.Conv2d(3, 3, 1), settled(nn.BatchNorm2d(3))
        self.batch, self.after_batch = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)
        self.linear, self.after_linear = nn.Linear(3, 3), settled(nn.BatchNorm1d(3))
        self.good, self.after_good = nn.Conv2d(3, 3, 1), settled(nn.BatchNorm2d(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.after_twice(self.twice(self.twice(x)))
        y = self.read_twice(x)
        x = self.after_read(y) + y
        x = self.common(self.one(x)) + self.common(self.other(x))
        x = self.after_tied(self.tied(x)) + self.with_tied(x)
        x = self.after_grouped(self.grouped(x))
        x = self.after_relu(self.between(x).relu())
        x = self.after_batch(self.batch(x))
        x = self.after_good(self.good(x))
        return self.after_linear(self.linear(x.mean((2, 3))))


def test_batch_norms_that_stay():
    torch.manual_seed(0)
    model = adq.quantize_(Odd(), ADQConfig(activation=None)).eval()
    x = torch.randn(5, 3, 4, 4)
    before = model(x)
    assert adq.fold_batch_norm_(model).adq_folded == {"good": "after_good"}
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) if x.sum() > 0 else x


def test_refusals(tmp_path):
    path = tmp_path / "m.safetensors"
    plain = adq.quantize_(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), ADQConfig(activation=None))
    with pytest.raises(ValueError, match="no batch norm to fold: no quantized convolution is read by one of"):
        adq.fold_batch_norm_(plain)
    untraceable = adq.quantize_(Untraceable(), ADQConfig(activation=None))
    with pytest.raises(ValueError, match=r"cannot fold batch norms: torch\.fx cannot trace the model"):
        adq.save(untraceable, path, packed=True, fold_batch_norm=True)
    for model in (plain, untraceable):
        assert model.training and not adq.convert.is_packed(model)
    with pytest.raises(ValueError, match="not quantized"):
        adq.fold_batch_norm_(Residual())
    with pytest.raises(ValueError, match="folded into packed files alone"):
        adq.save(residual(), path, fold_batch_norm=True)
    assert not list(tmp_path.iterdir())


# ---- files -------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path) -> Path:
    return adq.save(residual(), tmp_path / "m.safetensors", packed=True, fold_batch_norm=True)


def test_a_file_goes_round(file):
    """Loaded into the float network, batch norms and all; saved again, and loaded from there."""
    model = residual()
    adq.save(model, file, packed=True)
    unfolded = file.stat().st_size
    adq.save(model, file, packed=True, fold_batch_norm=True)
    assert file.stat().st_size < unfolded and not adq.convert.is_packed(model)
    folded = adq.fold_batch_norm_(model)
    loaded = adq.load(file, Residual())
    assert torch.equal(loaded(X), folded(X)) and loaded.adq_folded == FOLDED
    again = adq.save(loaded, file.with_name("again.safetensors"), packed=True)
    assert again.read_bytes() == file.read_bytes()


def test_copies_of_a_graph_of_torch_fx_know_what_is_folded(file):
    def make() -> nn.Module:
        return torch.fx.symbolic_trace(Residual())

    model = adq.load(file, make())
    for twin in (copy.deepcopy(model), copy.deepcopy(pickle.loads(pickle.dumps(model)))):
        again = adq.save(twin, file.with_name("again.safetensors"), packed=True)
        assert torch.equal(adq.load(again, make())(X), model(X))
    assert copy.deepcopy(model).adq_folded == FOLDED


def test_a_registered_architecture(tmp_path):
    torch.manual_seed(0)
    model = adq.quantize_(adq.create_model("resnet20"))
    adq.calibrate_(model, [torch.randn(4, 3, 32, 32)])
    file = adq.save(model, tmp_path / "m.safetensors", packed=True, fold_batch_norm=True)
    assert not [key for key in tensors_of(file) if "bn" in key]
    x = torch.randn(3, 3, 32, 32)
    assert torch.equal(adq.load(file)(x), adq.fold_batch_norm_(model)(x))


@pytest.mark.parametrize(
    ("folded", "message"),
    [
        ({"stem": 3}, "damaged header: folded is"),
        ([], "damaged header"),
        ({"stem": "norm", "body": "norm"}, "folded batch norms do not have a layer of codes each"),
        ({"norm": "stem"}, "do not have a layer of codes each"),
        ({"stem": "head"}, "head cannot be folded into stem: Linear is no batch norm of 8 channels"),
        ({"head": "norm"}, "norm cannot be folded into head: .*Linear is no convolution"),
        ({"stem": "other"}, "other cannot be folded into stem: there is no such batch norm"),
        ({"stem": "norm"}, "missing body_norm.bias"),
    ],
)
def test_damaged_parts(file, folded, message):
    forge(file, file.read_bytes(), folded=folded)
    model = Residual()
    with pytest.raises(ValueError, match=message):
        adq.load(file, model)
    assert isinstance(model.norm, nn.BatchNorm2d) and type(model.stem) is nn.Conv2d
    assert parts_of(file)["folded"] == folded


# ---- where it ships ----------------------------------------------------------------------------------


def test_integers_of_a_folded_model():
    model = adq.fold_batch_norm_(residual(snap="int8"))
    integer = adq.to_integer(model, X)
    assert len(integer.adq_integer.integer) == 4
    assert ((integer(X) - model(X)).abs().amax(1) <= 1e-4).float().mean() >= 0.9


@pytest.mark.parametrize("snap", ["int8", None])
def test_onnx_of_a_folded_model(tmp_path, snap):
    """Scales that became negative turn the integers round."""
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    model = adq.fold_batch_norm_(residual(snap=snap))
    report = adq.export_onnx(model, tmp_path / "m.onnx", X, [(X, torch.zeros(len(X)))], images=len(X))
    assert report.parity.images + report.parity.undecided == len(X)
    graph = onnx.load(report.path).graph
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    scales = [values[n.input[1]] for n in graph.node if n.op_type == "DequantizeLinear" and n.input[1] in values]
    assert scales and all((scale >= 0).all() for scale in scales)


def test_report_of_a_folded_model(tmp_path):
    page = adq.report(adq.fold_batch_norm_(residual()), tmp_path / "r.html").read_text()
    assert "PackedConv2d" in page and "nan" not in page


def test_the_command_folds(tmp_path):
    runner = pytest.importorskip("typer.testing").CliRunner()
    from adq.train.cli import app

    model = adq.quantize_(adq.create_model("digits_cnn", width=4))
    file = adq.save(model, tmp_path / "m.safetensors")
    out = tmp_path / "folded.safetensors"
    result = runner.invoke(app, ["export", str(file), str(out), "--fold-batch-norm"])
    assert result.exit_code == 0 and adq.load(out).adq_folded
    refused = runner.invoke(app, ["export", str(file), str(tmp_path / "m.onnx"), "--to", "onnx", "--fold-batch-norm"])
    assert refused.exit_code == 1 and "--fold-batch-norm is for --to packed" in refused.output


class TwoNames(nn.Module):
    """A batch norm that the model calls by its second name."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = settled(nn.BatchNorm2d(6)), nn.Conv2d(4, 6, 3)
        self.features = nn.Sequential(self.conv, self.norm, nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x).mean((2, 3))


def test_a_batch_norm_of_two_names_is_folded_once(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(5, 4, 7, 7)
    model = adq.calibrate_(adq.quantize_(TwoNames()), [x], batch_norm=False).eval()
    adq.save(model, tmp_path / "folded.safetensors", packed=True, fold_batch_norm=True)
    loaded = adq.load(tmp_path / "folded.safetensors", TwoNames())
    folded = adq.fold_batch_norm_(copy.deepcopy(model))
    with torch.no_grad():
        for other in (folded, loaded):
            torch.testing.assert_close(other(x), model(x), rtol=1e-5, atol=1e-5)
    assert isinstance(loaded.features[1], nn.Identity) and isinstance(folded.features[1], nn.Identity)


class Own(nn.BatchNorm2d):
    """Another function than a batch norm's."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * nn.functional.batch_norm(x, self.running_mean, self.running_var)


class Alike(nn.BatchNorm2d):
    """The same function."""


@pytest.mark.parametrize("kind", ["timm", "alike", "own"])
def test_batch_norms_that_are_not_torchs_own(kind, tmp_path):
    """Of timm's the activation, with its parameters, and the dropout stay."""
    options = {}
    if kind == "timm":
        layers = pytest.importorskip("timm.layers", reason="timm is not installed")
        options = {"act_layer": nn.PReLU, "inplace": False, "drop_layer": nn.Dropout}
    norm = layers.BatchNormAct2d if options else {"alike": Alike, "own": Own}[kind]

    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3), settled(norm(8, **options)), nn.Conv2d(8, 4, 1))

    torch.manual_seed(0)
    model = adq.calibrate_(adq.quantize_(make(), ADQConfig(overrides=SIGNED)), [X], batch_norm=False).eval()
    if kind == "own":
        with pytest.raises(
            ValueError, match="no batch norm to fold: no quantized convolution is read by one of torch or timm alone"
        ):
            adq.fold_batch_norm_(model)
        return
    if kind == "timm":
        nn.init.constant_(model[1].act.weight, 0.4)
    adq.save(model, tmp_path / "m.safetensors", packed=True, fold_batch_norm=True)
    loaded = adq.load(tmp_path / "m.safetensors", make())
    assert loaded.adq_folded == {"0": "1"} and not any(isinstance(m, nn.BatchNorm2d) for m in loaded.modules())
    torch.testing.assert_close(loaded(X), model(X), rtol=1e-4, atol=1e-4)
    assert ("1.act.weight" in tensors_of(tmp_path / "m.safetensors")) == (kind == "timm")


class Reads(nn.Module):
    """Reads a parameter that folding changes or takes away."""

    def __init__(self, read: str) -> None:
        super().__init__()
        self.read, self.conv, self.norm = read, nn.Conv2d(3, 4, 3), settled(nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + operator.attrgetter(self.read)(self).abs().sum()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("read", ["conv.bias", "conv.weight", "norm.bias", "norm.weight", "norm.running_mean"])
def test_batch_norms_stay_where_what_they_change_is_read(read, packed):
    model = adq.calibrate_(adq.quantize_(Reads(read)), [X], batch_norm=False).eval()
    model = adq.pack_(model) if packed else model
    with pytest.raises(ValueError, match="no batch norm to fold"):
        adq.fold_batch_norm_(model)


class Asks(nn.Module):
    """Two convolutions with batch norms, and code that asks something of one of them."""

    def __init__(self, ask: Callable[[Asks, Tensor], Tensor | float]) -> None:
        super().__init__()
        self.ask = ask
        self.c2, self.b2 = nn.Conv2d(4, 4, 3), settled(nn.BatchNorm2d(4))
        self.c1, self.b1 = nn.Conv2d(3, 4, 3, bias=False), settled(nn.BatchNorm2d(4))
        self.c3, self.b3 = nn.Conv2d(4, 4, 1), settled(nn.BatchNorm2d(4))
        self.c3.bias, self.b3.weight = self.c2.bias, self.b2.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b3(self.c3(self.b2(self.c2(self.b1(self.c1(x)))))) * self.ask(self, x.mean())


def first_dtype(model: nn.Module) -> float:
    return float(next(model.parameters()).dtype.is_floating_point)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("ask", "folded"),
    [
        (lambda model, x: model.c3.bias.sum(), "1"),
        (lambda model, x: model.b3.weight.abs().sum(), "1"),
        (lambda model, x: 1.0 if model.c1.bias is None else 2.0, "23"),
        (lambda model, x: 1.0 if model.c2.bias is not None else 2.0, "123"),
        (lambda model, x: sum(buffer.float().sum() for buffer in model.b1.buffers()), "23"),
        (lambda model, x: model.b1._buffers["running_mean"].sum(), "23"),
        (lambda model, x: first_dtype(model.b1), "23"),
        (lambda model, x: model.b1.eps, "23"),
        (lambda model, x: model.b1.num_features, "23"),
        (lambda model, x: model.c1.weight_quantizer.scale.mean(), "23"),
        (lambda model, x: x.to(model.c1.weight.dtype), "123"),
        (lambda model, x: first_dtype(model), "123"),
    ],
)
def test_what_code_asks_for_stays(ask, folded, packed):
    torch.manual_seed(0)
    model = adq.quantize_(Asks(ask), ADQConfig(activation=None)).eval()
    model = adq.pack_(model) if packed else model
    before = model(X[:2])
    assert adq.fold_batch_norm_(model).adq_folded == {f"c{i}": f"b{i}" for i in folded}
    torch.testing.assert_close(model(X[:2]), before, rtol=1e-4, atol=1e-4)


class Part(nn.Module):
    """A convolution that another part has too."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def test_a_convolution_that_a_part_with_hooks_calls_too_stays():
    model = Asks(lambda model, x: model.part(X[:2]).mean())
    model.part = Part(model.c1)
    model.part.register_forward_hook(lambda *args: None)
    model = adq.quantize_(model, ADQConfig(activation=None))
    assert adq.fold_batch_norm_(model).adq_folded == {"c2": "b2", "c3": "b3"}


class Detector(nn.Module):
    """A network as a part of another."""

    def __init__(self, part: nn.Module | None = None) -> None:
        super().__init__()
        self.part, self.norm = Residual() if part is None else part, nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.part(x))


@pytest.mark.parametrize("outer", [False, True])
def test_parts_that_move_keep_what_is_folded(outer, tmp_path):
    """Folded, and then put into another model; folded as a part of another, and then taken out."""
    path = tmp_path / "m.safetensors"
    if outer:
        model = adq.fold_batch_norm_(Detector(residual()).eval()).part
        loaded = adq.load(adq.save(model, path, packed=True), Residual())
    else:
        model = Detector(adq.fold_batch_norm_(residual())).eval()
        loaded = adq.load(adq.save(model, path, packed=True), Detector())
    assert torch.equal(loaded(X), model(X))


def test_a_part_without_the_place_of_its_batch_norm_is_not_saved(tmp_path):
    model = adq.fold_batch_norm_(residual())
    model.norm = nn.Identity()
    for part in (model, model.short[0]):
        with pytest.raises(ValueError, match="what took its place is no part of this model"):
            adq.save(part, tmp_path / "m.safetensors", packed=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_what_is_around_a_model_is_in_evaluation_mode_and_knows_what_is_folded(wrap):
    wrapped = wrap(residual()).train()
    assert adq.fold_batch_norm_(wrapped) is wrapped
    assert not wrapped.training and wrapped.adq_folded == FOLDED


class Frozen(OrderedDict):
    """What refuses to be changed, as the configurations of diffusers."""

    def refuse(self, *args, **kwargs) -> None:
        raise TypeError("frozen")

    __setitem__ = __delitem__ = update = clear = pop = refuse


class Remembers(nn.Module):
    """Keeps what it has computed, as caches and visualizations do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), settled(nn.BatchNorm2d(4))
        self.last, self.all, self.branches = None, [], False
        self.seen, self.table, self.config = deque([1], maxlen=2), OrderedDict(a=1, b=2), Frozen()
        self.levels = {"low": ([], [])}
        OrderedDict.__setitem__(self.config, "gain", 2.0)
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x)) * self.config["gain"]
        self.conv.result = y
        self.all.append(y)
        self.seen.extend([y, y])
        self.table["y"] = y
        self.levels["low"][1].append(y)
        self.table.move_to_end("a")
        self.runs += 1
        if self.last is not None:
            y = y + self.last
        if self.branches and y.sum() > 0:
            raise AssertionError
        self.last = y
        return y


@pytest.mark.parametrize("branches", [False, True])
def test_tracing_leaves_nothing_on_the_model(branches):
    model = adq.calibrate_(adq.quantize_(Remembers()), [X], batch_norm=False).eval()
    model.last, model.all, model.branches = None, [], branches
    model.seen, model.table = deque([1], maxlen=2), OrderedDict(a=1, b=2)
    model.levels["low"][1].clear()
    runs = int(model.runs)
    hook = model.conv.input_quantizer.register_forward_hook(lambda *args: None)
    if branches:
        with pytest.raises(ValueError, match="cannot trace"):
            adq.fold_batch_norm_(model)
    else:
        adq.fold_batch_norm_(model)
    assert model.seen == deque([1]) and list(model.table.items()) == [("a", 1), ("b", 2)]
    assert model.levels == {"low": ([], [])} and model.config == {"gain": 2.0} and int(model.runs) == runs > 0
    assert model.last is None and model.all == [] and not isinstance(model.conv.result, torch.fx.Proxy)
    hook.remove()
    assert not model.conv.input_quantizer._forward_hooks
