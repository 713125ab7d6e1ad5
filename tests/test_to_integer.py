"""Models that compute with integers: the same function as the quantized model, fused where the graph allows it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import adq
from adq import ActivationConfig, ADQConfig, WeightConfig
from adq.integer import _bias
from adq.nn import IntegerConv2d, IntegerLayer

WEIGHT = WeightConfig(bits=3, snap="int8", scale="channel")
SIGNED = {"activation": {"signed": True}}


def quantized(model: nn.Module, x: torch.Tensor, **overrides) -> nn.Module:
    """Calibrated, with batch-norm statistics and affine parameters of both signs, in evaluation mode."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            if module.affine:
                module.weight.data.normal_(0, 1, generator=generator)
                module.bias.data.normal_(0, 0.3, generator=generator)
    config = ADQConfig(WEIGHT, ActivationConfig(bits=3), overrides={"re:.*": SIGNED, **overrides})
    adq.quantize_(model, config)
    adq.calibrate_(model, [x], batch_norm=False)
    return model.eval()


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def integer(model: nn.Module, x: torch.Tensor, from_levels: int, **options) -> nn.Module:
    """The integer model, checked against the quantized one."""
    converted = adq.to_integer(model, x, **options)
    assert converted.adq_integer.from_levels == from_levels
    with torch.no_grad():
        torch.testing.assert_close(converted(x), model(x), rtol=1e-5, atol=2e-5)
    return converted


def kinds(model: nn.Module, kind: type[nn.Module]) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, kind)]


class Block(nn.Module):
    """A residual block, with a convolution on the shortcut or without."""

    def __init__(self, inputs: int, outputs: int, inplace: bool = True):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(outputs, affine=inplace)
        self.relu = nn.ReLU(inplace=inplace)
        self.downsample = None if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


def test_a_chain_runs_from_levels_to_levels():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 10, 3, padding=1), nn.BatchNorm2d(10), nn.ReLU(inplace=True),
        nn.Conv2d(10, 9, 3, stride=2, padding=1), nn.BatchNorm2d(9), nn.ReLU6(), nn.Dropout(),
        nn.Conv2d(9, 8, 1), nn.Hardtanh(-0.5, 0.25),
        nn.Conv2d(8, 8, 3, groups=8), nn.Identity(),
        nn.Conv2d(8, 6, 3, padding=2, dilation=2, groups=2),
    )  # fmt: skip
    x = images(2, 3, 8, 8)
    converted = integer(quantized(model, x), x, from_levels=4)
    layers = kinds(converted, IntegerLayer)
    assert [layer.epilogue.keep for layer in layers] == [False] * 4 + [True]
    assert [(layer.epilogue.low, layer.epilogue.high) for layer in layers[:3]] == [(0, torch.inf), (0, 6), (-0.5, 0.25)]
    assert len(list(converted.modules())) < 30  # nothing else is left but containers


@pytest.mark.parametrize("inplace", [True, False])
def test_residual_blocks(inplace):
    torch.manual_seed(0)
    x = images(2, 4, 6, 6)
    model = quantized(nn.Sequential(Block(4, 8, inplace), Block(8, 8, inplace), nn.Conv2d(8, 5, 1)), x)
    converted = integer(model, x, from_levels=4)
    called = [node for node in converted.graph.nodes if node.op == "call_module"]
    assert len(called) == 6  # two convolutions a block, one on a shortcut, the last: nothing besides
    assert sum(len(node.args) == 2 for node in called) == 2  # each block's sum is in an epilogue


def test_linear_layers_of_any_rank():
    torch.manual_seed(0)
    x = images(2, 5, 12)
    model = quantized(
        nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 7), nn.Dropout(0.5), nn.Linear(7, 3)), x
    )
    integer(model, x, from_levels=2)


def test_batch_norm_over_another_axis_than_the_outputs():
    torch.manual_seed(0)
    x = images(2, 5, 12)
    integer(quantized(nn.Sequential(nn.Linear(12, 6), nn.BatchNorm1d(5), nn.Linear(6, 3)), x), x, from_levels=0)
    x = images(9, 12)
    integer(quantized(nn.Sequential(nn.Linear(12, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)), x), x, from_levels=1)


@pytest.mark.parametrize("padding", [1, "same", "valid"])
def test_sequences(padding):
    torch.manual_seed(0)
    x = images(2, 6, 11)
    convs = [nn.Conv1d(6, 8, 3, padding=padding), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 5, 3, stride=2)]
    integer(quantized(nn.Sequential(*convs), x), x, from_levels=1)


class Sums(nn.Module):
    """Sums that are no residual ones."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.a = nn.Conv2d(4, 4, 3, padding=1)
        self.b = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        y = self.a(x)
        if self.kind == "broadcast":
            return self.b(F.relu(y + x.mean((2, 3), keepdim=True)))
        if self.kind == "number":
            return self.b(F.relu(y + 1))
        if self.kind == "twice":
            return self.b(F.relu(y + y))
        if self.kind == "alpha":
            return self.b(F.relu(torch.add(y, x, alpha=2)))
        if self.kind == "used again":
            return self.b(F.relu(y + x)) + y
        if self.kind == "in place":  # the shortcut changes what the layer has read
            x = x.clone()
            y = self.a(x)
            return self.b(F.relu(y + x.mul_(2)))
        raise AssertionError


@pytest.mark.parametrize("kind", ["broadcast", "number", "twice", "alpha", "used again", "in place"])
def test_other_sums_stay_as_they_are(kind):
    torch.manual_seed(0)
    x = images(2, 4, 5, 5)
    converted = integer(quantized(Sums(kind), x), x, from_levels=0)
    last = [n for n in converted.graph.nodes if n.op == "call_module"][-1]
    assert (len(last.args) == 2) == (kind == "used again")  # there it is b's sum


class Twice(nn.Module):
    """A layer that runs twice, into different functions."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return self.a(F.relu(self.a(input=x)))


def test_a_layer_that_runs_twice():
    torch.manual_seed(0)
    x = images(2, 4, 5, 5)
    assert len(kinds(integer(quantized(Twice(), x), x, from_levels=1), IntegerConv2d)) == 2


class Loops(nn.Module):
    """torch.fx cannot trace this."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return self.a(x) if x.sum() > 1e9 else self.a(x).relu()


def test_a_model_that_cannot_be_traced_is_converted_layer_by_layer():
    torch.manual_seed(0)
    x = images(2, 4, 5, 5)
    converted = integer(quantized(Loops(), x), x, from_levels=0)
    assert "cannot trace" in converted.adq_integer.unfused
    assert "not fused" in str(converted.adq_integer)


class Viewed(nn.Module):
    """Views what a convolution gives, in code that torch.fx can trace, or cannot."""

    def __init__(self, traceable: bool):
        super().__init__()
        self.traceable = traceable
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8 * 16, 5)
        self.c = nn.Conv1d(8, 8, 3, padding=1)

    def forward(self, x):
        if not self.traceable and x.sum() > 1e9:
            return x
        y = self.c(F.relu(self.a(x)).view(x.size(0), 8, 16))
        return self.b(y.view_as(x.new_empty((x.size(0), 128))))


@pytest.mark.parametrize("why", ["", "code", "hook"])
def test_results_can_be_viewed_as_those_of_float_layers(why):
    torch.manual_seed(0)
    x = images(2, 3, 4, 4)
    model = quantized(Viewed(why != "code"), x)
    if why == "hook":
        model.register_forward_hook(lambda *args: None)
    converted = integer(model, x, from_levels=0)
    assert bool(converted.adq_integer.unfused) == bool(why)
    if why:
        y = x.to(memory_format=torch.channels_last)
        assert converted.a(y).stride() == model.a(y).stride() != converted.a(x).stride() == model.a(x).stride()


def test_an_image_or_a_sequence_without_a_batch():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(-2), nn.Conv1d(4, 6, 3), nn.ReLU()
    )
    model = quantized(nn.Sequential(*model, nn.Conv1d(6, 5, 1, bias=False)), images(2, 3, 6, 6))
    converted = integer(model, images(3, 6, 6), from_levels=2)
    x = images(2, 3, 6, 6)
    torch.testing.assert_close(converted(x), model(x), rtol=1e-5, atol=2e-5)


class Reads(nn.Module):
    """Reads weights and biases of its layers: what they are, and their values."""

    def __init__(self, traceable: bool):
        super().__init__()
        self.traceable = traceable
        self.a, self.n, self.b = (
            nn.Conv2d(3, 8, 3, padding=1, groups=1),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 8, 3, groups=2),
        )
        self.c, self.d = nn.Conv1d(8, 20, 3), nn.Linear(2, 4)

    def forward(self, x):
        if not self.traceable and x.sum() > 1e9:
            return x
        y = F.relu(self.n(self.a(x.to(self.a.weight.dtype))) - self.a.bias.view(-1, 1, 1))
        y = self.b(y).flatten(2)[..., : self.c.weight.shape[-1] + 1]
        return self.d(self.c(y)) + self.d.bias + (self.d.weight.sum() if self.traceable else 0)


@pytest.mark.parametrize("traceable", [True, False])
def test_weights_and_biases_can_be_read(traceable):
    torch.manual_seed(0)
    x = images(2, 3, 6, 6)
    model = quantized(Reads(traceable), x)
    converted = integer(model, x, from_levels=int(traceable))
    assert bool(converted.adq_integer.unfused) != traceable
    assert sum("weight_of" in name for name, _ in converted.named_parameters()) == traceable
    for name in "abcd":
        ours, theirs = converted.get_submodule(name), model.get_submodule(name)
        torch.testing.assert_close(ours.weight, theirs.quantized_weight())
        assert name == "a" or torch.equal(ours.bias, theirs.bias)


class Alike(nn.Module):
    """Layers whose names differ by a dot, one that runs twice, and a name that the second run might take."""

    def __init__(self):
        super().__init__()
        self.a = nn.ModuleDict({"b": nn.Conv2d(3, 4, 3)})
        self.a_b, self.a_b_again = nn.Conv2d(4, 4, 3, padding=1), nn.Sigmoid()
        self.adq_weight_of_a_b = nn.Parameter(torch.ones(1))

    def forward(self, x):
        x = self.a_b(F.relu(self.a_b(F.relu(self.a["b"](x)))))
        read = self.a["b"].weight.abs().sum() + 3 * self.a_b.weight.abs().sum() + self.adq_weight_of_a_b
        return self.a_b_again(x) * read


def test_names_that_are_alike():
    torch.manual_seed(0)
    x = images(2, 3, 6, 6)
    converted = integer(quantized(Alike(), x), x, from_levels=2)
    assert isinstance(converted.a_b_again, nn.Sigmoid)
    assert sum("weight_of" in name for name, _ in converted.named_parameters()) == 3


def test_float_outputs_are_kept_where_they_are_read():
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))

        def forward(self, x):
            y = F.relu(self.a(x))
            return self.b(y), self.c(y), y

    x = images(1, 4, 5, 5)
    model = quantized(Model(), x)
    converted = adq.to_integer(model, x)
    assert converted.adq_integer.from_levels == 2
    for actual, expected in zip(converted(x), model(x), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-5)


def test_the_model_stays_and_the_copy_can_be_copied():
    torch.manual_seed(0)
    x = images(2, 4, 6, 6)
    model = quantized(Block(4, 4), x)
    before = copy.deepcopy(model.state_dict())
    converted = adq.to_integer(model, x)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in converted.parameters())
    for twin in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        assert torch.equal(twin(x), converted(x)) and twin.adq_integer == converted.adq_integer
    torch.testing.assert_close(converted.to(torch.bfloat16)(x), converted(x))  # constants keep their dtype


@pytest.mark.parametrize("older", [False, True])
def test_a_state_dict_goes_round(older):
    """Those of an older adq too, which did not hold the level that means zero."""
    torch.manual_seed(0)
    x = images(2, 4, 6, 6)
    layers = [nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3)) for _ in range(2)]
    first, second = (adq.to_integer(quantized(*pair), x) for pair in zip(layers, (x, x + 1), strict=True))
    assert first.get_submodule("0").zero != second.get_submodule("0").zero
    state = second.state_dict()
    first.load_state_dict({k: v for k, v in state.items() if not k.endswith("_extra_state")} if older else state)
    assert torch.equal(first(x), second(x))
    assert torch.equal(torch.export.export(first, (x,)).module()(x), second(x))


def test_all_widths():
    torch.manual_seed(0)
    x = images(2, 4, 5, 5).abs()
    for bits in (1, 2, 3, 4, 5, 6, 7, 8):
        layer = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1))
        override = {"weight": {"bits": bits}, "activation": {"bits": bits, "signed": False}}
        converted = integer(quantized(layer, x, **{"re:.*": override}), x, from_levels=1)
        levels = kinds(converted, IntegerConv2d)[0].table.numel()
        assert levels == (2**bits if bits <= 4 else 0)


def test_packed_models():
    torch.manual_seed(0)
    x = images(2, 4, 6, 6)
    model = quantized(nn.Sequential(Block(4, 4), nn.Conv2d(4, 5, 1)), x)
    expected = adq.to_integer(model, x)(x)
    assert torch.equal(integer(adq.pack_(model), x, from_levels=2)(x), expected)


def test_learned_steps_are_integers():
    torch.manual_seed(0)
    x = images(2, 4, 5, 5)
    integer(quantized(nn.Conv2d(4, 6, 3), x, **{"re:.*": {"weight": {"update": "step", "snap": None}}}), x, 0)


# ---- refusals ----------------------------------------------------------------------------------------


def test_levels_on_no_grid_are_refused_by_name():
    x = images(1, 4, 5, 5)
    model = quantized(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)), x, **{"1": {"weight": {"snap": None}}})
    with pytest.raises(ValueError, match=r"layer '1': its levels lie on no int8 grid"):
        adq.to_integer(model, x)
    converted = integer(model, x, 0, strict=False)
    assert list(converted.adq_integer.left) == ["1"]
    assert "layer '1' is not one of them" in str(converted.adq_integer)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), (1, 4, 5, 5), "padding is .*reflect"),
        (nn.Conv2d(4, 4, 2, padding="same"), (1, 4, 5, 5), "padding is 'same'"),
        (nn.ConvTranspose2d(4, 4, 2), (1, 4, 5, 5), "no integer kernel for QConvTranspose2d"),
        (nn.Linear(70_000, 1), (1, 70_000), "a sum of 70,000 products"),
    ],
    ids=["reflect", "asymmetric", "transposed", "long"],
)
def test_layers_without_an_integer_form_are_refused(model, shape, message):
    torch.manual_seed(0)
    x = images(*shape)
    with pytest.raises(ValueError, match=message):
        adq.to_integer(quantized(model, x), x)


def test_float_and_uncalibrated_models_are_refused():
    x = images(1, 4, 5, 5)
    with pytest.raises(ValueError, match="not quantized"):
        adq.to_integer(nn.Conv2d(4, 4, 1), x)
    with pytest.raises(ValueError, match="not calibrated"):
        adq.to_integer(adq.quantize_(nn.Conv2d(4, 4, 1)), x)
    with pytest.raises(ValueError, match="in float"):
        adq.to_integer(quantized(nn.Conv2d(4, 4, 1), x, **{"re:.*": {"activation": None}}), x)


# ---- the command line --------------------------------------------------------------------------------


def evaluated(path, *arguments: str):
    testing = pytest.importorskip("typer.testing", reason="the command line needs the extra 'train'")
    from adq.train.cli import app

    return testing.CliRunner().invoke(app, ["eval", str(path), "--config", "digits", *arguments])


@pytest.mark.parametrize("snap", ["int8", None])
def test_eval_with_integers(tmp_path, snap):
    pytest.importorskip("sklearn", reason="the digits need scikit-learn")
    torch.manual_seed(0)
    model = adq.create_model("digits_cnn", num_classes=10)
    adq.quantize_(model, ADQConfig(weight=WeightConfig(bits=3, snap=snap), activation=ActivationConfig(bits=3)))
    adq.calibrate_(model, [torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))])
    path = adq.save(model, tmp_path / "model.safetensors")
    result = evaluated(path, "--integer")
    if snap is None:
        assert result.exit_code == 1
        assert "no int8 grid" in result.output
        return
    assert result.exit_code == 0
    assert "integer layers" in result.output
    top1, expected = (float(text.split("top-1 ")[1].split(",")[0]) for text in (result.output, evaluated(path).output))
    assert abs(top1 - expected) < 0.5  # of 360 images: at most one, where the float sums decide


# ---- what is changed in place --------------------------------------------------------------------------


def added(model, x):
    out = model.first(x)
    out.add_(x)
    return out


def added_and_bounded(model, x):
    out = added(model, x)
    model.relu(out)
    return out


def added_to_the_input(model, x):
    x = x * 1
    x.add_(model.first(x))
    return x


def added_to_another_name(model, x):
    x = skip = x * 1
    x += model.first(x)
    return x + skip


def changed_through_a_view(model, x):
    out = model.first(x)
    out.flatten(2).add_(1.0)
    return out


def added_through_a_view(model, x):
    x = x * 1
    view = x.permute(0, 1, 2, 3)
    view.add_(model.first(x))
    return x


def bounded_behind_a_dropout(model, x):
    out = model.first(x)
    model.relu(model.dropout(out))
    return out


def scaled_by_another_name(model, x):
    out = other = model.relu(model.first(x))
    other *= 0.5
    return out + other


def viewed_by_a_counted_size(model, x):
    out, size = model.first(x), x.size(0)
    kept = size
    size += 1
    return out.view(kept, -1).view(kept, 3, 6, 6)


def changed_between_a_layer_and_its_norm(model, x):
    x = x * 1
    out = model.first[0](x)
    x *= 0.5
    return x + model.first[1](out)


def read_by_an_earlier_view(model, x):
    x = x * 1
    view = x.permute(0, 1, 2, 3)
    x += model.first(x)
    return view


def flattened_and_changed(model, x):
    out = model.first(x)
    out.flatten(1).add_(1.0)
    return out


def written_into_itself(model, x):
    out = model.first(x)
    torch.mul(out, 0.5, out=out)
    return out


def changed_under_another_dtype(model, x):
    out = model.first(x)
    out.to(x.dtype).add_(1.0)
    return out


def viewed_as_another_dtype(model, x):
    out = model.first(x)
    return out.view(dtype=torch.int32).view(x.dtype)


def changed_by(name, view):
    def change(model, x):
        out = model.first(x)
        view(out).add_(1.0)
        return out

    change.__name__ = name
    return change


VIEWS = {
    "dropout": lambda y: F.dropout(y, training=False),
    "dropout2d": lambda y: F.dropout2d(y, training=False),
    "alpha_dropout": lambda y: F.alpha_dropout(y, training=False),
    "ravel": lambda y: y.ravel(),
    "swapdims": lambda y: y.swapdims(1, 2),
    "moveaxis": lambda y: torch.moveaxis(y, 1, 2),
    "broadcast_to": lambda y: torch.broadcast_to(y, y.shape),
    "hsplit": lambda y: y.hsplit(3)[1],
    "split_with_sizes": lambda y: y.split_with_sizes([1, 2], 1)[1],
    "unsafe_chunk": lambda y: y.unsafe_chunk(3, 1)[0],
    "cpu": lambda y: y.cpu(),
    "real": torch.real,
    "mT": lambda y: y.mT,
    "adjoint": torch.adjoint,
    "plus": lambda y: +y,
}


class InPlace(nn.Module):
    def __init__(self, change):
        super().__init__()
        torch.manual_seed(0)
        self.change = change
        self.first = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3))
        self.relu, self.dropout = nn.ReLU(inplace=True), nn.Dropout()
        self.second, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 10)

    def forward(self, x):
        return self.head(torch.relu(self.second(self.change(self, x))).mean((2, 3)))


@pytest.mark.parametrize(
    ("change", "from_levels"),
    [
        (added, 1),
        (added_and_bounded, 1),
        (added_to_the_input, 1),
        (added_to_another_name, 0),
        (changed_through_a_view, 0),
        (added_through_a_view, 0),
        (bounded_behind_a_dropout, 0),
        (scaled_by_another_name, 0),
        (viewed_by_a_counted_size, 0),
        (changed_between_a_layer_and_its_norm, 0),
        (read_by_an_earlier_view, 0),
        (flattened_and_changed, 0),
        (written_into_itself, 0),
        (changed_under_another_dtype, 0),
        (viewed_as_another_dtype, 0),
        *((changed_by(name, view), 0) for name, view in VIEWS.items()),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_is_changed_in_place_is_read_changed(change, from_levels):
    x = images(8, 3, 6, 6)
    converted = integer(quantized(InPlace(change), x), x, from_levels)
    assert converted.adq_integer.unfused is None


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.position = nn.Conv2d(3, 4, 3), nn.Parameter(torch.randn(1, 4, 4, 4))

    def forward(self, x):
        return torch.relu(self.conv(x) + self.position).mean((2, 3))


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x, factor):
        return self.head(torch.relu(self.linear(x) * factor))


@pytest.mark.parametrize("factor", [torch.tensor(2.0), torch.rand(1, 8), 2.0], ids=["scalar", "row", "number"])
def test_examples_that_are_not_all_batches(factor):
    torch.manual_seed(0)
    x = images(4, 8)
    model = adq.quantize_(Scaled(), ADQConfig(WEIGHT, ActivationConfig(bits=3), overrides={"re:.*": SIGNED}))
    adq.calibrate_(model, [{"x": x, "factor": factor}], batch_norm=False).eval()
    converted = adq.to_integer(model, (x, factor))
    with torch.no_grad():
        torch.testing.assert_close(converted(x, factor), model(x, factor), rtol=1e-5, atol=2e-5)


def test_an_example_of_one_image_says_nothing_of_others():
    torch.manual_seed(0)
    x = images(5, 3, 6, 6)
    model = quantized(Positions(), x)
    converted = adq.to_integer(model, x[:1])
    with torch.no_grad():
        for batch in (x, x[:1]):
            torch.testing.assert_close(converted(batch), model(batch), rtol=1e-5, atol=2e-5)


class TwoNames(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.layers = nn.ModuleList([self.a, self.b])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x) if x.sum() != 0 else x
        return x.mean((2, 3))


def test_layers_of_two_names_in_a_model_that_cannot_be_traced():
    torch.manual_seed(0)
    x = images(2, 3, 6, 6)
    converted = integer(quantized(TwoNames(), x), x, 0)
    assert converted.adq_integer.unfused
    assert all(isinstance(layer, IntegerConv2d) for layer in converted.layers)


class Optional(nn.Module):
    """What happens depends on an argument that has a default."""

    def __init__(self, reverse: bool) -> None:
        super().__init__()
        self.a, self.n, self.b = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)
        self.head, self.reverse = nn.Linear(8, 4), reverse

    def forward(self, x: torch.Tensor, aux: torch.Tensor | None = None, features: bool = False) -> torch.Tensor:
        x = self.a(x)
        x = self.n(x) if (aux is not None) != self.reverse else F.relu(x)
        x = self.b(x.relu()).mean((2, 3))
        if features:
            return x
        if aux is not None:
            x = x + F.mse_loss(x, aux)
        return self.head(x)


@pytest.mark.parametrize("reverse", [False, True])
def test_arguments_that_are_not_given_have_their_defaults(reverse):
    x = images(2, 3, 9, 9)
    model = quantized(Optional(reverse), x)
    converted = integer(model, x, int(reverse))
    assert converted.adq_integer.unfused is None
    aux = images(2, 8)
    converted = adq.to_integer(model, (x, aux))
    torch.testing.assert_close(converted(x, aux), model(x, aux), rtol=1e-5, atol=2e-5)


def twice(module: nn.Module, args: tuple, output: torch.Tensor | None = None) -> object:
    return 2 * args[0] if output is None else 2 * output


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("name", ["1", "2", "3", ""])
def test_hooks_are_called_or_refused(name, before):
    x = images(2, 3, 9, 9)
    inner = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
    model = nn.Sequential(nn.Conv2d(3, 8, 3), inner[0], inner[1], nn.Sequential(inner[2]), nn.Conv2d(8, 4, 3))
    model = quantized(model, x)
    hooked = model.get_submodule(name)
    (hooked.register_forward_pre_hook if before else hooked.register_forward_hook)(twice)
    converted = adq.to_integer(model, x)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(converted(x), expected, rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(adq.pack_(copy.deepcopy(model))(x), expected)
        if name == "1":
            with pytest.raises(ValueError, match="no batch norm to fold"):
                adq.fold_batch_norm_(copy.deepcopy(model))
    assert bool(converted.adq_integer.unfused) == (name == "")
    model[0].register_forward_hook(twice)
    with pytest.raises(ValueError, match="layer '0': it has forward hooks"):
        adq.to_integer(model, x)
    left = adq.to_integer(model, x, strict=False)
    assert list(left.adq_integer.left) == ["0"]
    with torch.no_grad():
        torch.testing.assert_close(left(x), model(x), rtol=1e-5, atol=2e-5)


class CalledTwice(nn.Module):
    """A layer that the graph shows, and that runs in a module with a hook, which the graph calls as a whole, too."""

    def __init__(self, before: bool) -> None:
        super().__init__()
        self.first, self.before = nn.Conv2d(3, 8, 3, padding=1), before
        self.hooked = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.inner, self.last = self.hooked[0], nn.Conv2d(8, 4, 3)
        self.hooked.register_forward_hook(lambda *args: None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.first(x))
        x = self.hooked(F.relu(self.inner(x))) if self.before else F.relu(self.inner(F.relu(self.hooked(x))))
        return self.last(x)


@pytest.mark.parametrize("before", [False, True])
def test_a_layer_that_also_runs_within_a_module_with_a_hook(before):
    torch.manual_seed(0)
    x = images(2, 3, 6, 6)
    converted = integer(quantized(CalledTwice(before), x), x, from_levels=1)
    assert len(kinds(converted, IntegerConv2d)) == 4 and len(kinds(converted.hooked, IntegerConv2d)) == 1


class Changed(nn.Module):
    """What a module with a hook is given is read by others, too."""

    def __init__(self, change: str) -> None:
        super().__init__()
        act = nn.LeakyReLU(0.6, inplace=change != "hook")
        self.first, self.norm, self.change = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), change
        self.branch = nn.Sequential(act, nn.Conv2d(8, 8, 3, padding=1))
        self.short, self.last = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 3)
        self.branch.register_forward_hook(lambda _, args, out: args[0].mul_(0.5) if change == "hook" else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.first(x))
        if self.change == "between":
            y = self.short(x)
            return self.branch(x), self.last(y + x)
        y = self.branch(x.view(x.shape) if self.change == "hook" else x)
        return self.last(F.relu(y + self.short(x)))


@pytest.mark.parametrize("change", ["inside", "hook", "between"])
def test_what_a_module_with_a_hook_changes_is_read_changed(change):
    torch.manual_seed(0)
    x = images(2, 3, 6, 6)
    converted = integer(quantized(Changed(change), x), x, from_levels=int(change != "between"))
    assert converted.adq_integer.unfused is None


@pytest.mark.parametrize("name", ["", "2", "4"])
def test_a_forward_of_the_instance_is_called_or_refused(name):
    x = images(2, 3, 9, 9)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 3))
    model = quantized(model, x)
    module = model.get_submodule(name)
    module.forward = lambda x, before=module.forward: 2 * before(x)
    if name == "4":
        with pytest.raises(ValueError, match="layer '4': it has forward hooks, or a forward of its own"):
            adq.to_integer(model, x)
    else:
        converted = integer(model, x, from_levels=int(name == "2"))
        assert bool(converted.adq_integer.unfused) == (name == "")


def test_parameters_are_made_where_the_model_is():
    layer = quantized(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False)), images(2, 3, 5, 5))[0]
    assert _bias(layer.to("meta")).shift.device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_residual_of_half_precision(dtype):
    x = images(2, 8, 6, 6)
    model = quantized(Block(8, 8), x)
    converted = adq.to_integer(model, x)
    torch.testing.assert_close(converted(x.to(dtype)).float(), converted(x.to(dtype).float()), rtol=1e-2, atol=1e-2)


def test_mappings_of_examples_are_refused():
    x = images(2, 3, 5, 5)
    model = quantized(nn.Sequential(nn.Conv2d(3, 4, 3)), x)
    with pytest.raises(ValueError, match="tuple of positional arguments; got a mapping"):
        adq.to_integer(model, {"input": x})


NAMES, TABLE, SHIFT = [], {"a": 2.0}, torch.ones(1)


class Defaults(nn.Module):
    """Arguments with defaults of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

    def forward(self, x, sizes=(1, 2), names=NAMES, table=TABLE, shift=SHIFT, mask=None, flag=True, mode="sum"):
        x = self.b(F.relu(self.a(x)))
        x = x * sizes[1] + table["a"] + shift if mask is None and not names else x * 0
        return x.sum(1) if flag and mode == "sum" else x


def test_defaults_of_every_kind():
    x = images(2, 3, 9, 9)
    model = quantized(Defaults(), x)
    converted = adq.to_integer(model, x)
    assert converted.adq_integer.unfused is None
    expected = model(x)
    for given in ({}, {"flag": True}, {"mask": None, "mode": "sum"}):
        torch.testing.assert_close(converted(x, **given), expected, rtol=1e-5, atol=1e-4)
    for twin in (converted, copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        assert torch.equal(twin(x, mode="sum"), converted(x))
        with pytest.raises(ValueError, match="made for flag=True, and got False"):
            twin(x, flag=False)
    with pytest.raises(TypeError, match="sizes"):
        converted(x, sizes=(1, 3))
