"""The distillation loss in float64 numpy, and what becomes of the teacher."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from adq import DistillationLoss


def teacher() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))


INPUTS = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
LOGITS = 2 * torch.randn(6, 3, generator=torch.Generator().manual_seed(2))
TARGET = torch.tensor([0, 1, 2, 2, 1, 0])


def log_softmax(z: np.ndarray) -> np.ndarray:
    z = z.astype(np.float64)
    return z - np.log(np.exp(z).sum(1, keepdims=True))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_by_the_formula(alpha, temperature):
    net = teacher()
    logits = LOGITS.clone().requires_grad_()
    loss = DistillationLoss(net, alpha, temperature)(logits, INPUTS, TARGET)
    with torch.no_grad():
        expected = log_softmax(net.eval()(INPUTS).numpy() / temperature)
    student, task = log_softmax(LOGITS.numpy() / temperature), -log_softmax(LOGITS.numpy())[range(6), TARGET]
    divergence = (np.exp(expected) * (expected - student)).sum() / 6
    total = (1 - alpha) * task.mean() + alpha * temperature**2 * divergence
    assert loss.item() == pytest.approx(total, rel=1e-5)
    loss.backward()
    pull = alpha * temperature * (np.exp(student) - np.exp(expected)) / 6
    push = (1 - alpha) * (np.exp(log_softmax(LOGITS.numpy())) - np.eye(3)[TARGET]) / 6
    np.testing.assert_allclose(logits.grad, pull + push, atol=1e-6)


def test_another_task_loss():
    loss = DistillationLoss(
        teacher(), 0.0, task=lambda logits, target: F.cross_entropy(logits, target, reduction="sum")
    )
    assert loss(LOGITS, INPUTS, TARGET).item() == pytest.approx(
        -log_softmax(LOGITS.numpy())[range(6), TARGET].sum(), rel=1e-5
    )


def test_the_teacher_only_teaches():
    net = teacher().train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    loss = DistillationLoss(net, 0.5)
    loss.train()
    logits = LOGITS.clone().requires_grad_()
    first, second = loss(logits, INPUTS, TARGET), loss(logits, INPUTS, TARGET)
    first.backward()
    assert first.item() == second.item()  # no dropout
    assert not net.training
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())  # no running statistics
    assert loss.state_dict() == {}
    assert list(loss.parameters()) == list(loss.children()) == []


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_term_of_weight_zero_is_not_computed(alpha):
    def fail(*args):
        raise AssertionError("not needed")

    failing = teacher()
    failing.forward = fail
    arguments = {"alpha": 1.0, "teacher": teacher(), "task": fail} if alpha else {"alpha": 0.0, "teacher": failing}
    assert DistillationLoss(**arguments)(LOGITS, INPUTS, TARGET).isfinite()


def test_half_precision_logits_are_compared_in_float32():
    loss = DistillationLoss(teacher())(LOGITS.bfloat16(), INPUTS, TARGET)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(DistillationLoss(teacher())(LOGITS.bfloat16().float(), INPUTS, TARGET).item())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": -0.1}, r"alpha must be in \[0, 1\], got -0.1"),
        ({"alpha": 1.5}, "alpha must be in"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"temperature": float("nan")}, "temperature must be positive"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        DistillationLoss(teacher(), **arguments)


@pytest.mark.parametrize(
    ("student", "taught", "found"),
    [
        (torch.zeros(2, 7, 3), torch.zeros(2, 7, 3), r"\[2, 7, 3\] and \[2, 7, 3\]"),
        (torch.zeros(2, 3), torch.zeros(2, 4), r"\[2, 3\] and \[2, 4\]"),
        (torch.zeros(2, 3), (torch.zeros(2, 3),), r"\[2, 3\] and tuple"),
    ],
)
def test_what_is_no_logits_is_refused(student, taught, found):
    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> object:
            return taught

    with pytest.raises(ValueError, match=rf"needs logits \[B, classes\] of student and teacher, got {found}"):
        DistillationLoss(Fixed())(student, INPUTS, TARGET)
