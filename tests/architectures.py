"""Small networks of the common architectures: their own depth where it is cheap, few channels, small images."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torchvision.models import (
    ConvNeXt,
    EfficientNet,
    ResNet,
    SwinTransformer,
    VisionTransformer,
    mobilenet_v2,
    mobilenet_v3_large,
    mobilenet_v3_small,
)
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.efficientnet import MBConvConfig
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2

CLASSES = 10


class SlimResNet(ResNet):
    """A ResNet with an eighth of the channels behind its first layer."""

    def __init__(self, block: type[nn.Module], layers: list[int]) -> None:
        super().__init__(block, layers)
        self.fc = nn.Linear(512 // 8 * block.expansion, CLASSES)

    def _make_layer(self, block, planes, *args, **kwargs):
        return super()._make_layer(block, planes // 8, *args, **kwargs)


def _efficientnet() -> nn.Module:
    stages = [MBConvConfig(1, 3, 1, 8, 8, 1, 1, 1), MBConvConfig(6, 5, 2, 8, 16, 2, 1, 1)]
    return EfficientNet(stages, 0.2, stochastic_depth_prob=0.0, last_channel=64, num_classes=CLASSES)


def _swin(**kwargs) -> nn.Module:
    sizes = [4, 4], 16, [2, 1], [2, 4], [4, 4]
    return SwinTransformer(*sizes, stochastic_depth_prob=0.0, num_classes=CLASSES, **kwargs)


def _timm(name: str, **kwargs) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False, num_classes=CLASSES, **kwargs)


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "resnet18": partial(SlimResNet, BasicBlock, [2, 2, 2, 2]),
    "resnet34": partial(SlimResNet, BasicBlock, [3, 4, 6, 3]),
    "resnet50": partial(SlimResNet, Bottleneck, [3, 4, 6, 3]),
    "mobilenet_v2": partial(mobilenet_v2, width_mult=0.25, num_classes=CLASSES),
    "mobilenet_v3_small": partial(mobilenet_v3_small, width_mult=0.25, num_classes=CLASSES),
    "mobilenet_v3_large": partial(mobilenet_v3_large, width_mult=0.25, num_classes=CLASSES),
    "efficientnet": _efficientnet,
    "convnext": partial(ConvNeXt, [CNBlockConfig(16, 32, 2), CNBlockConfig(32, None, 1)], num_classes=CLASSES),
    "vit": partial(VisionTransformer, 64, 16, 2, 2, 32, 64, num_classes=CLASSES),
    "swin": _swin,
    "swin_v2": partial(_swin, block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2),
    "timm-resnet18": partial(_timm, "resnet18", channels=(8, 16, 24, 32)),
    "timm-vit": partial(_timm, "vit_tiny_patch16_224", img_size=64, depth=2, embed_dim=32, num_heads=2),
    "timm-swin": partial(
        _timm, "swin_tiny_patch4_window7_224", img_size=64, window_size=4, embed_dim=16, depths=(2, 1), num_heads=(2, 4)
    ),
    "timm-convnext": partial(_timm, "convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)),
    "timm-mobilenetv3": partial(_timm, "mobilenetv3_small_050"),
}


def architecture(name: str) -> nn.Module:
    """A network by its name in :data:`ARCHITECTURES`, seeded; heads and norms that start at zero get weights too."""
    torch.manual_seed(0)
    model = ARCHITECTURES[name]()
    for key, parameter in model.named_parameters():
        if key.endswith("weight") and not parameter.any():
            nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.02)
    return model
