"""Inference with integers: layers beside torch in float32 and int8 on a CPU, in bfloat16 and int8 on a GPU; on a CPU a
network too, and layers with packed weights, decoded, then convolved by torch in float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

import adq
from adq.bench import peers
from adq.bench.case import ADQ, Build, Call, Case, Setting, Target, faster_than, speed_of
from adq.bench.data import Convolution, convolution, on_data
from adq.bench.layers import Conv
from adq.nn import QConv2d

PART = "integer"
BITS = 3
SECONDS = 1.0
NETWORK_SECONDS = 8.0
BATCHES = (1, 32)
OVER_FLOAT, OVER_INT8 = 2.0, 1.0
"""Of 3x3 convolutions of at least WIDE channels."""
WIDE = 128
OVER_BF16 = 1.3
"""Of the same ones on a GPU, in a batch that makes arithmetic bound them."""
NETWORK_OVER_FLOAT = 1.8
PACKED = "adq, packed weights, float32"
PACKED_SPEED = 0.95
"""Of float32, for the same convolutions in a batch that makes arithmetic bound them."""
FOLDED = "float32, channels_last, batch norms folded"
LAYERS = (
    Conv("ResNet-18", 64, 64, 3, 56),
    Conv("ResNet-18", 64, 128, 3, 56, stride=2),
    Conv("ResNet-18", 128, 128, 3, 28),
    Conv("ResNet-18", 128, 256, 3, 28, stride=2),
    Conv("ResNet-18", 256, 256, 3, 14),
    Conv("ResNet-18", 256, 512, 3, 14, stride=2),
    Conv("ResNet-18", 512, 512, 3, 7),
    Conv("ResNet-18", 64, 128, 1, 56, stride=2),
    Conv("ResNet-18", 256, 512, 1, 14, stride=2),
    Conv("ResNet-18", 3, 64, 7, 224, stride=2),
    Conv("MobileNetV2", 96, 96, 3, 112, stride=2, groups=96),
    Conv("MobileNetV2", 64, 384, 1, 14),
    Conv("MobileNetV2", 384, 384, 3, 14, groups=384),
)


def cases(setting: Setting) -> Iterator[Case]:
    """Every case of this part."""
    for batch in (1, setting.layer_batch):
        for layer in (LAYERS[2], LAYERS[7], LAYERS[12]) if setting.tiny else LAYERS:
            yield (_gpu_layer_case if setting.cuda else _layer_case)(setting, layer, batch)
    if setting.cuda:
        return
    for batch in BATCHES[:1] if setting.tiny else BATCHES:
        yield _network_case(setting, batch)


# ---- layers ------------------------------------------------------------------------------------------


def _is_judged(layer: Conv) -> bool:
    return layer.kernel == 3 and layer.groups == 1 and layer.inputs >= WIDE


def _gpu_layer_case(setting: Setting, layer: Conv, batch: int) -> Case:
    """The levels of the next layer are a pass of their own there."""
    return Case(
        PART,
        f"{layer.name}, batch {batch}, {BITS} bits",
        lambda: convolution(layer.shape(batch, setting.tiny), layer.arguments(), BITS, setting.device),
        {
            ADQ: on_data(run_convolution),
            peers.BF16_LAST: peers.float_convolution(torch.channels_last, torch.bfloat16),
            peers.INT_MM: peers.integer_product,
        },
        (
            faster_than(peers.BF16_LAST, OVER_BF16 if _is_judged(layer) and batch > 1 else None),
            faster_than(peers.INT_MM, None),
        ),
        items=batch,
        item="images",
        seconds=min(SECONDS, setting.seconds),
    )


def _layer_case(setting: Setting, layer: Conv, batch: int) -> Case:
    judged = _is_judged(layer)
    over_float, over_int8 = (OVER_FLOAT, OVER_INT8) if judged else (None, None)
    packed_speed = PACKED_SPEED if judged and batch > 1 else None
    return Case(
        PART,
        f"{layer.name}, batch {batch}, {BITS} bits",
        lambda: convolution(layer.shape(batch, setting.tiny), layer.arguments(), BITS),
        {
            ADQ: on_data(run_convolution),
            PACKED: _packed,
            peers.FLOAT: peers.float_convolution(torch.contiguous_format),
            peers.FLOAT_LAST: peers.float_convolution(torch.channels_last),
            peers.X86_INT8: peers.quantized_convolution("x86"),
            peers.FBGEMM_INT8: peers.quantized_convolution("fbgemm"),
            peers.ONEDNN_INT8: peers.onednn_convolution,
        },
        (
            *(faster_than(peer, over_float) for peer in (peers.FLOAT, peers.FLOAT_LAST)),
            *(speed_of(peer, packed_speed, PACKED) for peer in (peers.FLOAT, peers.FLOAT_LAST)),
            *(faster_than(peer, over_int8) for peer in (peers.X86_INT8, peers.ONEDNN_INT8)),
        ),
        items=batch,
        item="images",
        seconds=min(SECONDS, setting.seconds),
    )


def run_convolution(data: Convolution) -> Tensor:
    """Levels to levels of the next layer, packed weights decoded on the way."""
    return torch.ops.adq.integer_conv2d(*data.operands)[1][0]


def _packed(data: Convolution) -> Call:
    layer = QConv2d(**data.arguments, weight_config=adq.WeightConfig(bits=BITS), activation_config=None)
    images = data.x.float().contiguous(memory_format=torch.channels_last)
    return _without_graph(adq.pack_(nn.Sequential(layer.to(memory_format=torch.channels_last))), images)


# ---- the network -------------------------------------------------------------------------------------


def _network_case(setting: Setting, batch: int) -> Case:
    name, size = ("resnet20", 32) if setting.tiny else ("resnet18", 224)
    contenders: dict[str, Build] = {
        ADQ: lambda images: _without_graph(_integer(name, images), images),
        peers.FLOAT: lambda images: _without_graph(_network(name), images),
        peers.FLOAT_LAST: lambda images: _last(_network(name), images),
        FOLDED: lambda images: _last(fuse(_network(name)), images),
        peers.X86_INT8: lambda images: peers.quantized_network(_network(name), images),
    }
    targets: list[Target] = [faster_than(peer, NETWORK_OVER_FLOAT) for peer in (peers.FLOAT, peers.FLOAT_LAST)]
    return Case(
        PART,
        f"{name}, {size}x{size}, batch {batch}, {BITS} bits, first and last layer at 8",
        lambda: torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0)),
        contenders,
        tuple(targets),
        items=batch,
        item="images",
        seconds=min(NETWORK_SECONDS, 2 * setting.seconds),
    )


def _network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return adq.create_model(name).eval()


def _integer(name: str, images: Tensor) -> nn.Module:
    """The network quantized, calibrated and converted."""
    config = adq.ADQConfig(
        adq.WeightConfig(bits=BITS, snap="int8", scale="channel"),
        adq.ActivationConfig(bits=BITS),
        overrides={"conv1": {"activation": {"signed": True}}},
    )
    model = adq.quantize_(_network(name), config)
    return adq.to_integer(adq.calibrate_(model, [images], batch_norm=False), images)


def _last(model: nn.Module, images: Tensor) -> Call:
    return _without_graph(
        model.to(memory_format=torch.channels_last), images.contiguous(memory_format=torch.channels_last)
    )


def _without_graph(model: nn.Module, images: Tensor) -> Call:
    def call() -> Tensor:
        with torch.no_grad():
            return model(images)

    return call
