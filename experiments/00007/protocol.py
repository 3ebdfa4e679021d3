"""Experiment 00007: a band of 256 on FC1 against dense. README.md has its questions; this file is what was run."""

import numpy as np

from data.create_model import VOCABULARIES
from experiments.report import claims, delta, figure, line, losses, pick, shown, table, values, verdict
from experiments.stats import mean_interval
from experiments.sweep import Run, slug
from kernels.cpu.band.band_mask import band_count

BYTES = "data/shakespeare.py --tokenizer byte"
SIZES = dict(C=128, L=4, w=256)  # as published
PRESETS = {
    "smoke": dict(seeds=(1, 2), jobs=2, vocab="byte", text=BYTES, C=32, L=2, w=64, n=10, b=4, t=32, v=5, m=4),
    "cpu": dict(seeds=(1, 2, 3, 4, 5, 6), jobs=2, vocab="byte", text=BYTES, n=600, b=16, t=128, v=60, m=32, **SIZES),
    "gpu": dict(
        **dict(seeds=(1, 2, 3, 4), jobs=4, device="cuda", vocab="gpt2", text="data/shakespeare.py"),
        **dict(n=500, b=16, t=256, v=50, m=20, **SIZES),
    ),
    "paper": dict(
        **dict(seeds=(1, 2, 3, 4), jobs=1, device="cuda", vocab="gpt2", text="data/tinystories.py"),
        **dict(n=2000, b=16, t=256, v=200, m=20, **SIZES),
    ),
}
RANDOM_TOKENS = 256  # another vocabulary than these tells nothing more
PUBLISHED = {  # bandwidth at C = 128: (density, connections per layer) of upstream's table
    1024: ("", ""),
    512: ("100 %", "65,536"),
    256: ("~44 %", "28,768"),
    128: ("~22 %", "14,336"),
    64: ("~11 %", "7,168"),
}


def runs(seed: int, p) -> list[Run]:
    """Dense and banded, on text and on random tokens, on which both can learn no more than which ids there are."""
    every = f"-b {p.b} -t {p.t} -v {p.v} -m {p.m} -l 3e-4"
    found = []
    for data, vocab, steps in ((p.text, p.vocab, p.n), ("data/random_tokens.py --vocab 256", RANDOM_TOKENS, p.n // 4)):
        kind = "text" if data == p.text else "random tokens"
        for arm, flags in (("dense", "-d 1"), ("banded", f"-w {p.w}")):
            found.append(
                Run(
                    name=slug(f"{arm} {kind}"),
                    seed=seed,
                    trainer="train_banded.py",
                    flags=f"{flags} -n {steps} {every}",
                    data=data,
                    model=f"--vocab {vocab} -C {p.C} -L {p.L} -H 4 -T {p.t}",
                    change="--residual unscaled --biases uniform",
                    settings=dict(arm=arm, data=kind, V=VOCABULARIES.get(vocab, vocab), C=p.C, L=p.L, T=p.t, w=p.w),
                )
            )
    return found


# ----------------------------------------------------------------------------------------------------------------------
# tables and figures


def densities() -> str:
    """The published table, counted: C = 128."""
    full = 4 * 128 * 128
    rows = []
    for width, (density, connections) in PUBLISHED.items():
        kept = band_count(512, 128, width)
        rows.append(
            [width, f"{kept:,} of {full:,}", f"{100 * kept / full:.1f} %", connections or "none", density or "none"]
        )
    return table(
        ("bandwidth at C = 128", "weights kept a layer", "density", "published weights", "published density"), rows
    )


def multiplications(C: int, L: int, T: int, V: int, kept: int) -> float:
    """A token's multiply-adds of one forward pass; attention over T / 2 keys in the mean."""
    return L * (8 * C * C + kept + C * T) + V * C  # qkv, attproj and FC2 are 3, 1 and 4 C^2


def report(found: list[dict]) -> str:
    banded = pick(found, arm="banded", data="text")[0]
    C, L, T, V, w = (banded["settings"][name] for name in "CLTVw")
    kept, full = banded["found"]["fc1_kept"] // L, 4 * C * C
    before, after = (multiplications(C, L, T, V, each) for each in (full, kept))

    def of(arm, data="text"):
        return losses(found, arm=arm, data=data)

    def milliseconds(arm):
        return losses(found, lambda run: run["measured"]["ms_per_step"], arm=arm, data="text")

    over_steps = []
    for arm in ("dense", "banded"):
        points = [[loss for _, loss in each["val_loss"]] for each in pick(found, arm=arm, data="text")]
        over_steps.append([arm, *(f"{mean:.4f}" for mean in np.mean(points, axis=0))])
    time = shown(mean_interval(100 * (1 - milliseconds("banded") / milliseconds("dense"))), 1, " %", "+")
    of_fc1, of_all = (f"{100 * share:.1f} %" for share in (1 - kept / full, 1 - after / before))
    rows = [
        ["validation loss against dense, text", delta(of("banded"), of("dense"))],
        ["the same, random tokens", delta(of("banded", "random tokens"), of("dense", "random tokens"))],
        ["weights kept of FC1", f"{100 * kept / full:.1f} %"],
        ["multiplications of FC1 saved", of_fc1],
        ["multiplications of a forward pass saved", of_all],
        ["time of a step saved, two runs at a time", time],
    ]
    cost = 100 * (of("banded") / of("dense") - 1)
    noise = 100 * (of("banded", "random tokens") / of("dense", "random tokens") - 1)
    judged = [
        (
            "5 to 10 % more loss on text",
            verdict(cost, "the band costs", "the band helps", " %"),
            "an expectation: no run of it was published",
        ),
        (
            "about 50 % less compute",
            f"{of_fc1} of FC1's, {of_all} of a forward pass's; {time} of the time",
            "FC1 is one of a layer's four products, and the logits' product stays",
        ),
        (
            "random tokens: the same loss",
            verdict(noise, "the band costs", "the band helps", " %", 3),
            "nothing can be learnt there but which ids there are",
        ),
        ("512 keeps 100 % at C = 128", "75.1 %", "counted from the mask, which the edges cut off"),
    ]
    return f"""Validation loss over steps on text, mean of the seeds (bandwidth {w} at C = {C}):

{table(("arm", *(step for step, _ in banded["val_loss"])), over_steps)}
{table(("banded against dense, 95 % intervals over seeds", ""), rows)}
{densities()}
{claims(judged)}"""


def draw(found: list[dict], folder) -> None:
    with figure(folder / f"{found[0]['preset']}.png", 1, 2) as axes:
        for axis, data in zip(axes[0], values(found, "data")):
            for number, arm in enumerate(("dense", "banded")):
                group = pick(found, arm=arm, data=data)
                points = [[loss for _, loss in each["val_loss"][1:]] for each in group]
                line(axis, [step for step, _ in group[0]["val_loss"][1:]], np.array(points), number, arm)
            axis.set(title=data, xlabel="step", ylabel="validation loss, nats")
