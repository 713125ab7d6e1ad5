"""The check that ends every export: what passes, what fails, and which images are left out."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from saved import trained
from torch import nn

import adq
from adq import ActivationConfig, ADQConfig, WeightConfig, parity

BATCHES = [(torch.randn(32, 1, 6, 6, generator=torch.Generator().manual_seed(i)), None) for i in range(3)]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return trained()


def test_the_same_model_passes_on_as_many_images_as_asked_for(model):
    asked = []

    def run(x):
        asked.append(len(x))
        return (model(x) + 0.25, None)

    found = parity.compare(model.train(), run, [True], "a runtime", BATCHES, 80)
    assert model.training and model.eval()
    assert asked == [32, 32, 16]
    assert (found.runtime, found.images, found.undecided) == ("a runtime", 80, 0)
    assert found.max_difference == pytest.approx(0.25, abs=1e-6)
    assert "parity: top-1 identical on 80 images in a runtime, largest difference of the logits 0.25" in str(found)


def test_too_few_images(model):
    with pytest.raises(ValueError, match="wants 97 images with the same top-1, the data has 96"):
        parity.compare(model, model, [True], "a runtime", BATCHES, 97)
    for none in (0, -3):
        with pytest.raises(ValueError, match=f"takes 1 image or more, got {none}"):
            parity.compare(model, model, [True], "a runtime", BATCHES, none)


def test_images_of_the_same_batch_take_the_place_of_those_left_out(model, monkeypatch):
    monkeypatch.setattr(parity, "_undecided", lambda *args: True)
    asked = []

    def run(x):
        asked.append(len(x))
        y = model(x)
        return torch.cat((-y[:1], y[1:])) if len(asked) == 1 else y

    found = parity.compare(model, run, [True], "a runtime", [BATCHES[0], BATCHES[1][0][:20]], 51)
    assert asked == [32, 20] and (found.images, found.undecided) == (51, 1)
    asked.clear()
    whole = torch.cat([batch[0] for batch in BATCHES])
    found = parity.compare(model, run, [True], "a runtime", [whole], 80)
    assert asked == [80, 1] and (found.images, found.undecided) == (80, 1)


@pytest.mark.parametrize(
    ("scale", "message"),
    [(-1.0, "in a runtime top-1 differs on .* and not by rounding"), (math.nan, "NaN or infinity among")],
)
def test_another_function_fails(model, scale, message):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.head.bias.mul_(scale).add_(torch.tensor([0.0, 0.0, 5.0]))
    with pytest.raises(RuntimeError, match=f"not exported: {message}"):
        parity.compare(model, other, [True], "a runtime", BATCHES, 80)


def test_an_image_on_a_threshold_is_left_out():
    """Two logits, the level of an input each: at the threshold of one of them rounding decides which is larger."""
    torch.manual_seed(0)
    layer = nn.Linear(2, 2, bias=False)
    layer.weight.data = torch.eye(2)
    model = adq.quantize_(nn.Sequential(layer), ADQConfig(WeightConfig(2), ActivationConfig(3), first_last_bits=3))
    adq.calibrate_(model, [torch.rand(64, 2)]).eval()
    quantizer = layer.input_quantizer
    with torch.no_grad():
        edge = (quantizer.start + 1.5 * quantizer.interval[0]) / quantizer.in_scale
        on, off = torch.stack((edge, 1.2 * edge), 1), torch.stack((0.1 * edge, 3 * edge), 1)
        assert parity._undecided(model, (torch.cat((off, on)),), [True], 1, edge)
        assert not parity._undecided(model, (torch.cat((off, on)),), [True], 0, edge)


class One(nn.Module):
    """One output an image, with an axis of its own or without."""

    def __init__(self, model: nn.Module, axis: bool) -> None:
        super().__init__()
        self.model, self.axis = model, axis

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.model(x)[:, :1]
        return y if self.axis else y[:, 0]


@pytest.mark.parametrize("axis", [True, False])
def test_one_output_is_compared_by_its_value(model, axis):
    one = One(model, axis).eval()
    largest = max(float(one(batch[0]).detach().abs().max()) for batch in BATCHES)
    found = parity.compare(one, lambda x: one(x) + 1e-5 * largest, [True], "a runtime", BATCHES, 80)
    assert "parity: outputs within 0.1% on 80 images in a runtime" in str(found)
    for broken in (lambda x: one(x) + 0.01 * largest, lambda x: -one(x), lambda x: torch.zeros_like(one(x))):
        with pytest.raises(RuntimeError, match="in a runtime outputs differ by more than 0.1% on"):
            parity.compare(one, broken, [True], "a runtime", BATCHES, 80)


class Dense(nn.Module):
    """A class for each pixel, as a mapping."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"out": torch.cat((x, -x, 0.5 * x + 0.1), 1), "aux": x}


def test_a_top1_for_each_place_and_outputs_that_are_mappings():
    found = parity.compare(Dense(), Dense(), [True], "a runtime", BATCHES, 80)
    assert found.images == 80

    def spoilt(x):
        y = Dense()(x)["out"].clone()
        y[3, :, 5, 5] = -y[3, :, 5, 5]
        return y

    with pytest.raises(RuntimeError, match="top-1 differs on 1 of 32 images, and not by rounding"):
        parity.compare(Dense(), spoilt, [True], "a runtime", BATCHES, 80)


def test_numbers_alone_are_compared_too():
    found = parity.compare(nn.Flatten(0), nn.Flatten(0), [True], "a runtime", [torch.randn(8)], 8)
    assert (found.images, found.max_difference) == (8, 0.0)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, table: torch.Tensor, factor: float) -> torch.Tensor:
        return self.linear(x) @ table * factor


def test_what_the_images_of_a_batch_share_is_given_whole():
    """To the model's own copies too, of an image that another runtime decides otherwise."""
    torch.manual_seed(0)
    shared = Shared()
    batches = [(torch.randn(4, 4), torch.randn(3, 3), 2.0, "labels") for _ in range(2)]
    found = parity.compare(shared, shared, [True, False, False], "a runtime", batches, 7)
    assert (found.images, found.max_difference) == (7, 0.0)
    with pytest.raises(RuntimeError, match="top-1 differs"):
        parity.compare(shared, lambda *inputs: -shared(*inputs), [True, False, False], "a runtime", batches, 300)


def test_the_example_tells_what_images_share():
    """And not the batch, which may happen to be as long."""
    torch.manual_seed(0)
    shared, own = Shared(), [True, False, False]
    batches = [(torch.randn(3, 4), torch.randn(3, 3), 2.0)]
    assert parity.compare(shared, shared, own, "a runtime", batches, 2).images == 2
    inputs, found = parity.as_inputs((torch.randn(1, 4), torch.randn(2, 2), 2.0))
    assert found == own and [len(x) for x in inputs[:2]] == [2, 2]
    with pytest.raises(ValueError, match=r"as long as each other in the example have lengths \[3, 5\] in a batch"):
        parity.compare(shared, shared, [True, True, False], "a runtime", [(torch.randn(5, 4), *batches[0][1:])], 2)


@pytest.mark.parametrize(
    ("given", "kind"),
    [(torch.tensor(2.0), "a tensor without axes"), (2.0, "float"), ([1.0, 2.0], "list"), (None, "NoneType")],
)
def test_inputs_without_an_entry_an_image_where_the_example_has_one(given, kind):
    with pytest.raises(ValueError, match=f"input 1 has one entry an image in the example, and is {kind} in a batch"):
        parity.compare(Shared(), Shared(), [True, True, False], "a runtime", [(torch.randn(3, 4), given, 2.0)], 2)


def test_mappings_of_inputs_are_refused(model):
    with pytest.raises(ValueError, match=r"takes batches \(inputs, \.\.\.\).*; got a mapping"):
        parity.compare(model, model, [True], "a runtime", [{"x": BATCHES[0][0]}], 8)
