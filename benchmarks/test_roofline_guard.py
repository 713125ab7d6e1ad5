"""Fails when an operator falls far below the share of the copy's bandwidth that is asked of it."""

import pytest

from adq.bench.case import ADQ

PART = "operators"
FLOOR = 0.75
"""Of the target: what is left is slack for a noisy machine."""


def test_share_of_copy_is_above_the_floor(compete, case, setting):
    (target,) = case.targets
    if target.bound is None:
        pytest.skip("no target on this device")
    if setting.tiny:
        pytest.skip("tiny tensors say nothing about bandwidth")
    share = compete(case, ADQ)
    assert share >= FLOOR * target.bound, f"{share:.3f} of copy, the target is {target.bound}"
