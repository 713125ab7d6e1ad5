"""Every step of the method on the common architectures, from float network to loaded file."""

from __future__ import annotations

import copy
import os
import pickle
from importlib.util import find_spec
from itertools import product

import pytest
import torch
from processes import run
from torch import nn
from torch.nn import functional as F

import adq
from adq import ADQConfig, convert
from adq.convert import quantizers_enabled
from adq.distributed import world
from adq.nn import QLinear, QMultiheadAttention

pytest.importorskip("torchvision")

from architectures import ARCHITECTURES, CLASSES, architecture

SLOW = bool(os.environ.get("ADQ_TEST_SLOW"))
DEEP = ("mobilenet_v3_large", "timm-mobilenetv3")
"""Of the many layers that a smaller network of the same kind has too: with ADQ_TEST_SLOW=1."""
BATCH = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)), torch.arange(4)


def quantized(name: str, config: ADQConfig | None = None) -> nn.Module:
    model = architecture(name)
    adq.reestimate_batch_norm_(model, [BATCH])  # as a trained network has them
    adq.quantize_(model, config)
    rank, size = world()
    return adq.calibrate_(model, [BATCH][rank::size])


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if SLOW or name not in DEEP])
@pytest.mark.filterwarnings("error:adq")
def test_every_step(name, tmp_path):
    if name.startswith("timm") and not find_spec("timm"):
        pytest.skip("timm is not installed")
    model, (images, labels) = quantized(name), BATCH
    names = list(convert.weight_quantizers(model))
    layers = {name for name, module in architecture(name).named_modules() if convert.convertible(module)}
    assert set(names) == layers, "a layer that could be quantized was not"
    assert all(quantizer.is_calibrated for quantizer in convert.activation_quantizers(model).values())

    table = adq.sensitivity(model, [BATCH], F.cross_entropy, bits=(2, 3, 4))
    assert all(layer.macs > 0 for layer in table.layers), "a layer that is never called"
    adq.apply_allocation_(model, adq.allocate(table, adq.Budget(weight_bits=_between(table))))

    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    F.cross_entropy(model.train()(images), labels).backward()
    assert {n for n, p in model.named_parameters() if p.grad is None} == set()
    optimizer.step()
    model.eval()
    quantizers = convert.weight_quantizers(model).values()
    assert all(quantizer.steps == 1 for _, quantizer in quantizers)
    reached = [bool(layer.weight.grad.any()) for layer, _ in quantizers]
    assert sum(reached) > 0.9 * len(reached)  # a ReLU before a squeezed layer may be dead
    after = model.state_dict()
    codebooks = [f"{name}.weight_quantizer.codebook" for name in names]
    assert not all(torch.equal(before[key], after[key]) for key in codebooks)

    expected = model(images)
    assert expected.shape == (4, CLASSES) and bool(expected.isfinite().all())
    for packed in (False, True):
        adq.save(model, tmp_path / "model.safetensors", packed=packed)
        loaded = adq.load(tmp_path / "model.safetensors", architecture(name))
        assert torch.equal(loaded(images), expected)
    assert {row.name for row in adq.summary(model).layers} == set(names)


def test_signed_inputs_get_levels_on_both_sides_of_zero():
    model = quantized("vit")
    block = model.encoder.layers.encoder_layer_0
    for layer in (block.self_attention, block.self_attention.out_proj, block.mlp[0], block.mlp[3]):
        assert layer.input_quantizer.zero_level > 0
    relu = quantized("resnet18").layer1[0]
    assert relu.conv2.input_quantizer.zero_level == 0


@pytest.mark.parametrize("name", ["vit", "swin", "swin_v2"])
def test_without_quantizers_attention_is_the_float_one(name):
    model, images = architecture(name).eval(), BATCH[0]
    expected = model(images)
    adq.quantize_(model)
    with quantizers_enabled(model, weights=False, activations=False):
        torch.testing.assert_close(model(images), expected)


MASKS = {
    "none": lambda *shape: None,
    "bool": lambda *shape: torch.arange(shape[-1]).expand(shape) >= 3,
    "float": lambda *shape: torch.linspace(-2, 2, shape[-1]).expand(shape),
}


@pytest.mark.parametrize("mask", ["none", "bool", "float"])
@pytest.mark.parametrize("batched", [False, True])
def test_attention_takes_what_torch_takes(batched, mask):
    """Layouts, masks, self and cross attention, with and without weights."""
    options = product([False, True], ["self", "key is value", "three"], [None, False, True], [2, 3], [False, True])
    for batch_first, kind, average, dims, padded in options:
        torch.manual_seed(0)
        attention = nn.MultiheadAttention(8, 2, batch_first=batch_first, bias=padded).eval()

        def sequence(length, batch_first=batch_first):
            shape = ((3, length, 8) if batch_first else (length, 3, 8)) if batched else (length, 8)
            return torch.randn(shape)

        query = sequence(5)
        key = query if kind == "self" else sequence(7)
        value = sequence(7) if kind == "three" else key
        length, n = 5 if kind == "self" else 7, 3 if batched else 1
        arguments = {
            "attn_mask": MASKS[mask](*((5, length) if dims == 2 else (2 * n, 5, length))),
            "key_padding_mask": MASKS[mask](*((3, length) if batched else (length,))) if padded else None,
            "need_weights": average is not None,
            "average_attn_weights": bool(average),
        }
        expected, weights = attention(query, key, value, **arguments)
        adq.quantize_(attention)
        with quantizers_enabled(attention, weights=False, activations=False):
            found = attention(query, key, value, **arguments)
        torch.testing.assert_close(found[0], expected)
        assert (found[1] is None) == (weights is None)
        if weights is not None:
            torch.testing.assert_close(found[1], weights)


def test_the_first_layer_is_not_an_output_projection_left_in_float():
    model = nn.Sequential(nn.MultiheadAttention(8, 2, add_zero_attn=True), *(nn.Linear(8, 8) for _ in range(3)))
    adq.quantize_(model)
    assert [layer.weight_quantizer.bits for layer in model[1:]] == [8, 3, 8]


@pytest.mark.parametrize("name", ["vit", "timm-vit"])
def test_the_hessian_of_attention(name):
    """Fused attention kernels have no second derivative, so another one must serve."""
    if name.startswith("timm"):
        pytest.importorskip("timm")
    table = adq.sensitivity(quantized(name), [BATCH], F.cross_entropy, bits=(3,), estimator="hessian")
    assert sum(layer.scores[min(layer.scores)] for layer in table.layers) > 0


def test_encoder_and_decoder(tmp_path):
    """Cross attention, causal and padding masks; evaluation without gradients takes no other path than training."""

    def network() -> nn.Module:
        return nn.Transformer(16, 2, 1, 1, 32, dropout=0.0, batch_first=True)

    torch.manual_seed(0)
    model, source, target = network(), torch.randn(3, 7, 16), torch.randn(3, 5, 16)
    inputs = {
        "src": source,
        "tgt": target,
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(5),
        "tgt_is_causal": True,
        "src_key_padding_mask": torch.arange(7).expand(3, 7) >= torch.tensor([[7], [5], [6]]),
    }
    adq.calibrate_(adq.quantize_(model), [inputs])
    model(**inputs).square().mean().backward()
    assert all(bool(layer.weight.grad.any()) for layer, _ in convert.weight_quantizers(model).values())
    adq.save(model, tmp_path / "m.safetensors", packed=True)
    expected = model.eval()(**inputs)
    for other in (model, adq.load(tmp_path / "m.safetensors", network())):
        with torch.no_grad():
            torch.testing.assert_close(other(**inputs), expected, rtol=1e-4, atol=1e-5)


def test_attention_uses_its_quantizers():
    torch.manual_seed(0)
    x, attention = torch.randn(4, 5, 8), nn.MultiheadAttention(8, 2, batch_first=True)
    adq.calibrate_(adq.quantize_(attention, ADQConfig(first_last_bits=3)), [{"query": x, "key": x, "value": x}])
    q, k, v = F.linear(attention.input_quantizer(x), attention.quantized_weight(), attention.in_proj_bias).chunk(3, -1)
    q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (q, k, v))
    heads = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    out = attention.out_proj
    expected = F.linear(out.input_quantizer(heads), out.quantized_weight(), out.bias)
    for training in (True, False):
        with torch.set_grad_enabled(training):
            torch.testing.assert_close(attention.train(training)(x, x, x, need_weights=False)[0], expected)
    assert attention.quantized_weight().unique().numel() <= 8 * 24


def test_a_float_checkpoint_of_attention_loads_and_refits():
    attention, other = adq.quantize_(nn.MultiheadAttention(8, 2)), nn.MultiheadAttention(8, 2)
    keys = attention.load_state_dict(other.state_dict(), strict=True)
    assert keys.missing_keys == keys.unexpected_keys == []
    fresh = adq.quantize_(copy.deepcopy(other))
    for name, value in fresh.weight_quantizer.state_dict().items():
        assert torch.equal(attention.weight_quantizer.state_dict()[name], value)


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_copies_and_compiled_models_are_equal(name):
    model, images = quantized(name).eval(), BATCH[0]
    expected = model(images)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(images), expected)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(images), expected)


SMOOTH = ADQConfig(activation=adq.ActivationConfig(bits=8))
"""Levels so fine that it matters little where a sum in another order takes the next one."""


def trained_in_processes(name: str, parallel: str | None) -> dict[str, torch.Tensor]:
    """The whole state after two steps on this process's share of the images."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    model = trained = quantized(name, SMOOTH).train()
    if parallel == "fsdp":
        for module in [module for module in model.modules() if "Block" in type(module).__name__][::-1]:
            fully_shard(module)
        fully_shard(model)
    elif parallel == "ddp":
        trained = DistributedDataParallel(model, broadcast_buffers=False)
    rank, size = world()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(trained(BATCH[0][rank::size]), BATCH[1][rank::size]).backward()
        optimizer.step()
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    buffers = {key: value.clone() for key, value in model.named_buffers()}
    return {**{key: value.clone() for key, value in state.items()}, **buffers}


PARALLEL = [(name, parallel) for name in ("vit", "swin") for parallel in ("ddp", "fsdp")]


def all_trained() -> list[dict[str, torch.Tensor]]:
    return [trained_in_processes(name, parallel) for name, parallel in PARALLEL]


def test_attention_in_two_processes():
    """Codebooks of fused projections, and of layers that another module calls, follow as in one process."""
    for (name, _), first, second in zip(PARALLEL, *run(all_trained, 2, seconds=300.0), strict=True):
        start, alone = quantized(name, SMOOTH).state_dict(), trained_in_processes(name, None)
        floats = [key for key, value in start.items() if value.is_floating_point()]
        moved, apart, still = (
            torch.cat([(one[key] - other[key]).flatten() for key in floats]).norm()
            for one, other in ((alone, start), (first, alone), (second, first))
        )
        assert apart < 1e-3 * moved  # sums in another order
        assert still == 0
        assert all(first[key] == alone[key] == 2 for key in start if key.endswith("quantizer.steps"))


@pytest.mark.parametrize("packed", [False, True])
def test_tied_weights_of_embedding_and_heads(packed, tmp_path):
    """One codebook, moved once; the embedding reads the float weight, which stays the same parameter."""
    model = _tied()
    adq.quantize_(model, ADQConfig(activation=None, first_last_bits=3))
    first, second = model["head"], model["other"]
    assert first.weight_quantizer is second.weight_quantizer
    assert model["embed"].weight is first.weight is second.weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _scores(model).square().mean().backward()
    optimizer.step()
    assert first.weight_quantizer.steps == 1
    assert list(convert.weight_quantizers(model)) == ["head"]
    adq.save(model, tmp_path / "m.safetensors", packed=packed)
    assert torch.equal(_scores(adq.load(tmp_path / "m.safetensors", _tied())), _scores(model.eval()))


def _tied() -> nn.ModuleDict:
    torch.manual_seed(0)
    model = nn.ModuleDict({"embed": nn.Embedding(8, 8), "head": nn.Linear(8, 8), "other": nn.Linear(8, 8)})
    model["head"].weight = model["other"].weight = model["embed"].weight
    return model


def _scores(model: nn.ModuleDict) -> torch.Tensor:
    x = model["embed"](torch.arange(8))
    return model["head"](x) + model["other"](x.relu())


def test_integers_within_attention():
    model, images = architecture("vit"), BATCH[0]
    adq.quantize_(model, ADQConfig(weight=adq.WeightConfig(snap="int8")))
    adq.calibrate_(model, [images])
    with pytest.raises(ValueError, match=r"'encoder\.layers.*self_attention': there is no integer kernel for QMulti"):
        adq.to_integer(model, images)
    integer = adq.to_integer(model, images, strict=False)
    attention = integer.encoder.layers.encoder_layer_0.self_attention
    assert isinstance(attention, QMultiheadAttention)
    assert not isinstance(attention.out_proj, QLinear)
    assert_near(integer(images), model.eval()(images))


FULL_SIZE = [
    ("resnet18", {}),
    ("mobilenet_v2", {}),
    ("efficientnet_b0", {}),
    ("convnext_tiny", {}),
    ("vit_b_16", {"image_size": 64}),
    ("swin_t", {}),
    ("timm/vit_tiny_patch16_224", {"img_size": 64}),
]


@pytest.mark.skipif(not SLOW, reason="ADQ_TEST_SLOW is not set")
@pytest.mark.parametrize(("name", "options"), FULL_SIZE, ids=[name for name, _ in FULL_SIZE])
def test_full_size(name, options, tmp_path):
    """The networks as they are published, ImageNet's classes; heads that start at zero get weights."""
    torch.manual_seed(0)
    model, images = adq.create_model(name, 1000, **options), torch.randn(2, 3, 64, 64)
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    adq.reestimate_batch_norm_(model, [images])
    adq.calibrate_(adq.quantize_(model), [images])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model.train()(images).square().mean().backward()
    optimizer.step()
    assert all(quantizer.steps == 1 for _, quantizer in convert.weight_quantizers(model).values())
    adq.save(model.eval(), tmp_path / "m.safetensors", packed=True)
    with torch.no_grad():
        assert torch.equal(adq.load(tmp_path / "m.safetensors")(images), model(images))


EXPORTED = ARCHITECTURES if SLOW else ["vit", "swin"]


@pytest.mark.parametrize("name", EXPORTED)
def test_export(name, tmp_path):
    """All of them with ADQ_TEST_SLOW=1: torch's exporter is slow with each operator, so thresholds are uniform."""
    pytest.importorskip("onnxruntime")
    config = ADQConfig(activation=adq.ActivationConfig(thresholds="uniform"))
    model, images = quantized(name, config).eval(), BATCH[0]
    adq.export_onnx(model, tmp_path / "model.onnx", images[:1])
    session = onnx_session(tmp_path / "model.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    assert_near(torch.from_numpy(found), model(images))


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Sums in another order: a few activations take another level, and in a deep network one image may follow."""
    errors = (found - expected).norm(dim=1) / expected.norm(dim=1)
    assert errors.sort().values[-2] < 0.02


def onnx_session(path):
    import onnxruntime

    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def _between(table: adq.SensitivityTable) -> float:
    """Average bits half way between the least and the most that a table allows."""
    ends = [sum(end(layer.scores) * layer.weights for layer in table.layers) for end in (min, max)]
    return sum(ends) / 2 / sum(layer.weights for layer in table.layers)
