"""How the learning rate and the penalty change over the steps."""

from __future__ import annotations


def ramp(step: int, steps: int, share: float) -> float:
    """Rises in a straight line from near 0 to 1 over the first `share` of `steps`, then stays."""
    length = share * steps
    return min(1.0, (step + 1) / length) if length else 1.0


def rate(step: int, steps: int, warmup_share: float, decay_share: float) -> float:
    """Factor on the learning rate: up in a straight line, level, down in a straight line to near 0."""
    length = decay_share * steps
    down = min(1.0, (steps - step) / length) if length else 1.0
    return min(ramp(step, steps, warmup_share), down)
