"""Public, differentiable functions over the operators; each gradient is documented where it is taken."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable as _once_differentiable

from adq import ops
from adq.reference import decision_thresholds

_ops = torch.ops.adq


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """torch's decorator of the same name, at no cost where no graph of the backward pass is made."""
    marked = _once_differentiable(backward)

    @wraps(backward)
    def either(ctx: Any, *grads: Tensor | None) -> Any:
        return (marked if torch.is_grad_enabled() else backward)(ctx, *grads)

    return either


class _CodebookQuantize(Function):
    """Nearest codeword forward; straight-through backward: ``dL/dw = dL/dw_q``."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, codebook: Tensor, thresholds: Tensor, codes: bool) -> tuple[Tensor, Tensor]:
        w_q, code = _ops.codebook_lookup(w, codebook, thresholds, codes)
        ctx.mark_non_differentiable(code)
        ctx.set_materialize_grads(False)
        return w_q, code

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        return grads[0], None, None, None


class _WeightQuantize(Function):
    """``w_q = scale * c[code(w / scale)]``, unless it is known; straight-through backward: ``dL/dw = dL/dw_q``."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, scale: Tensor, codebook: Tensor, w_q: Tensor | None) -> Tensor:
        return _ops.foreach_codebook_quantize([w], [scale], [codebook])[0] if w_q is None else w_q

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return grad, None, None, None


class _LearnedCodebookQuantize(Function):
    """As :class:`_CodebookQuantize`, and the codebook learns: ``dL/dc[k] = sum over cell k of dL/dw_q``."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, codebook: Tensor, thresholds: Tensor) -> Tensor:
        w_q, code = _ops.codebook_lookup(w, codebook, thresholds, True)
        ctx.save_for_backward(torch.where(w.isnan(), codebook.numel(), code.short()))  # NaN is in no cell
        ctx.levels = codebook.numel()
        return w_q

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (code,) = ctx.saved_tensors
        # a masked sum per level, not index_add_, whose order is not fixed on a GPU
        sums = [torch.where(code == k, grad, 0.0).sum(dtype=torch.float32) for k in range(ctx.levels)]
        return grad, torch.stack(sums), None


class _ScaleGradient(Function):
    """Identity, whose gradient is multiplied by a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


class _ThresholdQuantize(Function):
    """N2UQ forward; G-STE backward (formulas: :func:`adq.reference.threshold_quantize_backward`).

    Saves x and the parameters themselves, nothing per threshold.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        start: Tensor,
        interval: Tensor,
        in_scale: Tensor,
        out_scale: Tensor,
        offset: Tensor,
        steps: int,
    ) -> Tensor:
        ctx.save_for_backward(x, start, interval, in_scale, out_scale, offset)
        ctx.steps = steps
        return _ops.threshold_quantize(x, start, interval, in_scale, out_scale, offset, steps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        gradients = _ops.threshold_quantize_backward(grad, x, *parameters, ctx.steps)
        return (*gradients, None, None)


def quantize_weight(w: Tensor, scale: Tensor, codebook: Tensor, w_q: Tensor | None = None) -> Tensor:
    """``w_q = scale * c[code(w / scale)]`` with a straight-through gradient to w: the modules' hot path.

    Args:
        w: weight, float32, bfloat16 or float16, any shape and strides.
        scale: contiguous float32, as many dimensions as w, all of size 1 but at most one (the channels).
        codebook: ascending float32 ``[K]``, in units of the scale; gets no gradient.
        w_q: the quantized weight, if it is known already.

    Returns:
        w_q, in w's shape, dtype and strides.
    """
    return _WeightQuantize.apply(w, scale, codebook, w_q)


def learned_lookup(w: Tensor, codebook: Tensor) -> Tensor:
    """Nearest codewords of w, with straight-through gradient to w and one for the codebook: ``dL/dw_q`` summed
    over each cell."""
    return _LearnedCodebookQuantize.apply(w, codebook, decision_thresholds(codebook.detach()))


def learned_step(w: Tensor, scale: Tensor, codebook: Tensor) -> Tensor:
    """``w_q = scale * c[code(w / scale)]`` on a fixed grid c whose step, the scale, learns (LSQ, arXiv 1902.08153).

    Backward: to w straight through where ``w / scale`` lies within the grid, none outside; to the scale
    ``sum dL/dw_q (c[code] - w / scale)`` within and ``sum dL/dw_q c[code]`` outside, times
    ``1 / sqrt(n c[-1])`` for the n weights that share it.
    """
    n = max(w.numel() / max(scale.numel(), 1), 1.0)
    scale = _ScaleGradient.apply(scale, (n * max(1.0, (codebook.numel() - 1) // 2)) ** -0.5)
    x = (w / scale).clamp(codebook[0], codebook[-1])
    q, _ = _CodebookQuantize.apply(x, codebook, decision_thresholds(codebook), False)
    return q * scale


def _check_ascending(codebook: Tensor) -> None:
    # reading values would stop a compiled graph and stall a GPU: there the caller answers for the order
    if codebook.device.type != "cpu" or torch.compiler.is_compiling() or isinstance(codebook, FakeTensor):
        return
    if codebook.dim() == 1 and not bool((codebook[1:] >= codebook[:-1]).all()):
        raise ValueError("adq: the codebook must be ascending")


def codebook_quantize(w: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest codeword of every weight, with a straight-through gradient to w.

    ``code = #{k : w > 0.5 (c[k] + c[k + 1])}``, ``w_q = c[code]``: a tie goes to the lower codeword, NaN in
    w gives NaN. Backward: ``dL/dw = dL/dw_q``; the codebook gets no gradient.

    Args:
        w: float32, bfloat16 or float16, any shape and strides.
        codebook: ascending float32 ``[K]``, 1 <= K <= 256.

    Returns:
        ``(w_q, codes)`` in w's shape and strides; w_q in w's dtype, codes uint8.

    Raises:
        TypeError, ValueError: wrong dtype, device or length; a codebook that is not ascending (CPU only).
    """
    _check_ascending(codebook)
    codebook = codebook.detach()
    return _CodebookQuantize.apply(w, codebook, decision_thresholds(codebook), True)


def codebook_statistics(w: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Per level, how many weights are nearest to it and their sum; deterministic bit for bit.

    Args:
        w: float32, bfloat16 or float16, any shape; NaN counts nowhere.
        codebook: ascending float32 ``[K]``.

    Returns:
        ``(count, total)``: int64 ``[K]`` and float32 ``[K]``. No gradients.
    """
    _check_ascending(codebook)
    return _ops.codebook_statistics(w.detach(), decision_thresholds(codebook.detach()))


def threshold_quantize(
    x: Tensor,
    start: Tensor,
    interval: Tensor,
    in_scale: Tensor,
    out_scale: Tensor,
    *,
    offset: Tensor | None = None,
    steps: int | None = None,
) -> Tensor:
    """N2UQ activation quantizer with learned thresholds (arXiv 2111.14826), quantize and dequantize.

    ``u = in_scale x``, ``T_0 = start``, ``T_i = start + sum_{j<i} interval[j]``,
    ``q = #{i : u > T_i + interval[i] / 2}``, ``y = out_scale (D q - offset)`` with ``D = 2 / steps``.
    Gradients of all five inputs by G-STE (:func:`adq.reference.threshold_quantize_backward`); intervals
    below 1e-3 are clamped and get none. Only x and the parameters are kept for the backward.

    Args:
        x: float32, bfloat16 or float16, any shape and strides.
        start, in_scale, out_scale: one element each, shape ``[]`` or ``[1]``.
        interval: ``[steps]``, or ``[1]`` with ``steps`` given: the uniform quantizer.
        offset: one element, in units of D q; ``D z`` makes level z stand for zero. Default 0.
        steps: number of thresholds n, 1..255. Default: the number of intervals.

    Returns:
        y in x's shape, dtype and strides.

    Raises:
        TypeError, ValueError: wrong dtype, device or number of elements.
    """
    steps = interval.numel() if steps is None else steps
    offset = torch.zeros(1, dtype=torch.float32, device=x.device) if offset is None else offset
    start, interval, in_scale, out_scale, offset = map(_as_table, (start, interval, in_scale, out_scale, offset))
    return quantize_activation(x, start, interval, in_scale, out_scale, offset, steps)


def quantize_activation(
    x: Tensor, start: Tensor, interval: Tensor, in_scale: Tensor, out_scale: Tensor, offset: Tensor, steps: int
) -> Tensor:
    """:func:`threshold_quantize` for parameters that are one-dimensional float32: the modules' hot path."""
    return _ThresholdQuantize.apply(x, start, interval, in_scale, out_scale, offset, steps)


def _as_table(parameter: Tensor) -> Tensor:
    """A parameter as one-dimensional contiguous float32; differentiable, free where it is so already."""
    if parameter.dtype == torch.float32 and parameter.dim() == 1 and parameter.is_contiguous():
        return parameter
    return parameter.float().reshape(-1).contiguous()


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes of ``bits`` bits, in row-major order, into a little-endian bit stream.

    Args:
        codes: uint8, any shape, each below ``2**bits``.
        bits: 1..8.

    Returns:
        uint8 ``[ceil(numel * bits / 8)]``.

    Raises:
        ValueError: a code does not fit; it is named.
    """
    ops.check_pack(codes, bits)
    if codes.numel() and (largest := int(codes.max())) >= 2**bits:
        raise ValueError(f"adq: code {largest} does not fit in {bits} bits")
    return _ops.pack_bits(codes, bits)


def unpack(packed: Tensor, bits: int, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """The inverse of :func:`pack`: uint8 codes of ``shape``. Raises ValueError if the length is wrong."""
    return _ops.unpack_bits(packed, bits, torch.Size(shape).numel()).view(shape)


def decode(
    packed: Tensor, codebook: Tensor, scale: Tensor, shape: tuple[int, ...] | torch.Size, bits: int | None = None
) -> Tensor:
    """A weight from its packed codes: ``scale * codebook[code]``, float32 and contiguous; no gradients.

    Args:
        packed: codes as :func:`pack` writes them, as wide as the codebook needs.
        codebook: float32 ``[K]``, 1 <= K <= 256. A code of K or more takes the last level.
        scale: contiguous float32, as many dimensions as ``shape``, all of size 1 but at most one (the channels).
        shape: of the weight.
        bits: width of a code, where it is known: to ``torch.jit.trace`` the size of the codebook is no number.

    Raises:
        TypeError, ValueError: wrong dtype, device or number of elements.
    """
    bits = code_bits(codebook.numel()) if bits is None else bits
    return _ops.codebook_decode(packed, codebook, scale, bits, list(shape))


def codebook_linear(
    x: Tensor, packed: Tensor, codebook: Tensor, scale: Tensor, outputs: int, bits: int | None = None
) -> Tensor:
    """``y = x W^T`` for few rows of x, on the packed codes of W itself: they are all that is read of it. No gradients.

    ``W = scale * codebook[code]``; sums are float32, in an order of their own, the same on every run.

    Args:
        x: float32, bfloat16 or float16 ``[..., in]``, any strides.
        packed: codes of W ``[outputs, in]`` as :func:`pack` writes them, as wide as the codebook needs.
        codebook: float32 ``[K]``, 1 <= K <= 256. A code of K or more takes the last level.
        scale: contiguous float32 ``[outputs, 1]`` or ``[1, 1]``.
        outputs: rows of W.
        bits: as of :func:`decode`.

    Returns:
        y in x's dtype, ``[..., outputs]``, contiguous.

    Raises:
        TypeError, ValueError: wrong dtype, device or number of elements.
    """
    bits = code_bits(codebook.numel()) if bits is None else bits
    return _ops.codebook_linear(x.detach(), packed, codebook, scale, bits, outputs)


def code_bits(levels: int) -> int:
    """Width of the codes of that many levels."""
    return max(1, (levels - 1).bit_length())
