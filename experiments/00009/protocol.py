"""Experiment 00009: a band on FC1, on FC2, on both. README.md has its questions; this file is what was run."""

import numpy as np

from experiments.report import claims, delta, figure, line, losses, percent, pick, table, values, verdict
from experiments.sweep import Run, slug
from kernels.cpu.band.band_mask import band_count

BYTES = "data/shakespeare.py --tokenizer byte"
TEXT = dict(vocab="gpt2", b=16, t=256, m=20, C=128, L=4, device="cuda", rates=(3e-4, 1e-3, 3e-3))
PRESETS = {
    "smoke": dict(seeds=(1, 2), jobs=2, vocab="byte", data=BYTES, C=32, L=2, n=20, b=4, t=32, m=4, rates=(3e-3,)),
    "cpu": dict(
        **dict(seeds=(1, 2, 3, 4), jobs=2, vocab="byte", data=BYTES),
        **dict(C=64, L=4, n=1000, b=16, t=64, m=48, rates=(5e-4, 1.2e-3, 3e-3)),
    ),
    "gpu": dict(seeds=(1, 2), jobs=6, data="data/shakespeare.py", n=250, **TEXT),
    "paper": dict(seeds=(1, 2, 3), jobs=1, data="data/tinystories.py", n=5000, **TEXT),
}
UPSTREAM = "--residual unscaled --biases uniform"  # initial weights as the published runs had them
SCALED = "--biases uniform"  # GPT-2's: projections into the residual stream by 1 / sqrt(2 L)


def bandwidths(C: int) -> tuple[int, int, int]:
    """About 75, 44 and 24 % of the weights: at C = 128 these are 512, 256 and 128. 8C would be all of them."""
    return 4 * C, 2 * C, C


def same_parameters(C: int, bandwidth: int) -> int:
    """The hidden units F of a dense MLP with as many weights as one with both bands: 2 C F + F = 2 kept + 4 C."""
    return round((2 * band_count(4 * C, C, bandwidth) + 4 * C) / (2 * C + 1))


def arms(C: int) -> dict[str, tuple[str, str]]:
    """{arm: (flags of train_banded.py, change of the initial weights)}"""
    widths = _, middle, narrow = bandwidths(C)
    found = {"dense": ("-1 0 -2 0", UPSTREAM)}
    found |= {f"fc1 {w}": (f"-1 {w} -2 0", UPSTREAM) for w in widths}
    found |= {f"fc2 {w}": (f"-1 0 -2 {w}", UPSTREAM) for w in widths}
    found |= {f"both {w}": (f"-1 {w} -2 {w}", UPSTREAM) for w in widths}
    # controls: as many weights in a narrower MLP; as many in another place; other initial scales
    for w in widths:
        found[f"narrower, as both {w}"] = ("-1 0 -2 0", f"{UPSTREAM} --hidden {same_parameters(C, w)}")
    for w in (middle, narrow):
        found[f"fc1 {w}, permuted"] = (f"-1 {w} -2 0 --permute 7", UPSTREAM)
    found["dense, scaled init"] = ("-1 0 -2 0", SCALED)
    found[f"fc2 {middle}, scaled init"] = (f"-1 0 -2 {middle}", SCALED)
    found[f"fc2 {middle}, fan-in init"] = (f"-1 0 -2 {middle} --band-init fan-in", UPSTREAM)
    found[f"both {narrow}, fan-in init"] = (f"-1 {narrow} -2 {narrow} --band-init fan-in", UPSTREAM)
    return found


def runs(seed: int, p) -> list[Run]:
    """Every arm at every learning rate, each constant, as published."""
    every = f"-n {p.n} -b {p.b} -t {p.t} -v {p.n // 10} -m {p.m}"
    return [
        Run(
            name=f"{slug(arm)}_lr{rate:g}",
            seed=seed,
            trainer="train_banded.py",
            flags=f"{flags} {every} -l {rate:g}",
            data=p.data,
            model=f"--vocab {p.vocab} -C {p.C} -L {p.L} -H 4 -T {p.t}",
            change=change,
            settings=dict(arm=arm, lr=rate, C=p.C),
        )
        for rate in p.rates
        for arm, (flags, change) in arms(p.C).items()
    ]


# ----------------------------------------------------------------------------------------------------------------------
# tables and figures


def density(run: dict, layer: str) -> str:
    found = run["found"]
    return f"{100 * found[f'{layer}_kept'] / found['fc_full']:.1f} %" if f"{layer}_kept" in found else "100 %"


def best_rate(found: list[dict], arm: str) -> float:
    """The rate at which the arm's mean loss is lowest."""
    return min(values(found, "lr"), key=lambda rate: losses(found, arm=arm, lr=rate).mean())


def report(found: list[dict]) -> str:
    rates, C = values(found, "lr"), found[0]["settings"]["C"]
    rate = rates[len(rates) // 2]  # one for all
    tried = ", ".join(f"{each:g}" for each in rates)

    def at_one(arm):
        return losses(found, arm=arm, lr=rate)

    def at_best(arm):
        return losses(found, arm=arm, lr=best_rate(found, arm))

    steps = [step for step, _ in pick(found, arm="dense", lr=rate)[0]["val_loss"]]
    over_steps, at_the_end = [], []
    for arm in values(found, "arm"):
        group = pick(found, arm=arm, lr=rate)
        if not any(each["diverged"] for each in group):
            means = np.mean([[loss for _, loss in each["val_loss"]] for each in group], axis=0)
            over_steps.append([arm, *(f"{mean:.4f}" for mean in means)])
        best = best_rate(found, arm)
        row = [arm, density(group[0], "fc1"), density(group[0], "fc2")]
        row += [f"{at_one(arm).mean():.4f}", delta(at_one(arm), at_one("dense"))]
        row += [f"{best:g}", f"{at_best(arm).mean():.4f}", delta(at_best(arm), at_best("dense"))]
        at_the_end.append(row)
    header = ("arm", "FC1 kept", "FC2 kept", "loss", "against dense", "best rate", "loss there", "against dense")
    return f"""Validation loss over steps, one learning rate for all ({rate:g}), mean of the seeds:

{table(("arm", *steps), over_steps)}
At the end, at one rate for all ({rate:g}), and each arm at the best of {tried}; 95 % intervals over seeds:

{table(header, at_the_end)}
The questions:

{table(("question", f"all at {rate:g}", "each at its best rate"), questions(bandwidths(C), at_one, at_best))}
{claims(judged(bandwidths(C), at_one, at_best))}"""


def headline(found: list[dict]) -> str:
    """README's table: one bandwidth, each arm at its best rate."""
    _, w, narrow = bandwidths(found[0]["settings"]["C"])
    names = {"dense": "dense", f"fc1 {w}": f"FC1 band {w}", f"fc2 {w}": f"FC2 band {w}"}
    for width in (w, narrow):
        names |= {
            f"both {width}": f"both {width}",
            f"narrower, as both {width}": f"a narrower MLP, no band, as both {width}",
        }
    rows = []
    for arm, label in names.items():
        at_best, dense = (losses(found, arm=each, lr=best_rate(found, each)) for each in (arm, "dense"))
        run = pick(found, arm=arm)[0]
        kept = "as many" if arm.startswith("narrower") else f"{density(run, 'fc1')}, {density(run, 'fc2')}"
        rows.append([label, kept, f"{at_best.mean():.4f}", delta(at_best, dense) if arm != "dense" else ""])
    header = ("each at its best learning rate", "weights kept of FC1, FC2", "validation loss", "against dense")
    return table(header, rows)


def in_percent(a, b, base):
    """Differences between a and b, seed by seed, in per cent of the base."""
    return 100 * (a - b) / base


def smallest_within(one_percent: float, widths, name: str, at) -> str:
    """The smallest bandwidth at which the whole interval of the cost stays below one_percent."""
    if len(at("dense")) < 2:
        return "one seed shows nothing"
    good = [w for w in widths if percent(at(f"{name} {w}"), at("dense")).high < one_percent]
    return str(min(good)) if good else f"none of {', '.join(map(str, widths))}"


def questions(widths, *at_each) -> list[list[str]]:
    """The rows of the table of questions: README's hypotheses, decided."""
    _, middle, narrow = widths
    rows = []

    def row(question, answer):
        rows.append([question, *(answer(at) for at in at_each)])

    def against(a, b, above, below):
        row(f"{a} against {b}", lambda at: verdict(in_percent(at(a), at(b), at("dense")), above, below, " %"))

    def interaction(w):
        def answer(at):
            together, apart = at(f"both {w}") + at("dense"), at(f"fc1 {w}") + at(f"fc2 {w}")
            return verdict(in_percent(together, apart, at("dense")), "more than the sum", "less than the sum", " %")

        row(f"both {w}: more than fc1 and fc2 add up to?", answer)

    for w in widths:
        against(f"fc1 {w}", f"fc2 {w}", "FC1 costs more", "FC2 costs more")
    for w in widths:
        interaction(w)
    for name in ("fc1", "fc2", "both"):
        row(f"smallest bandwidth of {name} within 1 %", lambda at, name=name: smallest_within(1.0, widths, name, at))
    for w in widths:
        against(f"both {w}", f"narrower, as both {w}", "the band is worse", "the band is better")
    for w in (middle, narrow):
        against(f"fc1 {w}, permuted", f"fc1 {w}", "the diagonal is better", "the diagonal is worse")
    against("dense, scaled init", "dense", "scaling costs", "scaling helps")
    against(f"fc2 {middle}, scaled init", "dense, scaled init", "the band costs", "the band helps")
    against(f"fc2 {middle}, fan-in init", f"fc2 {middle}", "fan-in costs", "fan-in helps")
    against(f"both {narrow}, fan-in init", f"both {narrow}", "fan-in costs", "fan-in helps")
    return rows


def judged(widths, at_one, at_best) -> list[tuple[str, str, str]]:
    _, w, _ = widths

    def found(arm):
        return f"{delta(at_one(arm), at_one('dense'))}; at its best rate {delta(at_best(arm), at_best('dense'))}"

    one_seed = "one seed and one rate were published, without an interval"
    scale = f"{one_seed}, from residual projections without 1 / sqrt(2 L): see the rows on scaled init"
    all_ones = "its mask is all ones: three repeats of the baseline, which differ by up to 0.0025 in loss"
    return [
        ("bandwidth 1024 keeps baseline quality", "100 % of the weights at C = 128", all_ones),
        ("FC2 banded at 43.9 % improves the loss: -2.44 %", found(f"fc2 {w}"), scale),
        ("FC1 banded at 43.9 % costs: +1.07 %", found(f"fc1 {w}"), one_seed),
        ("both at 43.9 %, the effects cancel: +1.28 %", found(f"both {w}"), f"{one_seed}; interaction: above"),
        ("a band regularises", "not shown by these runs", "none, there or here, saw a token twice: nothing to overfit"),
        ("256 removes 75 % of FC2", "56.1 % at C = 128", "counted from the mask"),
    ]


def draw(found: list[dict], folder) -> None:
    preset, C = found[0]["preset"], found[0]["settings"]["C"]
    rates = values(found, "lr")
    rate, widths = rates[len(rates) // 2], bandwidths(C)

    def curve(arm):
        return np.array([[loss for _, loss in each["val_loss"][1:]] for each in pick(found, arm=arm, lr=rate)])

    def cost(arm):
        best, base = (losses(found, arm=each, lr=best_rate(found, each)) for each in (arm, "dense"))
        return in_percent(best, base, base)

    labels = {"fc1": "FC1", "fc2": "FC2", "both": "both", "narrower, as both": "no band, as many weights as both"}
    with figure(folder / f"{preset}.png", 1, 2) as axes:
        left, right = axes[0]
        steps = [step for step, _ in pick(found, arm="dense", lr=rate)[0]["val_loss"][1:]]
        for number, name in enumerate(("fc1", "fc2", "both")):
            if np.isfinite(losses(found, arm=f"{name} {widths[1]}", lr=rate)).all():
                line(left, steps, 100 * (curve(f"{name} {widths[1]}") / curve("dense") - 1), number, labels[name])
        left.axhline(0, color="0.7", linewidth=1)
        left.set(title=f"bandwidth {widths[1]}, rate {rate:g}", xlabel="step", ylabel="loss above dense, %")
        kept = [100 * band_count(4 * C, C, w) / (4 * C * C) for w in widths]
        for number, (name, label) in enumerate(labels.items()):
            line(right, kept, np.transpose([cost(f"{name} {w}") for w in widths]), number, label)
        right.axhline(1, color="0.7", linewidth=1)
        right.set(title="each arm at its best rate", xlabel="weights kept in a banded matrix, %")
