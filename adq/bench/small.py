"""Small tensors, where the call costs more than the work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from adq import ActivationConfig, WeightConfig
from adq.bench.case import ADQ, Build, Call, Case, Samples, Setting, Target, overhead
from adq.bench.data import Activations, Weights, activations, weights
from adq.nn import ActivationQuantizer, QLinear

PART = "small"
SIZES = (1_000, 10_000)
CALLS = 200
TWICE = f"{ADQ}, twice the elements"
BARE = "bare Functions"
MAX_OVERHEAD_US = 12.0
MAX_LAYER_RATIO = 1.3


def cases(setting: Setting) -> Iterator[Case]:
    """Every case of this part."""
    for elements in SIZES:
        for name, data, run in _operators():
            yield _operator_case(setting, name, elements, data, run)
        yield _layer_case(setting, elements)


def _operators() -> list[tuple[str, Callable[[Setting, int], Any], Callable[[Any], Any]]]:
    operators = torch.ops.adq
    return [
        ("lookup, K=16", _weights, lambda d: operators.codebook_lookup(d.w.first, d.codebook, d.thresholds, False)),
        (
            "lookup + count + sum, K=16",
            _weights,
            lambda d: operators.codebook_lookup_statistics(d.w.first, d.codebook, d.thresholds, False),
        ),
        (
            "N2UQ forward, 3 bits",
            _activations,
            lambda d: operators.threshold_quantize(d.x.first, *d.parameters, d.offset, d.steps),
        ),
        (
            "N2UQ backward, 3 bits",
            _activations,
            lambda d: operators.threshold_quantize_backward(d.grad.first, d.x.first, *d.parameters, d.offset, d.steps),
        ),
    ]


def _weights(setting: Setting, elements: int) -> Weights:
    return weights(setting, elements, torch.float32, 16)


def _activations(setting: Setting, elements: int) -> Activations:
    return activations(setting, elements, torch.float32, 3)


def _repeated(calls: int, run: Callable[[], Any]) -> Call:
    def call() -> None:
        for _ in range(calls):
            run()

    return call


def _on_one_thread(call: Call) -> Call:
    """Twice the elements are then twice the work: no second thread joins in at some size."""

    def pinned() -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            call()
        finally:
            torch.set_num_threads(threads)

    return pinned


def _overhead_us(samples: Samples) -> float:
    """What two calls cost beyond one call on twice the elements: a call without its work, microseconds."""
    return 1e3 * median(2 * once - twice for once, twice in zip(samples[ADQ], samples[TWICE], strict=False))


def _operator_case(
    setting: Setting, name: str, elements: int, data: Callable[[Setting, int], Any], run: Callable[[Any], Any]
) -> Case:
    calls = 2 if setting.tiny else CALLS

    def contender(index: int) -> Build:
        return lambda both: _on_one_thread(_repeated(calls, lambda: run(both[index])))

    bound = None if setting.cuda else MAX_OVERHEAD_US
    return Case(
        PART,
        f"{name}, {elements:,} elements",
        lambda: (data(setting, elements), data(setting, 2 * elements)),
        {ADQ: contender(0), TWICE: contender(1)},
        (Target(ADQ, "us a call over the work", _overhead_us, (ADQ, TWICE), bound, at_least=False),),
        calls=calls,
        host=True,
    )


class _BareWeight(Function):
    """The least that a weight quantizer's Function does: one tensor written, the gradient passed on."""

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        return w.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        return grads[0]


class _BareActivation(Function):
    """The least that a learned activation quantizer's Function does: x kept, a gradient for each parameter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(x, *parameters)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, ...]:
        _, *parameters = ctx.saved_tensors
        return grads[0].clone(), *parameters


class _BareLinear(nn.Linear):
    """A linear layer with bare Functions in place of its quantizers, and parameters as many as they have."""

    def __init__(self, width: int, intervals: int) -> None:
        super().__init__(width, width)
        self.tables = nn.ParameterList([nn.Parameter(torch.ones(n)) for n in (1, intervals, 1, 1)])

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(_BareActivation.apply(input, *self.tables), _BareWeight.apply(self.weight), self.bias)


def _step(layer: nn.Module, x: Tensor) -> Callable[[], None]:
    grad = torch.ones_like(x)

    def run() -> None:
        layer(x).backward(grad)

    return run


def _layer_case(setting: Setting, elements: int) -> Case:
    """Forward and backward of a square linear layer with about ``elements`` weights and as many inputs."""
    calls = 2 if setting.tiny else CALLS
    width = round(elements**0.5)
    config = ActivationConfig(bits=3, signed=True)

    def data() -> Tensor:
        return torch.randn(width, width, device=setting.device).requires_grad_()

    def quantized(x: Tensor) -> Call:
        layer = QLinear(width, width, weight_config=WeightConfig(bits=3), activation_config=config).to(setting.device)
        assert isinstance(layer.input_quantizer, ActivationQuantizer)
        layer.input_quantizer.calibrate_(x.detach().flatten())
        return _repeated(calls, _step(layer, x))

    def bare(x: Tensor) -> Call:
        return _repeated(calls, _step(_BareLinear(width, config.steps).to(setting.device), x))

    return Case(
        PART,
        f"quantized linear layer, forward + backward, {width}x{width} weights and inputs",
        data,
        {ADQ: quantized, BARE: bare},
        (overhead(ADQ, BARE, MAX_LAYER_RATIO),),
        calls=calls,
        host=True,
    )
