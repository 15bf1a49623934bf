"""Learning-rate schedules as pure functions of the step: no state to save."""

import math
from typing import Literal, get_args

ScheduleName = Literal["constant", "warmup", "cosine", "step", "one-cycle"]
SCHEDULES: tuple[str, ...] = get_args(ScheduleName)


def lr_factor(
    step: int,
    total_steps: int,
    name: ScheduleName,
    *,
    warmup_steps: int = 0,
    decay_steps: int = 0,
    decay_factor: float = 0.1,
    final_factor: float = 0.0,
) -> float:
    """The factor of the recipe's `lr` at optimizer step `step` (counted from 0) of `total_steps`.

    constant: 1. warmup: linear up to 1 over `warmup_steps`, then 1. cosine: warm-up, then half a cosine down to
    `final_factor` at the last step (Loshchilov and Hutter 2017, without restarts). step: warm-up, then times
    `decay_factor` after every `decay_steps`. one-cycle: a cosine up from 1/25 over `warmup_steps` (30 % of all steps if
    that is 0), then a cosine down to 1/250,000 (Smith and Topin 2018, with torch's constants).
    """
    if name == "one-cycle":
        peak = (warmup_steps or round(0.3 * total_steps)) - 1
        last = total_steps - 1
        if step <= peak:
            return _cosine(1 / 25, 1.0, step / peak if peak > 0 else 1.0)
        return _cosine(1.0, 1 / 250_000, (step - peak) / max(1, last - peak))
    if name != "constant" and step < warmup_steps:
        return (step + 1) / warmup_steps
    if name == "cosine":
        return _cosine(1.0, final_factor, (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps))
    if name == "step":
        return decay_factor ** ((step - warmup_steps) // decay_steps)
    return 1.0


def _cosine(start: float, end: float, fraction: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * min(1.0, fraction))) / 2
