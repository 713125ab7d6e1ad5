"""Knowledge distillation from the float network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class DistillationLoss(nn.Module):
    """``(1 - a) task(logits, target) + a T^2 KL(teacher || student)``; a = 1, T = 1 is N2UQ's recipe.

    The teacher runs in evaluation mode without gradients, whatever mode this module is put in; it is no
    submodule, so it enters neither the state dict nor an optimizer.

    Args:
        teacher: the float network, or any module with logits ``[B, classes]``.
        alpha: weight a of the distillation term, 0..1.
        temperature: T > 0.
        task: loss of logits and targets; default cross entropy.
    """

    def __init__(
        self,
        teacher: nn.Module,
        alpha: float = 1.0,
        temperature: float = 1.0,
        task: Callable[[Tensor, Any], Tensor] = F.cross_entropy,
    ) -> None:
        super().__init__()
        if not 0.0 <= alpha <= 1.0:
            raise ValueError(f"adq: alpha must be in [0, 1], got {alpha}")
        if not temperature > 0.0:
            raise ValueError(f"adq: temperature must be positive, got {temperature}")
        self._teacher = (teacher,)
        self.alpha = alpha
        self.temperature = temperature
        self.task = task

    def forward(self, logits: Tensor, inputs: Tensor, target: Tensor) -> Tensor:
        """Scalar loss of the student's logits ``[B, classes]`` on inputs ``[B, ...]`` with targets ``[B]``.

        Raises:
            ValueError: student and teacher do not both have logits of one shape ``[B, classes]``.
        """
        loss = logits.new_zeros(()) if self.alpha == 1.0 else (1.0 - self.alpha) * self.task(logits, target)
        if self.alpha == 0.0:
            return loss
        teacher = self._teacher[0].eval()
        with torch.no_grad():
            expected = teacher(inputs)
        _check_logits(logits, expected)
        student = F.log_softmax(logits.float() / self.temperature, dim=1)
        taught = F.log_softmax(expected.float() / self.temperature, dim=1)
        divergence = F.kl_div(student, taught, reduction="batchmean", log_target=True)
        return loss + self.alpha * self.temperature**2 * divergence


def _check_logits(student: Any, teacher: Any) -> None:
    outputs = student, teacher
    if all(isinstance(x, Tensor) and x.dim() == 2 for x in outputs) and student.shape == teacher.shape:
        return
    found = " and ".join(str(list(x.shape)) if isinstance(x, Tensor) else type(x).__name__ for x in outputs)
    raise ValueError(
        f"adq: distillation needs logits [B, classes] of student and teacher, got {found}; let both return logits "
        "alone, with the tokens or pixels that have some of their own counted by the first dimension"
    )
