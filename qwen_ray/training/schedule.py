"""Learning rate as a pure function of the step, so that resuming needs no scheduler state."""

from __future__ import annotations

import math

from qwen_ray.config import OptimConfig


def learning_rate(step: int, total_steps: int, config: OptimConfig) -> float:
    """Rate of optimizer step ``step`` (from 0): linear warm-up, then cosine, linear or constant.

    Warm-up is cut to half of a short run, so that the peak is always reached.
    """
    warmup = min(config.warmup_steps, total_steps // 2)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, total_steps - warmup)
    floor = config.min_learning_rate_ratio
    match config.schedule:
        case "cosine":
            share = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))
        case "linear":
            share = floor + (1 - floor) * (1 - done)
        case "constant":
            share = 1.0
    return config.learning_rate * share
