"""How far the latest loss or gradient norm lies from those before it, a twin of llm.c's outlier_detector.h."""

import math

WINDOW = 128  # values, OUTLIER_DETECTOR_WINDOW_SIZE


class OutlierDetector:
    """z-scores over the last 128 values.

    z = (x - mean) / std over the window, x included; NaN until 128 values are there; 0 if they are all the same.
    Sums run in float64, as llm.c's, so that the same values give the same z.
    """

    def __init__(self, saved: list | None = None):
        """saved: what `saved` gave. Raises ValueError if it is something else."""
        self.values, self.sum, self.sum_sq = [], 0.0, 0.0
        if saved is None:
            return
        numbers = isinstance(saved, list) and all(type(x) is float and math.isfinite(x) for x in saved)
        if not numbers or not 2 <= len(saved) <= WINDOW + 2:
            raise ValueError(f"{saved!r}, expected two sums and at most {WINDOW} values")
        self.sum, self.sum_sq, *self.values = saved

    def update(self, x: float) -> float:
        """The z-score of x, which joins the window in the place of the oldest value."""
        full = len(self.values) == WINDOW
        if full:
            oldest = self.values.pop(0)
            self.sum -= oldest
            self.sum_sq -= oldest * oldest
        self.values.append(float(x))
        self.sum += x
        self.sum_sq += x * x
        if not full:
            return math.nan
        mean = self.sum / WINDOW
        variance = self.sum_sq / WINDOW - mean * mean
        return (x - mean) / math.sqrt(variance) if variance > 0 else 0.0

    def saved(self) -> list[float]:
        """Its sums and values, as a state file keeps them."""
        return [self.sum, self.sum_sq, *self.values]
