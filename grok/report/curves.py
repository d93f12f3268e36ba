"""Curves made fit to be looked at. P points."""

import numpy as np

# A smoothed curve forgets half of a value after this share of its points.
HALF_LIFE = 1 / 60


def smooth(values_P: np.ndarray) -> np.ndarray:
    """Exponential mean of the finite values so far, without the start's bias towards zero."""
    keep = 0.5 ** (1 / max(1.0, HALF_LIFE * len(values_P)))
    total = weight = 0.0
    means = []
    for value in values_P:
        if np.isfinite(value):
            total, weight = keep * total + value, keep * weight + 1
        means.append(total / weight if weight else np.nan)
    return np.array(means)


def thin(x_P: np.ndarray, y_P: np.ndarray, points: int = 500) -> tuple[np.ndarray, np.ndarray]:
    """At most about `points` of the points, among them the lowest and highest of each stretch, so
    that no spike is lost; what is not finite becomes a gap."""
    y_P = np.where(np.isfinite(y_P), y_P, np.nan)
    if len(x_P) <= points:
        return x_P, y_P
    chosen: set[int] = {0, len(x_P) - 1}
    for part in np.array_split(np.arange(len(x_P)), points // 2):
        finite = part[np.isfinite(y_P[part])]
        if len(finite):
            chosen |= {int(finite[y_P[finite].argmin()]), int(finite[y_P[finite].argmax()])}
        if len(finite) < len(part):
            chosen.add(int(part[~np.isfinite(y_P[part])][0]))
    order = sorted(chosen)
    return x_P[order], y_P[order]
