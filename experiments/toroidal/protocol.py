"""Toroidal attention in layers of a trained GPT-2: depth, layers, distance, fusion. README.md has its questions."""

import numpy as np

from experiments.report import claims, figure, final, losses, pick, shown, table, values, verdict
from experiments.stats import mean_interval
from experiments.sweep import Run, slug

BYTES = "data/shakespeare.py --tokenizer byte"
TEXT = dict(jobs=6, device="cuda", vocab="gpt2", T=256, b=16, base_lr=6e-4)
PRESETS = {
    "smoke": dict(
        **dict(seeds=(1, 2), jobs=2, vocab="byte", data=BYTES, C=32, L=4, H=1, T=32),
        **dict(b=4, m=2, base=10, n=4, base_lr=3e-3, lr=1e-3),
    ),
    "cpu": dict(
        **dict(seeds=(1, 2, 3, 4), jobs=2, vocab="byte", data=BYTES, C=128, L=8, H=4, T=128),
        **dict(b=8, m=32, base=600, n=150, base_lr=1e-3, lr=3e-4),
    ),
    "gpu": dict(
        **dict(seeds=(1, 2), data="data/shakespeare.py", C=384, L=12, H=6),
        **dict(m=20, base=300, n=60, lr=3e-4),
        **TEXT,
    ),
    "paper": dict(
        **dict(seeds=(1, 2, 3), data="data/tinystories.py", C=768, L=12, H=12),
        **dict(m=50, base=10_000, n=200, lr=1e-4),
        **TEXT,
    ),
}
DEPTHS = (1, 2, 4, 8)
LAMBDAS = ("0", "0.1", "4", "16")  # beside 1
FUSIONS = ("identity", "mean", "attention")  # beside low_rank_residual and low_rank
MORE_LAYERS = ("two", "four", "input", "middle", "output", "both ends")  # beside layer 0
UPSTREAM = "--layers 0 --depth 2 --fusion low_rank --lambda 0.1 --rope orth --init random"


def layer_sets(L: int) -> dict[str, str]:
    """{name: layers}: the published sets of 32 layers, in parts of L."""
    return {
        "one": "0",
        "two": f"0,{L // 2}",
        "four": f"0,{L // 4},{L // 2},{3 * L // 4}",
        "input": "0,1",
        "middle": f"{L // 2 - 1},{L // 2}",
        "output": f"{L - 2},{L - 1}",
        "both ends": f"0,{L - 1}",
    }


def arms(p) -> dict[str, str]:
    """{arm: flags}; toroidal arms have depth 2, --fusion low_rank_residual and --lambda 1 where they say no other."""
    some_steps = "--lr-schedule cosine --grad-clip 1"
    fine_tune = f"-n {p.n} -l {p.lr:g} --warmup {p.n // 10} {some_steps}"
    sets, one = layer_sets(p.L), f"--layers 0 --depth 2 {fine_tune}"
    found = {"baseline": "--layers none -n 0"}
    found |= {f"control, {name}": f"--layers {layers} --control 1 {fine_tune}" for name, layers in sets.items()}
    for D in DEPTHS:
        found[f"depth {D}"] = f"--layers 0 --depth {D} {fine_tune}"
    for D in DEPTHS:
        found[f"depth {D}, low_rank"] = f"--layers 0 --depth {D} --fusion low_rank {fine_tune}"
    for name in MORE_LAYERS:
        found[f"layers {name}"] = f"--layers {sets[name]} --depth 2 {fine_tune}"
    found["layers four, recompute"] = f"{found['layers four']} --recompute 1"
    for lam in LAMBDAS:
        found[f"lambda {lam}"] = f"{one} --lambda {lam}"
    found["lambda learnt"] = f"{one} --learn-lambda 1"
    for fusion in FUSIONS:
        found[f"fusion {fusion}"] = f"{one} --fusion {fusion}"
    found["random init"] = f"{one} --init random"
    found["control, random init"] = f"--layers 0 --init random --control 1 {fine_tune}"
    found["published recipe"] = f"{UPSTREAM} -n 24 -l 1e-5 --warmup 12 --weight-decay 0.01 {some_steps}"
    found["published, trained longer"] = f"{UPSTREAM} {fine_tune}"
    found["published, sees the future"] = f"{UPSTREAM} --mode upstream {fine_tune}"
    return found


def runs(seed: int, p) -> list[Run]:
    """A GPT-2 from random weights, and every arm from its weights, on the same batches."""
    every = f"-b {p.b} -t {p.T} -m {p.m} -v 0"
    common = dict(seed=seed, trainer="train_toroidal.py", data=p.data)
    learn = f"--layers none --train all -n {p.base} -l {p.base_lr:g} --lr-schedule cosine --warmup 20 --grad-clip 1"
    model = f"--vocab {p.vocab} -C {p.C} -L {p.L} -H {p.H} -T {p.T}"
    base = Run(name="base", flags=f"{learn} {every}", model=model, settings=dict(arm="base"), **common)
    return [
        base,
        *(
            Run(name=slug(arm), flags=f"{flags} {every}", after="base", settings=dict(arm=arm), **common)
            for arm, flags in arms(p).items()
        ),
    ]


# ----------------------------------------------------------------------------------------------------------------------
# tables and figures


def control_of(arm: str) -> str:
    """The arm in which the same weights learn, and attention stays GPT-2's."""
    if "init" in arm or arm.startswith("published"):
        return "control, random init"
    layers = arm.removeprefix("layers ").removesuffix(", recompute")
    return f"control, {layers if arm.startswith('layers') else 'one'}"


def perplexity(run: dict) -> float:
    return float(np.exp(final(run)))


def before(run: dict) -> float:
    return run["val_loss"][0][1]


def memory(run: dict) -> float:
    return run["measured"]["memory_MiB"]


def milliseconds(run: dict) -> float:
    return run["measured"].get("ms_per_step", 0.0)


def cost(found: list[dict], arm: str) -> np.ndarray:
    """(seeds): the loss above the arm's control, in per cent."""
    return 100 * (losses(found, arm=arm) / losses(found, arm=control_of(arm)) - 1)


def report(found: list[dict]) -> str:
    rows = []
    for arm in values(found, "arm"):
        group = pick(found, arm=arm)
        toroidal = arm not in ("base", "baseline") and not arm.startswith("control")
        columns = {value: losses(found, value, arm=arm).mean() for value in (before, final, perplexity, memory)}
        step = losses(found, milliseconds, arm=arm).min()  # other work on the machine only slows
        row = [arm, f"{columns[before]:.4f}", f"{columns[final]:.4f}", f"{columns[perplexity]:.3f}"]
        row.append(shown(mean_interval(cost(found, arm)), 2, " %", "+") if toroidal else "")
        row += [f"{group[0]['found']['trained']:,}", group[0]["found"]["activation_MiB"]]
        row += [f"{columns[memory]:.0f}", f"{step:.1f}" if step else ""]
        rows.append(row)
    header = ("arm", "loss before", "loss after", "perplexity", "against its control")
    header += ("trained", "activations, MiB", "memory, MiB", "ms a step")
    return f"""The control of an arm trains the same weights for as many steps, and its attention stays GPT-2's:

{table(header, rows)}
{table(("question", "found"), questions(found))}
{claims(judged(found))}"""


def headline(found: list[dict]) -> str:
    """README's table."""
    names = {"baseline": "GPT-2, as it was", "control, one": "the same steps without a torus"}
    names |= {f"depth {D}": f"layer 0, {D} platter{'s' * (D > 1)}" for D in DEPTHS}
    names |= {"layers four": "four layers, 2 platters", "published recipe": "as published: random weights, 24 steps"}
    rows = []
    for arm, label in names.items():
        against = arm not in ("baseline", "control, one")
        interval = shown(mean_interval(cost(found, arm)), 2, " %", "+") if against else ""
        rows.append([label, f"{losses(found, perplexity, arm=arm).mean():.3f}", interval])
    return table(("", "perplexity", "loss against its control"), rows)


def questions(found: list[dict]) -> list[list[str]]:
    rows = []

    def against_control(arm):
        rows.append([f"{arm} against its control", verdict(cost(found, arm), "costs", "helps", " %", 3)])

    def compare(a, b):
        """Each less its control."""
        answer = verdict(cost(found, a) - cost(found, b), f"{b} is better", f"{a} is better", " %", 3)
        rows.append([f"{a} against {b}", answer])

    for D in DEPTHS:
        against_control(f"depth {D}")
    for D in (1, 4, 8):
        compare(f"depth {D}", "depth 2")
        compare(f"depth {D}, low_rank", "depth 2, low_rank")
    for name in MORE_LAYERS:
        against_control(f"layers {name}")
    for name in ("middle", "output", "both ends"):
        compare(f"layers {name}", "layers input")
    for name in (*(f"lambda {lam}" for lam in LAMBDAS), "lambda learnt", *(f"fusion {each}" for each in FUSIONS)):
        compare(name, "depth 2")
    compare("depth 2, low_rank", "depth 2")
    against_control("random init")
    return rows


def spread(found: list[dict], arms_: list[str]) -> np.ndarray:
    """(seeds): the range of the costs of these arms."""
    return np.ptp([cost(found, arm) for arm in arms_], axis=0)


def judged(found: list[dict]) -> list[tuple[str, str, str]]:
    def perplexities(arm):
        return f"{arm} {losses(found, perplexity, arm=arm).mean():.2f}"

    recipe = ("baseline", "published recipe", "published, trained longer", "control, random init")
    layers = spread(found, [f"layers {name}" for name in ("input", "middle", "output", "both ends")])
    depths = spread(found, [f"depth {D}" for D in DEPTHS])
    others = [
        verdict(cost(found, f"depth {D}") - cost(found, "depth 2"), f"{D} is worse", f"{D} is better", " %", 3)
        for D in DEPTHS
        if D != 2
    ]
    more = verdict(cost(found, "layers four") - cost(found, "depth 2"), "four cost more", "four cost less", " %", 3)
    ranges = verdict(layers - depths, "layers spread more", "depths spread more", " %", 3)
    return [
        (
            "one layer costs 157 % of perplexity: 654.63 to 1685.32",
            "; ".join(perplexities(arm) for arm in recipe),
            "24 steps at 1e-5 leave random weights random, and two evaluators made the two numbers",
        ),
        (
            "depth 2 is optimal",
            "; ".join(others),
            "one run a depth, random weights that hardly learnt; low_rank keeps a quarter of the channels at 4 and 8",
        ),
        ("more layers are worse", more, "one run each, random weights in each layer"),
        (
            "which layer matters more than depth",
            ranges,
            "one run each; here ranges over four layer sets and four depths",
        ),
        (
            "perplexity improves by 7 to 12 %",
            perplexities("published, sees the future"),
            "no run behind it, and without its mask a layer sees what it is to tell: its loss is no language model's",
        ),
    ]


def draw(found: list[dict], folder) -> None:
    lambdas = {"lambda 0": "0", "lambda 0.1": "0.1", "depth 2": "1", "lambda 4": "4", "lambda 16": "16"}
    panels = {
        "depth": {f"depth {D}": D for D in DEPTHS},
        "depth, published fusion": {f"depth {D}, low_rank": D for D in DEPTHS},
        "lambda": lambdas | {"lambda learnt": "learnt"},
        "fusion": {"depth 2": "residual", "depth 2, low_rank": "low rank"}
        | {f"fusion {each}": each for each in FUSIONS},
        "layers": {"depth 2": "one"} | {f"layers {name}": name for name in MORE_LAYERS},
    }
    with figure(folder / f"{found[0]['preset']}.png", 1, len(panels), 3.2, 3.2) as axes:
        for axis, (title, arms_) in zip(axes[0], panels.items()):
            for x, arm in enumerate(arms_):
                by_seed = cost(found, arm)
                interval = mean_interval(by_seed)
                axis.plot(np.full(len(by_seed), x), by_seed, ".", color="0.6", ms=4)
                axis.errorbar(x, interval.mean, yerr=interval.half, fmt="o", color="0", ms=4, capsize=3)
            axis.axhline(0, color="0.7", linewidth=1)
            tilt = dict(rotation=40, ha="right") if len(arms_) > 4 else {}
            axis.set_xticks(range(len(arms_)), arms_.values(), **tilt)
            axis.set(title=title)
        axes[0][0].set(ylabel="loss above the control, %")
