"""The mean of the weights over the last epochs of a phase, in place of the last weights (SWA, arXiv 1803.05407)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_swa_multi_avg_fn

from adq.convert import weight_quantizers

COUNT = "steps"


class WeightMean:
    """The mean of a model's parameters over the steps at which it was asked to take them in.

    Parameters are weights, biases, norms, activation thresholds and scales, and levels or steps that learn by gradient.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.steps = 0
        self._mean: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self) -> None:
        """Take the present parameters in."""
        present = dict(self.model.named_parameters())
        if not self.steps:
            self._mean = {name: parameter.detach().clone() for name, parameter in present.items()}
        else:
            update = get_swa_multi_avg_fn()
            update(list(self._mean.values()), list(present.values()), self.steps)
        self.steps += 1

    @torch.no_grad()
    def apply_(self) -> None:
        """Give the model the mean, if there is one, and fit codebooks to its weights as at the start.

        Its batch-norm statistics are then those of another network: re-estimate them.
        """
        if not self.steps:
            return
        for name, parameter in self.model.named_parameters():
            parameter.copy_(self._mean[name])
        for layer, quantizer in weight_quantizers(self.model).values():
            quantizer.replace_(*quantizer.fit_bits(quantizer.bits, layer.weight))

    def state(self) -> dict[str, Tensor]:
        """What :meth:`restore` takes, contiguous: safetensors saves no other tensors."""
        mean = {f"mean.{name}": tensor.contiguous() for name, tensor in self._mean.items()}
        return mean | {COUNT: torch.tensor(self.steps)}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state."""
        self.steps = int(state[COUNT])
        present = dict(self.model.named_parameters()) if self.steps else {}
        self._mean = {
            name: torch.empty_like(parameter).copy_(state[f"mean.{name}"]) for name, parameter in present.items()
        }
