"""Progressive quantization: a network begins where another one, of more bits say, has been trained to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from adq.convert import (
    activation_quantizers,
    load_tensors_,
    quantized_layers,
    quantizer_prefixes,
    refuse_packed,
    unwrapped,
    weight_quantizers,
)
from adq.fold import is_folded
from adq.messages import listed
from adq.nn.packed import CODES
from adq.restore import unchanged_on_error
from adq.sharded import refuse_sharded


@torch.no_grad()
def start_from_(model: nn.Module, *starts: nn.Module) -> nn.Module:
    """Give a quantized model the weights and the activation thresholds that another one has learned.

    Codebooks are fitted anew, at the model's own widths. Learned thresholds are part of what a trained network
    computes: without them it is another function. Those of another width follow the same curve
    (:func:`adq.thresholds.resampled`), so nothing is calibrated again. Batch norms are taken over as they are; correct
    them for the new widths by ``correct_batch_norm_(model, batches, reference=start)``, after widths were allocated.

    Of several starts, one network trained on in several ways, the model gets the mean weights and the mean thresholds
    (SQWA, arXiv 2002.00343). Mean batch-norm statistics are those of no network: call
    :func:`adq.reestimate_batch_norm_`.

    Args:
        model: from :func:`adq.quantize_`; of a ``start`` whose inputs are in float it is calibrated afterwards.
        starts: quantized models of the same network, of any widths, as :func:`adq.load` gives them; from a packed one
            come the quantized weights.

    Returns:
        The same model.

    Raises:
        ValueError: a model that is not quantized; a packed or sharded ``model``; a ``start`` of another architecture,
            with folded batch norms, uncalibrated, or which quantizes the inputs of other layers; starts whose levels
            for zero differ. Nothing is changed then.
        TypeError: no start.
    """
    if not starts:
        raise TypeError("adq: start_from_ takes a model and at least one start")
    for network in (model, *starts):
        if not quantized_layers(network):
            raise ValueError("adq: start_from_ takes quantized models; call adq.quantize_(model) first")
        refuse_sharded(network.parameters(), "a start of training")
    refuse_packed(model, "a model to train")
    learn = any(activation_quantizers(start) for start in starts)
    states = [_checked_state(model, start, learn) for start in starts]
    state = {name: _mean([state[name] for state in states]) for name in states[0]}
    learned = [activation_quantizers(start) for start in starts]
    with unchanged_on_error(model):
        load_tensors_(model, state)  # compared already; float weights let layers fit theirs
        for name, quantizer in activation_quantizers(model).items() if learned[0] else ():
            calibrated = [quantizers[name] for quantizers in learned if quantizers[name].is_calibrated]
            if calibrated:  # of layers that are never reached it is not
                quantizer.take_over_(*calibrated)
    if learned[0]:  # in files, too, it is a trained network
        for _, weight_quantizer in weight_quantizers(model).values():
            weight_quantizer.steps.fill_(1)
    return model


def _checked_state(model: nn.Module, start: nn.Module, others_learn: bool) -> dict[str, Tensor]:
    """The float tensors of a start; ValueError if the model cannot begin from it, beside others with learned thresholds
    or without."""
    if is_folded(start):
        raise ValueError("adq: the start has no batch norms any more, they are folded; training needs them")
    state, present = float_state(start), float_state(model)
    problems = [f"{name} is in one of them only" for name in state.keys() ^ present.keys()]
    problems += [
        f"{name} is {tuple(state[name].shape)}, not {tuple(present[name].shape)}"
        for name in state.keys() & present.keys()
        if state[name].shape != present[name].shape
    ]
    if problems:
        raise ValueError(f"adq: the start is of another architecture: {listed(sorted(problems))}")
    quantizers, learned = activation_quantizers(model), activation_quantizers(start)
    if others_learn and (other := sorted(learned.keys() ^ quantizers.keys())):
        raise ValueError(f"adq: of start and model only one quantizes the input of {listed(other)}")
    if learned and not any(quantizer.is_calibrated for quantizer in learned.values()):
        raise ValueError("adq: the start is not calibrated")
    return state


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    """The mean of one tensor in several networks; of counters the first."""
    first = tensors[0]
    if len(tensors) == 1 or not first.is_floating_point():
        return first
    return torch.stack([tensor.to(first.device, torch.float64) for tensor in tensors]).mean(0).to(first.dtype)


def float_state(model: nn.Module) -> dict[str, Tensor]:
    """A quantized model's tensors without those of its quantizers, as a float checkpoint has them.

    Packed weights are decoded. Names are those in the unwrapped model.
    """
    model = unwrapped(model)
    layers = quantized_layers(model, every_name=True)
    prefixes = {name: f"{name}." if name else "" for name in layers}
    own = (*quantizer_prefixes(layers), *(prefix + CODES for prefix in prefixes.values()))
    values = model.state_dict().items()
    state = {key: value for key, value in values if isinstance(value, Tensor) and not key.startswith(own)}
    packed = {name: layer for name, layer in layers.items() if layer.packed}
    return state | {f"{prefixes[name]}{q.weight_name}": q.quantized_weight() for name, q in packed.items()}
