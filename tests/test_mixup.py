"""Mixtures of images: their targets, what the teacher is asked, what counts as right."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from torch.nn import functional as F

from adq import DistillationLoss, create_model, reestimate_batch_norm_

pytest.importorskip("accelerate", reason="adq train needs the extra 'train'")
pytest.importorskip("sklearn", reason="the digits need scikit-learn")
pytest.importorskip("torchvision", reason="mixtures are made by torchvision")

from adq.train.config import PhaseConfig, resolve
from adq.train.data import build_data
from adq.train.engine import Totals
from adq.train.run import mixture, reestimate_


@pytest.mark.parametrize("alpha", [0.1, 1.0, 8.0])
def test_images_and_targets_are_mixed_alike(alpha):
    torch.manual_seed(0)
    mix = mixture(PhaseConfig(mixup=alpha), 10)
    target = torch.tensor([3, 0, 9, 5])
    images = F.one_hot(target, 10).float().view(4, 1, 2, 5)  # an image of each class
    shares = []
    for _ in range(400):
        mixed, probabilities = mix(images, target)
        torch.testing.assert_close(mixed.flatten(1), probabilities, rtol=0, atol=1e-6)
        torch.testing.assert_close(probabilities.sum(1), torch.ones(4))
        assert int((probabilities[0] > 0).sum()) <= 2 and probabilities.shape == (4, 10)
        shares.append(float(probabilities[0, 3]))
    deviation = (1 / (4 * (2 * alpha + 1))) ** 0.5  # of Beta(alpha, alpha)
    assert torch.tensor(shares).mean().item() == pytest.approx(0.5, abs=4 * deviation / 20)
    assert torch.tensor(shares).std().item() == pytest.approx(deviation, rel=0.15)
    assert torch.equal(images.flatten(1).argmax(1), target)  # what it is given stays as it is


def test_the_teacher_sees_the_mixture_and_the_task_its_probabilities():
    torch.manual_seed(1)
    mixed, probabilities = mixture(PhaseConfig(mixup=1.0), 5)(torch.randn(6, 1, 2, 2), torch.arange(6) % 5)
    teacher, logits = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 5)), torch.randn(6, 5)
    loss = DistillationLoss(teacher, alpha=0.25)(logits, mixed, probabilities)
    log_student, taught = logits.double().log_softmax(1), teacher(mixed).double().softmax(1)
    task = -(probabilities.double() * log_student).sum(1).mean()
    divergence = (taught * (taught.log() - log_student)).sum(1).mean()
    assert loss.item() == pytest.approx((0.75 * task + 0.25 * divergence).item(), rel=1e-5)


def test_right_is_the_image_with_the_larger_part():
    totals = Totals.zeros(torch.device("cpu"))
    logits = torch.eye(3)
    totals.add(torch.tensor(2.0), logits, torch.tensor([[0.6, 0.4, 0.0], [0.7, 0.3, 0.0], [0.0, 0.1, 0.9]]))
    totals.add(torch.tensor(1.0), logits, torch.tensor([0, 1, 0]))
    assert (totals.loss.item(), int(totals.correct), totals.samples) == (9.0, 4, 6)


def test_batch_norms_are_reestimated_on_mixtures():
    data, mix = build_data(resolve("digits", []).data), mixture(PhaseConfig(mixup=1.0), 10)
    models = [create_model("digits_cnn", 10).train() for _ in range(3)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    torch.manual_seed(2)
    reestimate_(models[0], data, 4, 1, mix)
    reestimate_(models[1], data, 4, 1)
    data.sampler.resume(1, 0)
    torch.manual_seed(2)
    reestimate_batch_norm_(models[2], [mix(*batch)[0] for batch in islice(data.train, 4)])
    mixed, plain, expected = (model.bn1.running_var for model in models)
    assert torch.equal(mixed, expected) and not torch.allclose(mixed, plain, rtol=0.05)


def test_a_negative_parameter_is_refused():
    with pytest.raises(ValueError, match="mixup must not be negative"):
        PhaseConfig(mixup=-0.1)
