"""Architectures by name, their records, and the loading of float weights."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import adq
from adq import models
from adq.models import create_model, list_architectures, load_float_weights, rebuild, register_architecture
from adq.train.data import DataConfig, build_data

ROOT = os.environ.get("ADQ_TEST_DATA")
needs_data = pytest.mark.skipif(not ROOT, reason="ADQ_TEST_DATA is not set (folder with weights/ and cifar10/)")


def message(error: type[Exception], call, *args, **kwargs) -> str:
    with pytest.raises(error) as caught:
        call(*args, **kwargs)
    return str(caught.value)


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(models, "_REGISTRY", dict(models._REGISTRY))


# ---- architectures -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "convolutions", "weights"),
    [
        ("digits_cnn", (2, 1, 8, 8), 4, 65_440),
        ("resnet20", (2, 3, 32, 32), 19, 268_336),
        ("resnet32", (2, 3, 32, 32), 31, None),
    ],
)
def test_built_in_networks(name, shape, convolutions, weights):
    model = create_model(name)
    assert model(torch.randn(shape)).shape == (2, 10)
    layers = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    assert len(layers) == convolutions + 1
    if weights:
        assert sum(layer.weight.numel() for layer in layers) == weights


def test_resnet20_has_the_customary_keys():
    expected = {"conv1", "bn1", "linear"} | {
        f"layer{stage}.{block}.{part}"
        for stage in (1, 2, 3)
        for block in (0, 1, 2)
        for part in ("conv1", "bn1", "conv2", "bn2")
    }
    assert {key.rpartition(".")[0] for key in create_model("resnet20").state_dict()} == expected


def test_option_a_shortcut_by_hand():
    block = models.BasicBlock(2, 4, stride=2).eval()
    nn.init.zeros_(block.bn2.weight)  # the residual branch is silent
    x = torch.arange(32.0).view(1, 2, 4, 4)
    y = block(x)
    assert y.shape == (1, 4, 2, 2)
    assert torch.equal(y[0, 1:3], x[0, :, ::2, ::2])
    assert not y[0, 0].any() and not y[0, 3].any()


@pytest.mark.parametrize("name", ["digits_cnn", "resnet20"])
def test_networks_export(name):
    model = create_model(name).eval()
    x = torch.randn(2, *((1, 8, 8) if name == "digits_cnn" else (3, 32, 32)))
    exported = torch.export.export(model, (x,))
    assert torch.equal(exported.module()(x), model(x))


def test_torchvision_model_by_plain_and_prefixed_name():
    pytest.importorskip("torchvision")
    plain, prefixed = create_model("resnet18", 7), create_model("torchvision/resnet18", 7)
    assert plain.fc.out_features == 7
    assert plain.adq_architecture == prefixed.adq_architecture
    assert plain.adq_architecture == {"name": "torchvision/resnet18", "num_classes": 7, "kwargs": {}}
    assert create_model("mobilenet_v2").classifier[1].out_features == 1000


def test_timm_model_by_plain_and_prefixed_name():
    pytest.importorskip("timm")
    name = "mobilenetv3_small_050"
    assert create_model(f"timm/{name}", 5).classifier.out_features == 5
    assert create_model(name, 5).adq_architecture["name"] == f"timm/{name}"


def test_record_survives_copies_and_rebuilds():
    model = create_model("digits_cnn", 4, width=8)
    record = {"name": "digits_cnn", "num_classes": 4, "kwargs": {"width": 8}}
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    assert all(json.loads(json.dumps(other.adq_architecture)) == record for other in [model, *copies])
    rebuilt = rebuild(record)
    rebuilt.load_state_dict(model.state_dict())
    assert rebuilt.adq_architecture == record
    assert "lacks num_classes" in message(ValueError, rebuild, {"name": "digits_cnn"})


def test_registered_architecture(registry):
    register_architecture("tiny", lambda num_classes, bias=True: nn.Linear(3, num_classes, bias=bias), num_classes=2)
    assert create_model("tiny", bias=False).adq_architecture == {
        "name": "tiny",
        "num_classes": 2,
        "kwargs": {"bias": False},
    }
    assert "tiny" in list_architectures()
    assert "already registered" in message(ValueError, register_architecture, "tiny", nn.Identity)


def test_unknown_architecture_names_close_matches(monkeypatch):
    text = message(ValueError, create_model, "resnet21")
    assert "unknown architecture 'resnet21'" in text and "resnet20" in text.partition("Built in")[0]
    monkeypatch.setattr(models, "_has", lambda package: False)
    text = message(ValueError, create_model, "resnet18")
    assert "timm is not installed (pip install 'adq[timm]')" in text
    assert "pip install 'adq[train]'" in message(ImportError, create_model, "torchvision/resnet18")
    assert "pip install 'adq[timm]'" in message(ImportError, create_model, "timm/resnet18")


def test_refused_arguments():
    assert "load_float_weights" in message(ValueError, create_model, "resnet18", weights="DEFAULT")
    assert "must be positive, got 0" in message(ValueError, create_model, "resnet20", 0)
    assert "plain numbers" in message(ValueError, create_model, "digits_cnn", width=torch.tensor(3))
    assert "6 n + 2" in message(ValueError, models.CifarResNet, depth=21)


# ---- float weights -----------------------------------------------------------------------------------


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    save_file(create_model("digits_cnn").state_dict(), tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


def refused(path: Path, error: type[Exception] = ValueError, **options) -> str:
    """The message of a refused file; checks that it names the file and that the model is as before."""
    model = create_model("digits_cnn", **options)
    before = copy.deepcopy(model.state_dict())
    text = message(error, load_float_weights, model, path)
    assert str(path) in text
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    return text


def changed(source: Path, **tensors: torch.Tensor | None) -> Path:
    from safetensors.torch import load_file

    state = load_file(source) | {key.replace("__", "."): value for key, value in tensors.items()}
    path = source.with_name("changed.safetensors")
    save_file({key: value for key, value in state.items() if value is not None}, path)
    return path


def test_loads_safetensors_and_wrapped_pickles(weights: Path, tmp_path: Path):
    source = create_model("digits_cnn")
    load_float_weights(source, weights)
    state = source.state_dict()
    older = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    forms = {
        "plain.pt": state,
        "older.bin": older,
        "lightning.ckpt": {"state_dict": {f"module.{key}": value for key, value in state.items()}, "epoch": 3},
        "compiled.pth": {"model": {f"_orig_mod.module.{key}": value for key, value in state.items()}},
        "model_best.pth.tar": {"state_dict": state, "epoch": 3, "arch": "digits_cnn"},
        "tutorial.pt": {"model_state_dict": state, "epoch": 3},
        "module.ckpt": {"state_dict": {f"model.{key}": value for key, value in state.items()}},
        "nested.th": {"model_state": {f"module._orig_mod.{key}": value for key, value in state.items()}},
    }
    for name, form in forms.items():
        torch.save(form, tmp_path / name)
        model = create_model("digits_cnn")
        load_float_weights(model, str(tmp_path / name))
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in older.items()), name


def test_missing_empty_and_damaged_files(weights: Path, tmp_path: Path):
    assert "no weight file" in refused(tmp_path / "none.safetensors", FileNotFoundError)
    assert "it is a folder" in refused(tmp_path, FileNotFoundError)
    for suffix in (".safetensors", ".pt"):
        empty = tmp_path / f"empty{suffix}"
        empty.touch()
        assert "the file is empty" in refused(empty)
    data = weights.read_bytes()
    for size in (4, 500, len(data) - 8):
        weights.write_bytes(data[:size])
        assert "damaged or truncated" in refused(weights)
    weights.write_bytes(b"<html>404 Not Found</html>")
    assert "damaged or truncated" in refused(weights)
    torch.save(create_model("digits_cnn").state_dict(), tmp_path / "w.pt")
    data = (tmp_path / "w.pt").read_bytes()
    for broken in (data[:1000], data[:-100], b"\x80", b"<html>404 Not Found</html>"):
        (tmp_path / "w.pt").write_bytes(broken)
        assert "damaged or truncated" in refused(tmp_path / "w.pt")
    (tmp_path / "w.h5").write_bytes(data)
    assert "unknown kind of weight file, expected one of .safetensors" in refused(tmp_path / "w.h5")


class Payload:
    """Creates a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickled_code_is_refused(tmp_path: Path):
    torch.save({"state_dict": Payload(tmp_path / "ran")}, tmp_path / "code.pt")
    assert f"holds code or objects other than tensors ({os.mkdir.__module__}.mkdir)" in refused(tmp_path / "code.pt")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Payload(tmp_path / "ran"), protocol=2))
    assert "holds code" in refused(tmp_path / "raw.pth")
    torch.save(create_model("digits_cnn"), tmp_path / "model.pt")
    assert "(adq.models.DigitsCNN); save model.state_dict() alone" in refused(tmp_path / "model.pt")
    assert not (tmp_path / "ran").exists()


def test_files_without_a_state_dict(tmp_path: Path):
    for content, expected in (([1, 2], "holds a list"), ({}, "it is empty"), ({"epoch": 3}, "see epoch")):
        torch.save(content, tmp_path / "odd.pt")
        assert expected in refused(tmp_path / "odd.pt")


def test_wrong_architecture_lists_keys(weights: Path):
    text = refused(weights, width=16)
    assert "another architecture" in text
    assert "conv1.weight 32x1x3x3 in the file, 16x1x3x3 in the model" in text
    assert "more" in text
    path = changed(weights, linear__bias=None, extra__weight=torch.zeros(2))
    text = refused(path)
    assert "1 missing in the file: linear.bias" in text and "1 not in the model: extra.weight" in text


def test_wrong_number_of_classes_is_said_in_words(weights: Path):
    path = changed(weights, linear__weight=torch.zeros(1000, 64), linear__bias=torch.zeros(1000))
    assert "the file has 1000 classes, the model 10" in refused(path)


def test_values_that_no_float_network_holds(weights: Path):
    bad = torch.zeros(10)
    bad[3] = torch.nan
    assert "NaN or infinity in linear.bias" in refused(changed(weights, linear__bias=bad))
    bad[3] = -torch.inf
    assert "NaN or infinity in linear.bias" in refused(changed(weights, linear__bias=bad))
    text = refused(changed(weights, linear__bias=torch.zeros(10, dtype=torch.int8)))
    assert "not float weights: linear.bias is torch.int8" in text


def test_half_precision_weights_are_widened(weights: Path):
    model = create_model("digits_cnn")
    load_float_weights(model, changed(weights, linear__bias=torch.full((10,), 0.5, dtype=torch.bfloat16)))
    assert model.linear.bias.dtype == torch.float32
    assert torch.equal(model.linear.bias.data, torch.full((10,), 0.5))


# ---- training and real weights -----------------------------------------------------------------------


@torch.no_grad()
def accuracy(model: nn.Module, loader) -> float:
    model.eval()
    pairs = [(model(images).argmax(1) == labels).float() for images, labels in loader]
    return torch.cat(pairs).mean().item()


def test_digits_cnn_learns_the_digits():
    pytest.importorskip("sklearn")
    torch.manual_seed(0)
    epochs, model = 15, create_model("digits_cnn")
    data = build_data(DataConfig("digits", batch_size=64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=epochs * len(data.train))
    for epoch in range(epochs):
        data.sampler.set_epoch(epoch)
        for images, labels in data.train:
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    assert accuracy(model, data.test) >= 0.98


@needs_data
def test_real_resnet20_weights_on_real_images():
    model = create_model("resnet20", 10)
    load_float_weights(model, Path(ROOT) / "weights" / "resnet20-cifar10.safetensors")
    config = DataConfig("imagefolder", Path(ROOT) / "cifar10", limit_train=10, limit_test=2000, eval_batch_size=500)
    assert abs(accuracy(model, build_data(config).test) - 0.9173) < 0.02


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Sequential(nn.Linear(3, 2))


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_model_whose_own_layers_are_named_module(tmp_path, wrapped):
    model, other = Inner(), Inner()
    torch.save((nn.DataParallel(model) if wrapped else model).state_dict(), tmp_path / "own.pt")
    load_float_weights(other, tmp_path / "own.pt")
    assert torch.equal(model.module[0].weight, other.module[0].weight)


def test_a_tied_tensor_needs_one_of_its_names(tmp_path):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed.weight

    source, model = Tied(), Tied()
    save_file({"embed.weight": source.embed.weight.detach()}, tmp_path / "tied.safetensors")
    load_float_weights(model, tmp_path / "tied.safetensors")
    assert torch.equal(model.head.weight, source.head.weight)
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    with pytest.raises(ValueError, match="1 missing in the file: head.weight"):
        load_float_weights(model, tmp_path / "tied.safetensors")


def test_a_quantized_model_is_told_from_another_architecture(tmp_path):
    model = adq.quantize_(create_model("digits_cnn"))
    adq.save(model, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"the weights of a quantized model, .*adq\.load\(path, model\)"):
        load_float_weights(create_model("digits_cnn"), tmp_path / "m.safetensors")


def test_networks_with_auxiliary_heads(tmp_path):
    """They give tuples in training; their files have the heads, and networks without them take what is theirs."""
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    pytest.importorskip("accelerate", reason="adq train needs the extra 'train'")
    from adq.train.config import ModelConfig, RunConfig
    from adq.train.run import check_layers

    whole = create_model("googlenet", 10, init_weights=False)
    with pytest.raises(ValueError, match="'googlenet' has auxiliary heads.*aux_logits: false"):
        check_layers(whole, RunConfig(model=ModelConfig("googlenet")))
    save_file(whole.state_dict(), tmp_path / "whole.safetensors")
    without = create_model("googlenet", 10, init_weights=False, aux_logits=False)
    check_layers(without, RunConfig(model=ModelConfig("googlenet")))
    load_float_weights(without, tmp_path / "whole.safetensors")
    assert torch.equal(without.fc.weight, whole.fc.weight)


class Versioned(nn.Linear):
    """As torchvision's MNASNet: without a version it takes no tensors."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        if local_metadata.get("version") != 2:
            raise ValueError(f"version {local_metadata.get('version')}")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def test_tensors_are_of_the_version_of_the_model(tmp_path):
    model, other = nn.Sequential(Versioned(3, 2)), nn.Sequential(Versioned(3, 2))
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    load_float_weights(other, tmp_path / "w.safetensors")
    assert torch.equal(model[0].weight, other[0].weight)
