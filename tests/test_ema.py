"""One EMA step of a codebook: by hand, for levels without weights, and over any sequence of weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adq.reference import REVIVE_BELOW, ema_update


def table(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def test_one_step_by_hand():
    c, n, m = ema_update(
        table(-1, 0, 2), table(10, 20, 10), table(-10, 0, 20), torch.tensor([20, 10, 10]), table(-30, 1, 25), 0.1
    )
    assert n.tolist() == pytest.approx([11, 19, 10])
    assert m.tolist() == pytest.approx([-12, 0.1, 20.5])
    assert c.tolist() == pytest.approx([-12 / 11, 0.1 / 19, 2.05], rel=2e-5)  # up to the smoothing


def test_smoothing_pulls_towards_the_present_level():
    e = 1e-5 * 40 / 2
    c, _, _ = ema_update(table(5, 10), table(1, 39), table(1, 400), torch.tensor([1, 39]), table(1, 400), 0.5)
    assert c.tolist() == pytest.approx([(1 + 5 * e) / (1 + e), (400 + 10 * e) / (39 + e)], rel=1e-7)


def test_rate_zero_changes_nothing_but_rounding():
    state = table(-1, 0.25, 2), table(10, 20, 10), table(-10, 5, 20)
    for before, after in zip(state, ema_update(*state, torch.tensor([0, 0, 40]), table(0, 0, 99), 0.0), strict=True):
        torch.testing.assert_close(after, before, rtol=1e-6, atol=0)


def test_an_unused_level_stays():
    state = table(-1, 0.3, 2), table(10, 1, 10), table(-10, 0.3, 20)
    for _ in range(200):
        state = ema_update(*state, torch.tensor([10, 0, 10]), table(-12, 0, 18), 0.01)
    assert state[0].tolist() == pytest.approx([-1.2, 0.3, 1.8], abs=0.06)
    assert state[0][1].item() == pytest.approx(0.3, rel=1e-5)
    assert state[1][1].item() == pytest.approx(0.99**200, rel=1e-4)


@pytest.mark.parametrize("dead", [0, 1, 2, 3])
def test_a_dead_level_is_revived_beside_the_most_used(dead):
    c, n = torch.tensor([-1.0, 0.0, 1.0, 4.0]), torch.tensor([20.0, 20.0, 20.0, 20.0])
    donor = 3 if dead != 3 else 2
    n[donor], n[dead] = 60.0, 0.02  # a trace of former use
    after_c, after_n, after_m = ema_update(c, n, n * c, n, n * c, 0.01)
    left = c[donor] - c[donor - 1]
    right = c[donor + 1] - c[donor] if donor < 3 else torch.tensor(0.0)
    newcomer = (c[donor] + 0.25 * right if right >= left else c[donor] - 0.25 * left).item()
    expected = sorted([value for k, value in enumerate(c.tolist()) if k != dead] + [newcomer])
    assert after_c.tolist() == pytest.approx(expected, abs=1e-6)
    assert after_n.sum().item() == pytest.approx(100.02)
    assert after_n[expected.index(newcomer)].item() == pytest.approx(30.01)
    np.testing.assert_allclose(after_m, after_n * after_c, rtol=1e-5, atol=1e-5)


def test_a_rare_level_is_left_alone():
    state = table(-1, 0, 1), table(100, 0.2, 100), table(-100, 0, 100)
    assert REVIVE_BELOW * 200.2 / 3 < 0.2
    c, _, _ = ema_update(*state, torch.tensor([100, 0, 100]), table(-100, 0, 100), 0.01)
    assert c.tolist() == pytest.approx([-1, 0, 1])


def test_a_level_of_a_few_outliers_is_in_use_however_many_weights_the_others_have():
    state = table(-1, 1, 40), table(1e6, 1e6, 3), table(-1e6, 1e6, 120)
    c, n, _ = ema_update(*state, torch.tensor([10**6, 10**6, 3]), table(-1e6, 1e6, 120), 0.01)
    assert c.tolist() == pytest.approx([-1, 1, 40], rel=1e-4)  # but for the smoothing
    assert n.tolist() == pytest.approx([1e6, 1e6, 3])


def test_too_few_weights_revive_nothing():
    state = table(-1, 0, 1), table(1, 0, 1), table(-1, 0, 1)
    c, n, _ = ema_update(*state, torch.tensor([1, 0, 1]), table(-1, 0, 1), 0.1)
    assert c.tolist() == pytest.approx([-1, 0, 1])
    assert n.tolist() == pytest.approx([1, 0, 1])


@given(data=st.data(), levels=st.integers(1, 8), rate=st.sampled_from([1.0, 0.5, 0.01, 0.0]))
@settings(max_examples=80, deadline=None)
def test_order_and_total_are_kept_over_any_weights(data, levels, rate):
    """Weights jump as they like between steps; the codebook stays ascending and finite, N adds up."""
    value = st.floats(-5, 5, width=32)
    codebook = torch.tensor(sorted(data.draw(st.lists(value, min_size=levels, max_size=levels))))
    size = data.draw(st.integers(1, 30))
    count = torch.full((levels,), size / levels)
    state = (codebook, count, count * codebook)
    for _ in range(data.draw(st.integers(1, 8))):
        w = np.array(data.draw(st.lists(value, min_size=size, max_size=size)), np.float32)
        code = (w[:, None] > (0.5 * (state[0][:-1] + state[0][1:])).numpy()).sum(1)
        n = np.bincount(code, minlength=levels)
        s = np.bincount(code, w.astype(np.float64), minlength=levels)
        state = ema_update(*state, torch.from_numpy(n), torch.from_numpy(s).float(), rate)
        assert (state[0].diff() >= 0).all()
        assert state[0].isfinite().all()
        assert state[1].sum().item() == pytest.approx(size, rel=1e-4)
        assert (state[1] >= 0).all()
