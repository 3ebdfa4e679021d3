"""The statistics of the experiments' tables, by scipy.stats and statsmodels.

All arms of a seed share initial weights and data, so an experiment is a randomised block design: seeds are its blocks,
and arms are compared within a seed.

`losses` is (k,n): k arms, n seeds. Intervals are of 95 %, tests at alpha = 0.05, standard deviations with n - 1.
"""

from dataclasses import dataclass
from itertools import combinations

import numpy as np

ALPHA = 0.05


@dataclass(frozen=True)
class Interval:
    """A mean and the ends of its confidence interval; NaN for ends that one value alone does not give."""

    mean: float
    low: float
    high: float

    @property
    def half(self) -> float:
        return self.high - self.mean

    def excludes(self, value: float = 0.0) -> bool:
        return bool(self.low > value or self.high < value)


def mean_interval(values) -> Interval:
    """mean +- t s / sqrt(n). Of differences between two arms, seed by seed, this is the paired t interval."""
    from scipy.stats import ttest_1samp

    values = np.asarray(values, float)
    if len(values) < 2 or not np.isfinite(values).all():
        return Interval(float(values.mean()), np.nan, np.nan)
    if np.ptp(values) == 0:
        return Interval(float(values[0]), float(values[0]), float(values[0]))
    low, high = ttest_1samp(values, 0).confidence_interval(1 - ALPHA)
    return Interval(float(values.mean()), float(low), float(high))


def detectable(differences, power: float = 0.8) -> float:
    """The mean difference that a paired t test of so many seeds and this scatter finds with probability `power`."""
    from statsmodels.stats.power import TTestPower

    differences = np.asarray(differences, float)
    n, scatter = len(differences), differences.std(ddof=1)
    return float(scatter * TTestPower().solve_power(nobs=n, alpha=ALPHA, power=power))


def one_way(losses) -> dict[str, float]:
    """One-way ANOVA: F = (SSB / (k-1)) / (SSW / (k (n-1))), p, eta^2 = SSB / SST, omega^2."""
    from scipy.stats import f_oneway

    losses = np.asarray(losses, float)
    k, n = losses.shape
    between, within, total = _sums(losses)
    error = within / (k * (n - 1))
    F, p = f_oneway(*losses)
    omega2 = (between - (k - 1) * error) / (total + error)
    return dict(F=float(F), p=float(p), eta2=between / total, omega2=omega2, df=k - 1, df_error=k * (n - 1))


def _sums(losses: np.ndarray) -> tuple[float, float, float]:
    """Sums of squares: between arms, within arms, in all."""
    between = losses.shape[1] * float(((losses.mean(1) - losses.mean()) ** 2).sum())
    total = float(((losses - losses.mean()) ** 2).sum())
    return between, total - between, total


def blocked(losses) -> dict[str, float]:
    """ANOVA with seeds as blocks: F = (SSB / (k-1)) / (SSE / ((k-1) (n-1))), SSE = SST - SSB - SS of the seeds."""
    import pandas
    from statsmodels.formula.api import ols
    from statsmodels.stats.anova import anova_lm

    losses = np.asarray(losses, float)
    k, n = losses.shape
    arm, seed = np.indices((k, n))
    frame = pandas.DataFrame(dict(loss=losses.ravel(), arm=arm.ravel(), seed=seed.ravel()))
    table = anova_lm(ols("loss ~ C(arm) + C(seed)", frame).fit())
    error = table.loc["Residual"]
    return dict(
        F=float(table.loc["C(arm)", "F"]),
        p=float(table.loc["C(arm)", "PR(>F)"]),
        df=k - 1,
        df_error=int(error["df"]),
        mean_square_error=float(error["mean_sq"]),
    )


def tukey(losses) -> dict[tuple[int, int], float]:
    """{(i, j): p} of Tukey's HSD, q = |m_i - m_j| / sqrt(MSE / n), with the blocked design's error."""
    from scipy.stats import studentized_range

    losses = np.asarray(losses, float)
    k, n = losses.shape
    error, means = blocked(losses), losses.mean(1)
    scale = np.sqrt(error["mean_square_error"] / n)
    return {
        (i, j): float(studentized_range.sf(abs(means[i] - means[j]) / scale, k, error["df_error"]))
        for i, j in combinations(range(k), 2)
    }


def paired_tests(losses, method: str = "holm") -> dict[tuple[int, int], float]:
    """{(i, j): adjusted p} of paired t tests between all arms; method: "holm" or "bonferroni"."""
    from scipy.stats import ttest_rel
    from statsmodels.stats.multitest import multipletests

    pairs = list(combinations(range(len(losses)), 2))
    adjusted = multipletests([ttest_rel(losses[i], losses[j]).pvalue for i, j in pairs], ALPHA, method)[1]
    return dict(zip(pairs, map(float, adjusted)))


def cohens_d(a, b, ddof: int = 1) -> float:
    """(mean a - mean b) / sqrt((s_a^2 + s_b^2) / 2). ddof 0 is upstream's, larger by sqrt(n / (n-1))."""
    return float((np.mean(a) - np.mean(b)) / np.sqrt((np.var(a, ddof=ddof) + np.var(b, ddof=ddof)) / 2))


def hedges_g(a, b) -> float:
    """Cohen's d without its bias in small samples: d (1 - 3 / (4 (2n - 2) - 1)), n values each."""
    return cohens_d(a, b) * (1 - 3 / (4 * (len(a) + len(b) - 2) - 1))


def anova_power(f: float, k: int, n: int) -> float:
    """Probability that a one-way ANOVA of k arms and n seeds finds an effect of Cohen's f (0.25: medium)."""
    from statsmodels.stats.power import FTestAnovaPower

    return float(FTestAnovaPower().power(f, k * n, ALPHA, k))


def seeds_needed(f: float, k: int, power: float = 0.8) -> int:
    """The fewest seeds for which anova_power reaches `power`."""
    return next(n for n in range(2, 10_000) if anova_power(f, k, n) >= power)
