"""How much each layer's quantization costs at each bit-width: the table the allocator works from."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from adq.batch_norm import float_network
from adq.batches import batch_size, forward_batch, model_device, to_device
from adq.config import check_bits
from adq.convert import (
    activation_quantizers,
    float_tensors,
    is_trained,
    quantized_layers,
    quantizer_prefixes,
    unwrapped,
    ways_out,
    weight_quantizers,
)
from adq.distributed import pool, world
from adq.nn.layers import QuantizedLayer
from adq.nn.weight import WeightQuantizer

Estimator = Literal["loss", "fisher", "hessian", "true_fisher", "kl"]
Order = Literal["random", "reversed"]
LossFn = Callable[[Any, Any], Tensor]

HUTCHINSON_PROBES = 8
KL_TEMPERATURE = 2.0
"""A network that has learnt its training images is sure of nearly all of them, and a few others would decide the
score; softened outputs let all of them count."""


@dataclass(frozen=True)
class LayerCost:
    """One layer of the table.

    Attributes:
        name: qualified name.
        weights: number of weights.
        macs: multiply-accumulates per sample of the batches.
        activation_bits: width of its input, 32 if in float.
        scores: estimated rise of the loss by bit-width; a pinned layer has only its own width.
        pinned: whether its width is fixed by the configuration (first and last layer).
        in_float: whether a layer in float, an embedding say, uses its weight too, so that files hold it in float: it is
            quantized when this layer computes, and takes nothing of a budget in bits or bytes.
    """

    name: str
    weights: int
    macs: int
    activation_bits: int
    scores: dict[int, float]
    pinned: bool = False
    in_float: bool = False


@dataclass(frozen=True)
class SensitivityTable:
    """Rise of the calibration loss with one layer quantized alone, layer by layer and width by width.

    Attributes:
        estimator: how the scores were obtained.
        layers: in order of registration.
        float_weights: parameters of the network that stay in float (biases, norms, unquantized layers).
    """

    estimator: str
    layers: tuple[LayerCost, ...]
    float_weights: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain mappings, for YAML."""
        layers = [
            {
                "name": layer.name,
                "weights": layer.weights,
                "macs": layer.macs,
                "activation_bits": layer.activation_bits,
                "pinned": layer.pinned,
                **({"in_float": True} if layer.in_float else {}),
                "scores": {int(bits): float(score) for bits, score in layer.scores.items()},
            }
            for layer in self.layers
        ]
        return {"estimator": self.estimator, "float_weights": self.float_weights, "layers": layers}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SensitivityTable:
        """The inverse of :meth:`to_dict`, also of its YAML, whose keys are text."""
        layers = tuple(
            LayerCost(**{**layer, "scores": {int(bits): float(score) for bits, score in layer["scores"].items()}})
            for layer in values["layers"]
        )
        return cls(values["estimator"], layers, values["float_weights"])


def sensitivity(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFn | None = None,
    bits: Sequence[int] = (2, 3, 4, 8),
    estimator: Estimator = "fisher",
    *,
    pinned: Sequence[str] | None = None,
) -> SensitivityTable:
    """Score every layer at every bit-width, all other layers in float and in evaluation mode.

    Of a model that has been trained inputs stay quantized: its thresholds are part of what it computes.

    ``"loss"``: rise of the mean loss with that layer alone quantized: the truth, ``layers x widths`` passes.
    ``"fisher"``: ``0.5 sum F dw^2`` with the empirical Fisher diagonal F of the batches; one pass.
    ``"hessian"``: ``0.5 (tr H / n) ||dw||^2``, trace by Hutchinson's estimator (HAWQ-V2, arXiv 1911.03852).
    ``"true_fisher"``: as ``"fisher"``, with labels drawn from the network's own softmax: the Gauss-Newton diagonal.
    ``"kl"``: mean ``T^2`` KL(float || that layer alone quantized) of softmax(outputs / T), T = 2; ``layers x widths``
    passes, but of so little variance that 128 images do.
    The last two take the outputs, or their ``logits``, as those of a classifier, [N, C], and use neither targets nor
    ``loss_fn``.
    ``"fisher"`` is the default: it takes any differentiable loss of what the model returns in evaluation mode, costs
    one pass, and in ``adq sensitivity --study`` on a ResNet-20 its sums are among the best two at ranking whole
    allocations once batch norms have followed (benchmarks/results).
    dw is the weight's change under a codebook of that width fitted as training would. Weights are not changed.
    In a process group every process calls it, with the model not yet wrapped and its own share of the batches
    (:func:`adq.distributed.share`); all come to the table of one process with all batches, bit for bit.

    Args:
        model: from :func:`adq.quantize_`; need not be calibrated.
        batches: iterable of ``(inputs, targets)``, or of mappings of keyword arguments, which ``loss_fn`` gets whole in
            place of targets; kept in memory.
        loss_fn: ``(outputs, targets) -> scalar``, mean over the batch; not needed by the last two estimators.
        bits: widths to score, each 1..8.
        estimator: see above.
        pinned: layers to keep at their present width; default: those that the configuration pins (first and last
            layer, overrides with bits of their own).

    Returns:
        The table, with pinned layers at their one width.

    Raises:
        ValueError: no quantized weights, no batches, unknown estimator or one without its loss, bad bits or names; a
            non-finite loss; outputs that are no logits, where the estimator needs them.
        TypeError: outputs that ``loss_fn`` does not take.
    """
    layers = weight_quantizers(model)
    if not layers:
        raise ValueError("adq: no layer has quantized weights; call adq.quantize_(model) first")
    if estimator not in _ESTIMATORS:
        raise ValueError(f"adq: estimator must be one of {', '.join(_ESTIMATORS)}, got {estimator!r}")
    widths = sorted({check_bits(b, "bits of the table") for b in bits})
    if not widths:
        raise ValueError("adq: no bit-widths to score")
    if loss_fn is None and estimator not in ("true_fisher", "kl"):
        raise ValueError(f"adq: the estimator {estimator!r} needs loss_fn, a function of outputs and targets")
    kept = list(batches)
    fixed = {name for name, (_, quantizer) in layers.items() if quantizer.pinned} if pinned is None else set(pinned)
    if fixed - set(layers):
        raise ValueError(f"adq: no quantized layer {sorted(fixed - set(layers))[0]!r} to pin")
    free = {name: layers[name] for name in layers if name not in fixed}
    trained = is_trained(model)
    if trained and estimator == "hessian" and activation_quantizers(model):
        raise ValueError(
            "adq: the estimator 'hessian' takes second derivatives, which learned thresholds do not have; score a "
            "trained model by 'fisher', 'kl' or 'loss'"
        )
    with float_network(model, activations=trained):
        macs = pool(lambda: [_macs(model, batch) for batch in kept[:1]])
        if not macs:
            raise ValueError("adq: no batches to score with")
        scores = _scores(estimator, lambda: _ESTIMATORS[estimator](model, kept, loss_fn, widths, free), widths, free)
    in_float = float_tensors(model)
    costs = tuple(
        LayerCost(
            name,
            layer.weight.numel(),
            macs[0][name],
            getattr(getattr(layer.input_quantizer, "config", None), "bits", 32),
            scores.get(name, {quantizer.bits: 0.0}),
            pinned=name in fixed,
            in_float=layer.weight.data_ptr() in in_float,
        )
        for name, (layer, quantizer) in layers.items()
    )
    unreached = [cost.name for cost in costs if not (cost.pinned or cost.macs or any(cost.scores.values()))]
    if unreached:
        warnings.warn(
            f"adq: scored 0, never reached by the batches: {', '.join(unreached)}; {ways_out(unreached)}", stacklevel=2
        )
    return SensitivityTable(estimator, costs, float_parameters(model))


def reordered(table: SensitivityTable, order: Order, seed: int = 0) -> SensitivityTable:
    """A control for ablations: the free layers' scores per weight, dealt to those layers anew.

    ``"random"``: by a permutation drawn from the seed. ``"reversed"``: of n layers in order of their score per weight
    at the lowest width, the i-th gets the scores of the (n-1-i)-th. Each layer's scores are those it gets times its
    own number of weights; pinned layers and the names stay.

    Args:
        table: from :func:`sensitivity`.
        order: see above.
        seed: of the permutation.

    Returns:
        A table of the same estimator; the same one for the same arguments.

    Raises:
        ValueError: unknown order.
    """
    if order not in ("random", "reversed"):
        raise ValueError(f"adq: order must be random or reversed, got {order!r}")
    free = [layer for layer in table.layers if not layer.pinned]
    if order == "reversed":
        ranked = sorted(free, key=lambda layer: layer.scores[min(layer.scores)] / layer.weights)
        givers = {layer.name: other for layer, other in zip(ranked, reversed(ranked), strict=True)}
    else:
        permutation = np.random.default_rng(seed).permutation(len(free))
        givers = {layer.name: free[i] for layer, i in zip(free, permutation, strict=True)}
    layers = tuple(layer if layer.pinned else _dealt(layer, givers[layer.name]) for layer in table.layers)
    return replace(table, layers=layers)


def _dealt(layer: LayerCost, giver: LayerCost) -> LayerCost:
    """A layer with another one's scores per weight."""
    return replace(layer, scores={b: score / giver.weights * layer.weights for b, score in giver.scores.items()})


def float_parameters(model: nn.Module) -> int:
    """Parameters of the network proper that files hold in float: biases, norms, unquantized layers."""
    model, in_float = unwrapped(model), float_tensors(model)
    weights = [layer.weight for layer, _ in weight_quantizers(model).values()]
    quantized = {id(weight) for weight in weights if weight.data_ptr() not in in_float}
    own = quantizer_prefixes(quantized_layers(model, every_name=True))
    return sum(p.numel() for name, p in model.named_parameters() if id(p) not in quantized and not name.startswith(own))


@torch.no_grad()
def _macs(model: nn.Module, batch: Any) -> dict[str, int]:
    """Multiply-accumulates for one sample by layer with a quantized weight, from the shapes of one forward pass.

    Layers that share a weight, and so a quantizer, are counted together, and so are repeated calls of a layer.
    """
    counts: dict[int, int] = {}
    samples = max(1, batch_size(batch))

    def count(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        assert isinstance(layer, QuantizedLayer)
        macs = layer.macs(output, *args, **kwargs) // samples
        counts[id(layer.weight_quantizer)] = counts.get(id(layer.weight_quantizer), 0) + macs

    handles = [layer.register_forward_hook(count, with_kwargs=True) for layer in quantized_layers(model).values()]
    try:
        forward_batch(model, to_device(batch, model_device(model)))
    finally:
        for handle in handles:
            handle.remove()
    return {name: counts.get(id(quantizer), 0) for name, (_, quantizer) in weight_quantizers(model).items()}


def _loss(model: nn.Module, batch: Any, loss_fn: LossFn) -> Tensor:
    batch = to_device(batch, model_device(model))
    outputs, targets = forward_batch(model, batch), _target(batch)
    try:
        loss = loss_fn(outputs, targets)
    except (AttributeError, KeyError, TypeError) as error:
        if isinstance(outputs, Tensor):
            raise
        raise TypeError(
            f"adq: loss_fn does not take what the model returns in evaluation mode, a {type(outputs).__name__} (some, "
            f"as torchvision's detectors, return losses in training alone): {error}"
        ) from error
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"a tensor {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"adq: loss_fn must return one number, the mean over the batch, as a tensor; got {found}")
    if not bool(loss.isfinite()):
        raise ValueError(f"adq: the loss is {loss.item()} on a calibration batch")
    return loss


def _target(batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return batch
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        raise ValueError(
            f"adq: to score with a loss takes batches (inputs, targets), or mappings, which loss_fn gets whole; got "
            f"{type(batch).__name__}{f' of {len(batch)}' if isinstance(batch, (tuple, list)) else ''}"
        )
    return batch[1]


def _probe(layer: QuantizedLayer, quantizer: WeightQuantizer, bits: int) -> WeightQuantizer:
    """A freshly fitted codebook of ``bits`` bits."""
    config = replace(quantizer.config, bits=bits)
    return WeightQuantizer(layer.weight.detach(), config, quantizer.axis, quantizer.name)


@torch.no_grad()
def _change(layer: QuantizedLayer, quantizer: WeightQuantizer, bits: int) -> Tensor:
    """dw of a layer under a freshly fitted codebook of ``bits`` bits."""
    return _probe(layer, quantizer, bits)(layer.weight) - layer.weight


Layers = dict[str, tuple[QuantizedLayer, WeightQuantizer]]
Scores = dict[str, dict[int, float]]
Found = list[tuple[int, Tensor]]
"""Of each batch its samples, and the scores of it times their number, float64 ``[layers, widths]`` on the CPU."""


def _scores(estimator: str, find: Callable[[], Found], widths: list[int], layers: Layers) -> Scores:
    """Mean over the samples of all processes, added up in the order of their batches."""
    if not layers:
        return {}
    found = pool(find)
    mean = sum(values for _, values in found) / sum(weight for weight, _ in found)
    assert isinstance(mean, Tensor)
    if estimator == "hessian":  # a negative trace says that there is no curvature to speak of
        mean = mean.clamp_min(0.0)
    return {name: dict(zip(widths, row, strict=True)) for name, row in zip(layers, mean.tolist(), strict=True)}


def _each_change(model: nn.Module, layers: Layers, widths: list[int], measure: Callable[[], list[float]]) -> Tensor:
    """``measure()``, a number a batch, with each layer alone quantized to each width: ``[batches, layers, widths]``.

    Layers that share a quantizer are quantized together; a layer in float that shares the weight stays in float.
    """
    measured = []
    for layer, quantizer in layers.values():
        sharing = [other for other in quantized_layers(model).values() if other.weight_quantizer is quantizer]
        for bits in widths:
            probe = _probe(layer, quantizer, bits)
            try:
                for other in sharing:
                    other.weight_quantizer = probe
                measured.append(measure())
            finally:
                for other in sharing:
                    other.weight_quantizer = quantizer
    columns = torch.tensor(measured, dtype=torch.float64)
    return columns.T.reshape(-1, len(layers), len(widths))


@torch.no_grad()
def _loss_scores(model: nn.Module, batches: list[Any], loss_fn: LossFn, widths: list[int], layers: Layers) -> Found:
    def losses() -> list[float]:
        return [float(_loss(model, batch, loss_fn)) for batch in batches]

    base = torch.tensor(losses(), dtype=torch.float64)
    rises = _each_change(model, layers, widths, losses) - base[:, None, None]
    return [(size, size * rise) for size, rise in zip(map(batch_size, batches), rises, strict=True)]


@torch.no_grad()
def _kl_scores(model: nn.Module, batches: list[Any], loss_fn: LossFn, widths: list[int], layers: Layers) -> Found:
    def log_probabilities(batch: Any) -> Tensor:
        return _log_softmax(forward_batch(model, to_device(batch, model_device(model))), KL_TEMPERATURE)

    expected = [log_probabilities(batch) for batch in batches]

    def divergences() -> list[float]:
        return [
            float(F.kl_div(log_probabilities(batch), p, reduction="sum", log_target=True))
            for batch, p in zip(batches, expected, strict=True)
        ]

    sums = KL_TEMPERATURE**2 * _each_change(model, layers, widths, divergences)
    return [(len(p), values.clone()) for p, values in zip(expected, sums, strict=True)]  # not with those of all


def _log_softmax(outputs: Any, temperature: float = 1.0) -> Tensor:
    """Log-probabilities float32 [N, C] of a classifier's logits, divided by a temperature.

    Logits are the outputs themselves, or their item or attribute ``logits``.
    """
    if isinstance(outputs, Mapping):
        outputs = outputs.get("logits", outputs)
    outputs = getattr(outputs, "logits", outputs)
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point() or outputs.dim() != 2:
        found = f"{outputs.dtype} {list(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(
            f"adq: the estimators 'kl' and 'true_fisher' need logits, a float tensor [N, C], as output; got {found}"
        )
    if not bool(outputs.isfinite().all()):
        raise ValueError("adq: the logits are not finite on a calibration batch")
    return (outputs.float() / temperature).log_softmax(1)


def _gradients(
    model: nn.Module, batch: Any, loss_fn: LossFn, layers: Layers, create_graph: bool = False
) -> tuple[Tensor, ...]:
    weights = [layer.weight for layer, _ in layers.values()]
    with _requiring_grad(weights):
        return torch.autograd.grad(
            _loss(model, batch, loss_fn), weights, create_graph=create_graph, allow_unused=True, materialize_grads=True
        )


class _requiring_grad:
    """Frozen weights need gradients too while they are scored."""

    def __init__(self, weights: list[Tensor]) -> None:
        self.frozen = [weight for weight in weights if not weight.requires_grad]

    def __enter__(self) -> None:
        for weight in self.frozen:
            weight.requires_grad_(True)

    def __exit__(self, *exc: object) -> None:
        for weight in self.frozen:
            weight.requires_grad_(False)


def _half_squares(layers: Layers, widths: list[int]) -> list[list[Tensor]]:
    """``0.5 dw^2`` by layer and width."""
    return [
        [0.5 * _change(layer, quantizer, b).float().square() for b in widths] for layer, quantizer in layers.values()
    ]


@torch.enable_grad()
def _fisher_scores(model: nn.Module, batches: list[Any], loss_fn: LossFn, widths: list[int], layers: Layers) -> Found:
    changes, found = _half_squares(layers, widths), []
    for batch in batches:
        squares = [gradient.detach().float().square() for gradient in _gradients(model, batch, loss_fn, layers)]
        sums = [(g * change).sum() for g, row in zip(squares, changes, strict=True) for change in row]
        scores = torch.stack(sums).double().cpu().reshape(len(layers), len(widths))
        size = batch_size(batch)
        # the gradient of a mean over B samples has B times less variance than that of one sample
        found.append((size, size * size * scores))
    return found


def _true_fisher_scores(
    model: nn.Module, batches: list[Any], loss_fn: LossFn, widths: list[int], layers: Layers
) -> Found:
    # gradients under labels of the network's own distribution have mean zero, sample by sample: so B times the
    # squared gradient of a mean over B samples is unbiased here; targets that a network has learnt give nearly none
    numbers = count(*world())

    def own_loss(outputs: Any, _: Any) -> Tensor:
        log_p, generator = _log_softmax(outputs), torch.Generator().manual_seed(next(numbers))
        labels = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator)[:, 0]
        return F.nll_loss(log_p, labels.to(log_p.device))

    def paired(batch: Any) -> Any:  # targets that there are tell how many samples a batch has
        if isinstance(batch, Mapping) or (isinstance(batch, (tuple, list)) and len(batch) > 1):
            return batch
        return batch[0] if isinstance(batch, (tuple, list)) else batch, None

    return _fisher_scores(model, [paired(batch) for batch in batches], own_loss, widths, layers)


@torch.enable_grad()
def _hessian_scores(model: nn.Module, batches: list[Any], loss_fn: LossFn, widths: list[int], layers: Layers) -> Found:
    weights = [layer.weight for layer, _ in layers.values()]
    changes = [[float(change.sum()) / change.numel() for change in row] for row in _half_squares(layers, widths)]
    per_trace = torch.tensor(changes, dtype=torch.float64)
    found = []
    with _requiring_grad(weights), sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        for batch, number in zip(batches, count(*world()), strict=False):
            gradients = _gradients(model, batch, loss_fn, layers, create_graph=True)
            traces = _traces(gradients, weights, torch.Generator().manual_seed(number))
            size = batch_size(batch)
            found.append((size, size * traces[:, None] * per_trace))
    return found


def _traces(gradients: Sequence[Tensor], weights: list[Tensor], generator: torch.Generator) -> Tensor:
    """Hutchinson's estimate of the Hessian's trace by weight, float64."""
    traces = [0.0] * len(weights)
    curved = [i for i, gradient in enumerate(gradients) if gradient.requires_grad]  # others: constant slope
    for _ in range(HUTCHINSON_PROBES if curved else 0):
        signs = [(torch.randint(0, 2, w.shape, generator=generator) * 2 - 1).to(w.device, w.dtype) for w in weights]
        product = torch.autograd.grad(
            [gradients[i] for i in curved],
            weights,
            [signs[i] for i in curved],
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        for i, (v, hv) in enumerate(zip(signs, product, strict=True)):
            traces[i] += float((v.float() * hv.float()).sum()) / HUTCHINSON_PROBES
    return torch.tensor(traces, dtype=torch.float64)


_ESTIMATORS: dict[str, Callable[..., Found]] = {
    "loss": _loss_scores,
    "fisher": _fisher_scores,
    "hessian": _hessian_scores,
    "true_fisher": _true_fisher_scores,
    "kl": _kl_scores,
}
