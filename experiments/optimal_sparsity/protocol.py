"""Experiment 5: is there a best share of keys to keep, and does it hang on the length? README.md has its questions."""

import numpy as np

from experiments.report import cell, claims, delta, figure, line, losses, percent, pick, shown, table, values
from experiments.stats import (
    anova_power,
    blocked,
    cohens_d,
    hedges_g,
    mean_interval,
    one_way,
    paired_tests,
    seeds_needed,
    tukey,
)
from experiments.sweep import Run

BYTES = "data/shakespeare.py --tokenizer byte"
KEEPS = (0.1, 0.25, 0.33, 0.5, 0.67, 0.75, 1.0)  # published: all but 1, as drop ratios 0.9 to 0.25
PRESETS = {
    "smoke": dict(
        **dict(seeds=(1, 2, 3), jobs=2, vocab="byte", data=BYTES, C=32, L=2, batch=128, n=6, m=2, lr=3e-3),
        **dict(lengths=(16, 32), leaking=(16,), keeps=(0.25, 0.5, 1.0)),
    ),
    "cpu": dict(
        **dict(seeds=(1, 2, 3), jobs=2, vocab="byte", data=BYTES, C=64, L=4, batch=2048, n=200, m=16, lr=3e-3),
        **dict(lengths=(64, 128, 256, 512, 1024), leaking=(64, 128, 256), keeps=KEEPS),
    ),
    "gpu": dict(
        **dict(seeds=(1, 2, 3), jobs=6, device="cuda", vocab="byte", data=BYTES),
        **dict(C=256, L=4, batch=4096, n=100, m=16, lr=1e-3),
        **dict(lengths=(64, 128, 256, 512, 1024), leaking=(64, 128, 256), keeps=KEEPS),
    ),
    "paper": dict(
        **dict(seeds=(1, 2, 3), jobs=1, device="cuda", vocab="gpt2", data="data/tinystories.py"),
        **dict(C=256, L=4, batch=16 * 1024, n=500, m=16, lr=1e-3),
        **dict(lengths=(64, 128, 256, 512, 1024), leaking=(64, 128, 256, 512), keeps=KEEPS),
    ),
}


def runs(seed: int, p) -> list[Run]:
    """Each length and share from the same weights, as many tokens a step; those with the published leak, too."""
    found = []
    for leak, lengths in ((0, p.lengths), (1, p.leaking)):
        for T in lengths:
            for keep in p.keeps:
                attention = f"--keep-ratio {keep:g} --indexer-dim 16"
                if keep == 1 and not leak:
                    attention = "--attention dense"
                elif leak:
                    attention += " --legacy-leak 1"
                found.append(
                    Run(
                        name=f"{'leak' if leak else 'causal'}_T{T}_keep{keep:g}",
                        seed=seed,
                        trainer="train_sparse_attn.py",
                        flags=f"{attention} -n {p.n} -b {p.batch // T} -t {T} -v {p.n} -m {p.m} -l {p.lr:g} "
                        "--lr-schedule cosine --final-lr-frac 0.1 --warmup 20 --beta2 0.95 --grad-clip 1",
                        data=p.data,
                        model=f"--vocab {p.vocab} -C {p.C} -L {p.L} -H 4 -T {T}",
                        settings=dict(T=T, keep=keep, leak=leak),
                    )
                )
    return found


# ----------------------------------------------------------------------------------------------------------------------
# tables and figures


def matrix(found: list[dict], T: int, leak: int = 0) -> np.ndarray:
    """(keep ratios, seeds): the last validation losses."""
    return np.array([losses(found, T=T, keep=keep, leak=leak) for keep in values(pick(found, leak=leak), "keep")])


def as_good_as_the_best(table_of_losses: np.ndarray) -> list[int]:
    """The rows that the best row is not shown to beat, by paired t tests with Holm's adjustment; of one seed, all."""
    if table_of_losses.shape[1] < 2:
        return list(range(len(table_of_losses)))
    best = int(table_of_losses.mean(1).argmin())
    p = paired_tests(table_of_losses)
    return [i for i in range(len(table_of_losses)) if i == best or p[min(i, best), max(i, best)] > 0.05]


def statistics(found: list[dict], T: int, leak: int) -> list[str]:
    """A row of the table of tests."""
    x, keeps = matrix(found, T, leak), values(pick(found, leak=leak), "keep")
    best, worst = x[x.mean(1).argmin()], x[x.mean(1).argmax()]
    single, block = one_way(x), blocked(x)
    by_method = [tukey(x), paired_tests(x, "holm"), paired_tests(x, "bonferroni")]
    return [
        f"{T}{', leaking' if leak else ''}",
        f"{keeps[int(x.mean(1).argmin())]:g}",
        ", ".join(f"{keeps[i]:g}" for i in as_good_as_the_best(x)),
        f"{single['F']:.1f} ({single['p']:.1e})",
        f"{block['F']:.1f} ({block['p']:.1e})",
        f"{single['eta2']:.2f}, {single['omega2']:.2f}",
        " / ".join(f"{sum(p < 0.05 for p in each.values())}" for each in by_method) + f" of {len(by_method[0])}",
        f"{cohens_d(worst, best):.2f}, {hedges_g(worst, best):.2f}",
        delta(worst, best),
    ]


def optimum(found: list[dict], T: int, leak: int = 0) -> np.ndarray:
    """(seeds): the keep ratio at which each seed's loss is lowest."""
    return np.array(values(pick(found, leak=leak), "keep"))[matrix(found, T, leak).argmin(0)]


def report(found: list[dict]) -> str:
    honest, leaking = pick(found, leak=0), pick(found, leak=1)
    lengths, keeps, n = values(honest, "T"), values(honest, "keep"), len(optimum(found, values(honest, "T")[0]))
    tables = []
    for leak, group in ((0, honest), (1, leaking)):
        rows = [
            [T, *(cell(losses(found, T=T, keep=keep, leak=leak)) for keep in values(group, "keep"))]
            for T in values(group, "T")
        ]
        tables.append(table(("length", *(f"keep {keep:g}" for keep in values(group, "keep"))), rows))
    header = ("length", "best", "not shown to be worse", "F (p)", "F blocked (p)", "eta², omega²")
    header += ("pairs told apart: Tukey / Holm / Bonferroni", "d, g", "worst against best")
    seeds = f"With {n} seed{'s' * (n > 1)}"
    tests, power = "One seed tests nothing.\n", anova_power(0.25, len(keeps), n) if n > 1 else 0.05
    if n > 1:
        groups = ((0, honest), (1, leaking))
        tests = table(header, [statistics(found, T, leak) for leak, group in groups for T in values(group, "T")])
    kept = [[T, *(effective(found, T, keep) for keep in keeps)] for T in lengths]
    return f"""Last validation loss, mean and half of its 95 % interval over seeds; keep 1 is dense attention:

{tables[0]}
Share of the causal (query, key) pairs that is kept, %:

{table(("length", *(f"keep {keep:g}" for keep in keeps)), kept)}
The same losses with the published leak, where the first k - 1 queries see the future (not language-model losses):

{tables[1]}
Tests over the keep ratios of a length; seeds are blocks:

{tests}
{seeds} a medium effect (f = 0.25) of {len(keeps)} ratios is found with probability {power:.2f} in a one-way
design, {seeds_needed(0.25, len(keeps))} seeds would find it with 0.8; the blocked test takes the seeds' scatter out.

{table(("question", "found"), questions(found, honest, leaking))}
{claims(judged(found, honest, leaking))}"""


def effective(found: list[dict], T: int, keep: float) -> str:
    run = pick(found, T=T, keep=keep, leak=0)[0]["found"]
    return f"{100 * np.mean(run['kept_pairs']) / run['causal_pairs']:.1f}" if "kept_pairs" in run else "100.0"


def questions(found, honest, leaking) -> list[list[str]]:
    lengths, keeps = values(honest, "T"), values(honest, "keep")
    rows = []
    for T in lengths:
        best = min((losses(found, T=T, keep=keep, leak=0) for keep in keeps if keep < 1), key=np.mean)
        rows.append([f"length {T}: best sparse against dense", delta(best, losses(found, T=T, keep=1.0, leak=0))])
    change = mean_interval(optimum(found, lengths[-1]) - optimum(found, lengths[0]))
    rows.append([f"best keep ratio at {lengths[-1]} less that at {lengths[0]}", shown(change, 2, "", "+")])
    each = (f"{T}: {', '.join(f'{keep:g}' for keep in optimum(found, T))}" for T in lengths)
    rows.append(["best keep ratio of each seed", "; ".join(each)])
    for T in values(leaking, "T"):
        share = [(max(1, int(T * keep)) - 1) / T for keep in values(leaking, "keep")]
        r = np.corrcoef(share, matrix(found, T, 1).mean(1))[0, 1]
        rows.append([f"length {T}, leaking: correlation of loss and share of queries that see the future", f"{r:+.3f}"])
    return rows


def milliseconds(run: dict) -> float:
    return run["measured"]["ms_per_step"]


def extremes(grid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(seeds): the losses of the ratios with the highest and the lowest mean."""
    return grid[grid.mean(1).argmax()], grid[grid.mean(1).argmin()]


def judged(found, honest, leaking) -> list[tuple[str, str, str]]:
    lengths, keeps = values(honest, "T"), values(honest, "keep")

    def as_good(T):
        good = ", ".join(f"{keeps[i]:g}" for i in as_good_as_the_best(matrix(found, T)))
        return f"at {T}, not shown to be worse than the best: {good}"

    T = values(leaking, "T")[-1]
    leak = ", ".join(f"{k:g}" for k in optimum(found, T, 1))
    moves = optimum(found, lengths[-1]) - optimum(found, lengths[0])
    moved = f"from {lengths[0]} to {lengths[-1]} the best ratio moves by {shown(mean_interval(moves), 2, '', '+')}"
    worst = "; ".join(f"{T}: {delta(*extremes(matrix(found, T)))}" for T in lengths)
    leaks = (
        "the published runs let the first k - 1 queries see k - 1 or fewer future keys: the more keys, the more of it"
    )
    return [
        (
            "the best share is 0.75, the largest tried, at every length",
            f"with the leak, at {T}, best of each seed: {leak}; without it, {as_good(T)}",
            leaks,
        ),
        ("H1: short sequences want a large share", as_good(lengths[0]), leaks),
        ("H2: middle lengths want a middle share", as_good(lengths[len(lengths) // 2]), leaks),
        ("H3: long sequences want a small share", f"{as_good(lengths[-1])}; {moved}", leaks),
        (
            "the best is 4.6 to 6.8 % better than the worst",
            worst,
            "worst against best says nothing of dense, not run there",
        ),
    ]


def draw(found: list[dict], folder) -> None:
    """Nine panels."""
    honest, leaking = pick(found, leak=0), pick(found, leak=1)
    lengths, keeps = values(honest, "T"), values(honest, "keep")
    places, grids = np.arange(len(lengths)), {T: matrix(found, T) for T in lengths}
    best = np.array([optimum(found, T) for T in lengths])  # (lengths, seeds)
    bars = dict(color="0.75", edgecolor="0")
    with figure(folder / f"{found[0]['preset']}.png", 3, 3, 4.2, 3.1) as axes:
        loss, by_pairs, leak, ratio, k, worst, size, time, heat = axes.flat
        for number, T in enumerate(lengths):
            above = (100 * (grids[T] / grids[T][-1] - 1)).T
            line(loss, keeps, above, number, f"length {T}")
            line(by_pairs, [float(effective(found, T, keep)) for keep in keeps], above, number, f"length {T}")
            steps = [losses(found, milliseconds, T=T, keep=keep, leak=0).min() for keep in keeps]  # other work slows
            line(time, keeps, [steps], number, f"length {T}")
        for number, T in enumerate(values(leaking, "T")):
            grid = matrix(found, T, 1)
            line(leak, values(leaking, "keep"), (100 * (grid / grid[-1] - 1)).T, number, f"length {T}")
        ratio.plot(lengths, best, color="0.6", linewidth=0.6, marker=".", ms=4)
        ratio.plot(lengths, best.mean(1), color="0", marker="o", ms=4, label="mean of the seeds")
        k.plot(lengths, best.mean(1) * lengths, color="0", marker="o", ms=4, label="best k")
        k.plot(lengths, np.array(lengths) / 2, color="0.5", linestyle="--", label="length / 2")
        costs = [percent(*extremes(grids[T])) for T in lengths]
        worst.bar(places, [each.mean for each in costs], yerr=[each.half for each in costs], capsize=3, **bars)
        if best.shape[1] > 1:  # seeds
            size.bar(places, [hedges_g(*extremes(grids[T])) for T in lengths], **bars)
        shades = np.array([100 * (grids[T].mean(1) / grids[T][-1].mean() - 1) for T in lengths])
        heat.imshow(shades, cmap="Greys", aspect="auto")
        for (row, column), value in np.ndenumerate(shades):
            color = "white" if value > (shades.min() + shades.max()) / 2 else "black"
            heat.text(column, row, f"{value:.1f}", ha="center", va="center", color=color, size=8)
        loss.set(title="loss above dense", xlabel="k / length", ylabel="%")
        by_pairs.set(title="the same, by pairs kept", xlabel="causal pairs kept, %", ylabel="%")
        leak.set(title="with the published leak: above keep 1", xlabel="k / length", ylabel="%")
        time.set(title="time of a step", xlabel="k / length", ylabel="ms", yscale="log")
        ratio.set(title="best k / length", xlabel="length", xscale="log", ylim=(0, 1.05))
        k.set(title="best k", xlabel="length", xscale="log", yscale="log")
        worst.set(title="worst share above best, 95 % interval", xlabel="length", ylabel="%")
        size.set(title="Hedges' g, worst against best", xlabel="length")
        heat.set(title="loss above dense, %", xlabel="k / length", ylabel="length")
        heat.set_xticks(range(len(keeps)), [f"{keep:g}" for keep in keeps])
        heat.set_yticks(places, lengths)
        for axis in (worst, size):
            axis.set_xticks(places, lengths)
        for axis in (ratio, k):
            axis.minorticks_off()
            axis.set_xticks(lengths, lengths)
