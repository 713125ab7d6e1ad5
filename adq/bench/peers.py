"""What a user would run instead of adq, each from its own package.

A function here takes what :class:`adq.bench.case.Case` shares between its contenders and returns the call that
is timed. Whatever it raises (a missing package, too little memory) is reported as the reason why the peer did not run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from adq.bench.case import Build, Call, Unavailable
from adq.bench.data import Activations, Convolution, Weights, on_data
from adq.ops import ACTIVATION_RANGE, MIN_INTERVAL

Quantize = Callable[..., Tensor]
"""Activation quantizer: ``(x, start, interval, in_scale, out_scale) -> y``."""

LOOP = "N2UQ as published, eager"
COMPILED_LOOP = "N2UQ as published, torch.compile"
BUCKETIZE = "torch.bucketize + gather"
COMPILED_BUCKETIZE = "torch.bucketize + gather, torch.compile"
FAKE_QUANTIZE = "torch.fake_quantize_per_tensor_affine"
LEARNABLE = "torch learnable fake quantize"
TORCHAO_FAKE = "torchao fake quantizer, int4 a channel"
TORCHAO_CODEBOOK = "torchao codebook quantizer"
BNB_BLOCKWISE = "bitsandbytes blockwise 8 bits"
BNB_NF4 = "bitsandbytes NF4"
VQ_EMA = "vector-quantize-pytorch EMA codebook"
FLOAT = "float32"
FLOAT_LAST = "float32, channels_last"
BF16_LAST = "bfloat16, channels_last"
INT_MM = "int8, torch._int_mm of the same size"
X86_INT8 = "int8, torch's engine x86"
FBGEMM_INT8 = "int8, torch's engine fbgemm"
ONEDNN_INT8 = "int8, onednn.qconv2d_pointwise"


# ---- the published activation quantizer ----------------------------------------------------------------


def n2uq(x: Tensor, start: Tensor, interval: Tensor, in_scale: Tensor, out_scale: Tensor) -> Tensor:
    """N2UQ (arXiv 2111.14826, section 3) in plain torch operations, a loop over the thresholds.

    The forward pass takes the step function, the backward pass, by autograd, the piecewise linear surrogate
    that rises by one step over each interval. Any float dtype; ``interval`` holds one element a step.
    """
    steps = interval.numel()
    rise = ACTIVATION_RANGE / steps
    widths = interval.clamp_min(MIN_INTERVAL)
    u = in_scale * x
    low = start
    level = torch.zeros_like(u)
    line = torch.zeros_like(u)
    for i in range(steps):
        level = torch.where(u > low + 0.5 * widths[i], (i + 1) * rise, level)
        line = torch.where(u > low, i * rise + (u - low) * (rise / widths[i]), line)
        low = low + widths[i]
    line = torch.where(u > low, ACTIVATION_RANGE, line)
    return out_scale * (level.detach() + line - line.detach())


def loop_forward(data: Activations) -> Call:
    """The published forward pass, without a graph."""
    return _without_graph(data, n2uq)


def compiled_loop_forward(data: Activations) -> Call:
    """The same, compiled."""
    return _without_graph(data, torch.compile(n2uq, fullgraph=True))


def _without_graph(data: Activations, function: Quantize) -> Call:
    parameters = [tensor.to(data.x.first.dtype) for tensor in data.parameters]

    def call() -> Tensor:
        with torch.no_grad():
            return function(data.x(), *parameters)

    return call


def loop_backward(data: Activations) -> Call:
    """The published backward pass, over a graph that is kept."""
    return _backward(data, n2uq)


def compiled_loop_backward(data: Activations) -> Call:
    """The same, compiled."""
    with torch._functorch.config.patch(donated_buffer=False):  # the graph is run backward many times
        call = _backward(data, torch.compile(n2uq, fullgraph=True))
        call()  # the backward graph is compiled here
    return call


def _backward(data: Activations, function: Quantize) -> Call:
    leaves = data.leaves()
    y = function(*leaves)
    return lambda: torch.autograd.grad(y, leaves, data.grad(), retain_graph=True)


def compiled_loop_both(data: Activations) -> Call:
    """The published algorithm compiled, forward and backward."""
    return both(torch.compile(n2uq, fullgraph=True))(data)


def both(function: Quantize) -> Build:
    """A contender that runs forward and backward of ``function(x, *parameters)``."""

    def call(data: Activations) -> tuple[Tensor, ...]:
        leaves = data.leaves()
        return torch.autograd.grad(function(*leaves), leaves, data.grad())

    return on_data(call)


def kept_bytes(function: Quantize) -> Callable[[Activations], float]:
    """Bytes per element that autograd keeps for the backward pass of ``function(x, *parameters)``."""

    def measure(data: Activations) -> float:
        kept: dict[int, int] = {}
        held: list[Tensor] = []  # so that no address is used twice

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
            return tensor

        leaves = data.leaves()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            function(*leaves)
        return sum(kept.values()) / leaves[0].numel()

    return measure


# ---- torch's own quantizers ----------------------------------------------------------------------------


def _affine(data: Activations) -> tuple[float, int]:
    """Step and largest code of a uniform quantizer over the same range, with as many levels."""
    return ACTIVATION_RANGE / data.steps, data.steps


def fake_quantize(data: Activations) -> Call:
    """Uniform, constant step."""
    scale, highest = _affine(data)

    def call() -> Tensor:
        with torch.no_grad():
            return torch.fake_quantize_per_tensor_affine(data.x(), scale, 0, 0, highest)

    return call


def _learnable(data: Activations) -> tuple[Tensor, Tensor, int]:
    scale, highest = _affine(data)
    device = data.x.first.device
    return torch.full((1,), scale, device=device), torch.zeros(1, device=device), highest


def learnable_forward(data: Activations) -> Call:
    """Uniform, learned step and zero point."""
    scale, zero, highest = _learnable(data)

    def call() -> Tensor:
        with torch.no_grad():
            return torch._fake_quantize_learnable_per_tensor_affine(data.x(), scale, zero, 0, highest, 1.0)

    return call


def learnable_both(data: Activations) -> Call:
    """The same, forward and backward."""
    scale, zero, highest = _learnable(data)
    scale.requires_grad_()
    zero.requires_grad_()

    def call() -> tuple[Tensor, ...]:
        leaves = (data.x().detach().requires_grad_(), scale, zero)
        y = torch._fake_quantize_learnable_per_tensor_affine(*leaves, 0, highest, 1.0)
        return torch.autograd.grad(y, leaves, data.grad())

    return call


def _bucketize(w: Tensor, codebook: Tensor, thresholds: Tensor) -> Tensor:
    return codebook[torch.bucketize(w, thresholds)]


def bucketize(data: Weights) -> Call:
    """Nearest level by binary search, then a gather."""
    return lambda: _bucketize(data.w(), data.codebook, data.thresholds)


def compiled_bucketize(data: Weights) -> Call:
    """The same, compiled."""
    function = torch.compile(_bucketize, fullgraph=True)
    return lambda: function(data.w(), data.codebook, data.thresholds)


# ---- other packages ------------------------------------------------------------------------------------


def torchao_fake_quantize(data: Weights | Activations) -> Call:
    """torchao's QAT quantizer: symmetric int4, a scale a row from the row's own range."""
    from torchao.quantization.granularity import PerAxis
    from torchao.quantization.qat import IntxFakeQuantizeConfig, IntxFakeQuantizer

    quantizer = IntxFakeQuantizer(IntxFakeQuantizeConfig(torch.int4, PerAxis(0)))  # type: ignore[attr-defined]
    values = data.w if isinstance(data, Weights) else data.x

    def call() -> Tensor:
        with torch.no_grad():
            return quantizer(values())

    return call


def torchao_codebook(data: Weights) -> Call:
    """torchao's codebook quantizer: nearest of 16 levels by a matrix product, then a gather."""
    from torchao.prototype.quantization.codebook.codebook_ops import dequantize_codebook, quantize_codebook

    codebook = data.codebook.view(-1, 1, 1)
    scales = torch.ones(data.w.first.shape[0], 1, 1, device=codebook.device)

    def call() -> Tensor:
        quantized = quantize_codebook(data.w(), codebook, scales)
        return dequantize_codebook(quantized.to(torch.int32), codebook, scales)

    return call


def bitsandbytes_blockwise(data: Weights) -> Call:
    """A table of 256 levels and a scale a block of 4096: codes, then values."""
    from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise

    table = data.codebook / data.codebook.abs().max()

    def call() -> Tensor:
        return dequantize_blockwise(*quantize_blockwise(data.w(), code=table))

    return call


def bitsandbytes_nf4(data: Weights) -> Call:
    """The 16 levels of NF4 and a scale a block of 64: codes, then values."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    return lambda: dequantize_4bit(*quantize_4bit(data.w(), quant_type="nf4"))


def vq_ema(data: Weights) -> Call:
    """vector-quantize-pytorch: lookup and EMA update of a scalar codebook, in training mode."""
    from vector_quantize_pytorch import VectorQuantize

    levels = data.codebook.numel()
    quantizer = VectorQuantize(dim=1, codebook_size=levels, decay=0.99, commitment_weight=0.0).to(data.codebook.device)
    quantizer.train()

    def call() -> Any:
        with torch.no_grad():
            return quantizer(data.w().view(1, -1, 1))

    return call


# ---- convolutions --------------------------------------------------------------------------------------


def _geometry(data: Convolution) -> tuple[list[int], list[int], list[int], int]:
    """Stride, padding, dilation and groups."""
    stride, padding = ([data.arguments[name]] * 2 for name in ("stride", "padding"))
    return stride, padding, [1, 1], data.arguments["groups"]


def float_convolution(memory_format: torch.memory_format, dtype: torch.dtype = torch.float32) -> Build:
    """torch's own convolution, without the ReLU."""

    def build(data: Convolution) -> Call:
        x = data.x.to(dtype).contiguous(memory_format=memory_format)
        weight = (data.scale * data.weight.float()).to(dtype).contiguous(memory_format=memory_format)
        geometry = _geometry(data)
        return lambda: torch.conv2d(x, weight, None, *geometry)

    return build


def integer_product(data: Convolution) -> Call:
    """``torch._int_mm`` of a product as large as the convolution: a bound, without gathering the inputs of each pixel
    and without what follows the sums.
    """
    outputs, inputs = data.weight.shape[0], data.weight[0].numel()
    pixels = torch.ops.adq.integer_conv2d(*data.operands)[1][0].numel() // outputs
    if data.arguments["groups"] > 1 or inputs % 8 or outputs % 8:
        raise Unavailable("torch._int_mm takes one group, and sides that are multiples of 8")
    rows = torch.ones(pixels, inputs, dtype=torch.int8, device=data.x.device)
    columns = data.weight.reshape(outputs, inputs).t()
    return lambda: torch._int_mm(rows, columns)


def quantized_convolution(engine: str) -> Build:
    """torch's quantized convolution and ReLU, uint8 to uint8, a scale for each output channel; its weights are packed
    by ``engine``: x86 (oneDNN where it has VNNI, but for depthwise ones) or fbgemm.
    """

    def build(data: Convolution) -> Call:
        outputs = data.weight.shape[0]
        scales = torch.full((outputs,), data.scale, dtype=torch.float64)
        zeros = torch.zeros(outputs, dtype=torch.int64)
        weight = torch._make_per_channel_quantized_tensor(data.weight, scales, zeros, 0)
        x = torch._make_per_tensor_quantized_tensor(data.x, 1.0, 0).contiguous(memory_format=torch.channels_last)
        before = torch.backends.quantized.engine
        torch.backends.quantized.engine = engine
        try:
            packed = torch.ops.quantized.conv2d_prepack(weight, None, *_geometry(data))
        finally:
            torch.backends.quantized.engine = before
        return lambda: torch.ops.quantized.conv2d_relu(x, packed, 1.0, 0)

    return build


def onednn_convolution(data: Convolution) -> Call:
    """oneDNN's int8 convolution and ReLU, as torch.compile calls it for quantized models."""
    scales = torch.full((data.weight.shape[0],), data.scale)
    zeros = torch.zeros(data.weight.shape[0], dtype=torch.int32)
    geometry = _geometry(data)
    packed = torch.ops.onednn.qconv_prepack(data.weight, scales, 1.0, 0, *geometry, list(data.x.shape))
    result: tuple[Any, ...] = 1.0, 0, torch.uint8, "relu", [], ""
    return lambda: torch.ops.onednn.qconv2d_pointwise(data.x, 1.0, 0, packed, scales, zeros, None, *geometry, *result)


def quantized_network(model: nn.Module, images: Tensor) -> Call:
    """torch's quantized network in int8: batch norms folded, a scale for each output channel, engine x86."""
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = "x86"
    try:
        prepared = prepare_fx(model, get_default_qconfig_mapping("x86"), (images,))
        prepared(images)
        quantized = convert_fx(prepared)
    finally:
        torch.backends.quantized.engine = before
    return lambda: quantized(images)


# ---- codebook fits -------------------------------------------------------------------------------------

Fit = Callable[[Tensor], Tensor]
"""Weights to an ascending float32 codebook."""


def sklearn_fit(levels: int) -> Fit:
    """scikit-learn's KMeans with one k-means++ start and its own stopping rule."""
    from sklearn.cluster import KMeans

    def fit(w: Tensor) -> Tensor:
        fitted = KMeans(levels, n_init=1, random_state=0).fit(w.cpu().numpy().reshape(-1, 1))
        return torch.from_numpy(fitted.cluster_centers_).flatten().float().sort().values

    return fit


def torchao_fit(levels: int) -> Fit:
    """torchao's k-means over one row, so that all the weights share its scale."""
    from torchao.prototype.quantization.codebook.codebook_ops import choose_qparams_codebook

    dtype = getattr(torch, f"uint{(levels - 1).bit_length()}")

    def fit(w: Tensor) -> Tensor:
        codebook, scales = choose_qparams_codebook(w.view(1, -1), (1, 1), w.numel(), dtype)
        return (codebook.flatten() * scales.flatten()).float().sort().values

    return fit


def coremltools_fit(levels: int, exact: bool) -> Fit:
    """coremltools' palettization: scikit-learn with a loose tolerance, or its exact one-dimensional k-means."""
    from coremltools.models.neural_network.quantization_utils import _get_kmeans_lookup_table_and_weight

    bits = (levels - 1).bit_length()

    def fit(w: Tensor) -> Tensor:
        table, _ = _get_kmeans_lookup_table_and_weight(bits, w.cpu().numpy(), force_kmeans1d=exact)
        return torch.from_numpy(table).flatten().float().sort().values

    return fit
