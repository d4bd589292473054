"""How the learning rate and the penalty move."""

from __future__ import annotations

import pytest

from unbraid.training.schedule import ramp, rate


def test_the_learning_rate_rises_stays_and_falls() -> None:
    factors = [rate(step, 100, 0.1, 0.2) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == 1 and factors[80] == 1
    assert factors[99] == pytest.approx(0.05) and max(factors) == 1
    assert factors[:10] == sorted(factors[:10]) and factors[80:] == sorted(factors[80:], reverse=True)
    assert ramp(0, 100, 0.0) == 1 and rate(99, 100, 0.0, 0.0) == 1
