"""Damping of weights that change their code back and forth (Nagel et al., arXiv 2203.11086)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adq.convert import weight_quantizers
from adq.sharded import whole


def dampening_loss(model: nn.Module) -> Tensor:
    """``1/2 sum (w - w_q)^2`` over all quantized weights: a pull towards the codeword, as weight decay pulls to zero.

    Its gradient is ``w - w_q`` for the weights, and nothing for codebooks and scales. Added to the loss with a factor
    that grows as the learning rate falls, it keeps weights near the middle between two codewords from changing sides
    at each step, which disturbs batch-norm statistics. Near ``1e-2`` it is felt; 0 leaves it out.

    Args:
        model: from :func:`adq.quantize_`. Under data parallelism the module inside of the wrapper; weights that
            FSDP2 has sharded are gathered, so every process must call it.

    Returns:
        Scalar float32, on the device of the weights.

    Raises:
        ValueError: no weight of the model is quantized.
    """
    layers = weight_quantizers(model)
    if not layers:
        raise ValueError("adq: no weight of the model is quantized; call adq.quantize_(model) first")
    distances = []
    for layer, quantizer in layers.values():
        weight = whole(layer.weight)
        with torch.no_grad():
            nearest = quantizer(weight)
        distances.append((weight - nearest).float().square().sum())
    return 0.5 * torch.stack(distances).sum()
