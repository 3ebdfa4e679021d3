"""Learning rate schedules, llm.c's schedulers.h in its float32 arithmetic."""

import math

import numpy as np

SCHEDULES = ("cosine", "linear", "constant", "wsd")


def learning_rate(schedule: str, step: int, *, lr: float, warmup: int, steps: int, final_frac: float) -> float:
    """The learning rate of the 0-based `step` of a run of `steps`; it ends at lr * final_frac.

        warmup, step < W   lr * (step+1) / W                       (not in constant)
        cosine             min + (1 + cos(pi r))/2 * (lr - min)    r = (step-W) / (steps-W), min = lr * final_frac
        linear             lr - r * (lr - min)
        wsd                lr until step p = 0.8 steps, then min + (1 - sqrt(r)) * (lr - min), r = (step-p) / (steps-p)

    Past the end r stays 1. Raises ValueError for a name that is not in SCHEDULES.
    """
    f32 = np.float32
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule {schedule!r}, expected one of {', '.join(SCHEDULES)}")
    lr, one = f32(lr), f32(1)
    lowest = lr * f32(final_frac)
    if schedule == "constant":
        rate = lr
    elif step < warmup:
        rate = lr * f32(step + 1) / f32(warmup)
    elif schedule == "cosine":
        angle = f32(math.pi * float(_progress(step, warmup, steps)))
        rate = lowest + f32(0.5) * (one + np.cos(angle)) * (lr - lowest)
    elif schedule == "linear":
        rate = lr - _progress(step, warmup, steps) * (lr - lowest)
    else:
        decay_start = int(f32(0.8) * f32(steps))
        rate = lr
        if step >= decay_start:
            rate = lowest + (one - np.sqrt(_progress(step, decay_start, steps))) * (lr - lowest)
    return float(rate)


def _progress(step: int, start: int, end: int) -> np.float32:
    """How far `step` is from start (0) to end (1); 1 past the end, also where the two coincide."""
    return np.float32(step - start) / np.float32(end - start) if step < end else np.float32(1)
