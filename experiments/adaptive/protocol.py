"""Experiment 3: does it pay to let a query choose how many keys it keeps? README.md has its questions."""

import numpy as np

from data.recall import Recall
from experiments.report import cell, claims, delta, figure, losses, pick, table, values, verdict
from experiments.sweep import Run, slug
from systems.selection import kept_pairs

BYTES = "data/shakespeare.py --tokenizer byte"
PRESETS = {
    "smoke": dict(
        **dict(seeds=(1, 2), jobs=2, vocab="byte", data=BYTES, lengths=(32,), C=32, L=2, tokens=128, m=2),
        **dict(dense=8, warmup=4, sparse=6, recall_dense=8, leak=6),
    ),
    "cpu": dict(
        **dict(seeds=(1, 2, 3), jobs=2, vocab="byte", data=BYTES, lengths=(64, 128, 256), C=64, L=4, tokens=2048, m=16),
        **dict(dense=400, warmup=50, sparse=150, recall_dense=600, leak=300),
    ),
    "gpu": dict(
        **dict(seeds=(1, 2, 3), jobs=6, device="cuda", vocab="byte", data=BYTES),
        **dict(lengths=(64, 128, 256), C=256, L=4, tokens=4096, m=16),
        **dict(dense=200, warmup=40, sparse=80, recall_dense=400, leak=150),
    ),
    "paper": dict(
        **dict(seeds=(42, 123, 456), jobs=1, device="cuda", vocab="gpt2", data="data/tinystories.py"),
        **dict(lengths=(64, 128, 256), C=256, L=4, tokens=4096, m=16),
        **dict(dense=2000, warmup=200, sparse=500, recall_dense=600, leak=500),
    ),
}
COVERAGES = (0.6, 0.75, 0.9)  # of top-p: what it keeps is read off between them at the pairs that prefix keeps
INDEXER = "--indexer-dim 16"
GO_ON = "--lr-schedule cosine --final-lr-frac 0.1 --warmup 20 --beta2 0.95 --grad-clip 1 -l 1e-3"
LEARN = "--attention dense --lr-schedule linear --warmup 50 --beta2 0.95 --grad-clip 1 -l 3e-3"
FIXED = ("keep 0.25", "keep 0.5", "keep 0.75")
SHARED = ("share 0.25", "share 0.5")  # one list for T/16 queries; as many pairs as that keep has, to 3 %
MATCHED = ("indexer", "recency", "random", "oracle", "untrained")  # at the k that keeps as many pairs as prefix
IDS = 64  # of the random tokens


def arms(p) -> dict[str, str]:
    """{arm: flags}: all go on from the dense model of their task, length and seed for as many steps."""
    warm = f"{INDEXER} --indexer-warmup {p.warmup} -n {p.warmup + p.sparse}"
    cold = f"-n {p.sparse}"
    return {
        "dense": f"--attention dense {cold}",
        **{arm: f"--keep-ratio {arm.split()[1]} {warm}" for arm in FIXED},
        "prefix": f"--adaptive prefix --coverage 0.9 {warm}",
        **{f"top-p {coverage}": f"--selector top-p --coverage {coverage} {warm}" for coverage in COVERAGES},
        "indexer": f"--top-k {{k}} {warm}",
        "recency": f"--top-k {{k}} --selector recency {cold}",
        "random": f"--top-k {{k}} --selector random {cold}",
        "oracle": f"--top-k {{k}} --selector oracle {cold}",
        "untrained": f"--top-k {{k}} {INDEXER} --train-indexer 0 {cold}",
    }


def shared(arm: str, T: int) -> str:
    """The flags that choose the keys in an arm of SHARED, for sequences of T tokens."""
    pairs, share = kept_pairs(int(float(arm.split()[1]) * T), T), T // 16
    k = min(range(2 * share, T + 1), key=lambda k: abs(kept_pairs(k, T, share) - pairs))
    return f"--share {share} --top-k {k}"


def runs(seed: int, p) -> list[Run]:
    """Text and tagged recall at every length, then random tokens with and without the published leak."""
    found = []
    for T in p.lengths:
        for task in ("text", "recall"):
            found += task_runs(seed, p, task, T)
    for T in p.lengths:
        found += leak_runs(seed, p, T)
    return found


def task_runs(seed: int, p, task: str, T: int) -> list[Run]:
    every = f"-b {p.tokens // T} -t {T} -m {p.m} -v 100"
    data, model, learn = p.data, f"--vocab {p.vocab} -C {p.C} -L {p.L} -H 4 -T {T}", p.dense
    if task == "recall":
        keys = T // 32 * 8
        names = Recall(keys, T)
        every = f"-b {2 * p.tokens // T} -t {T} -m {p.m} -v 100 --weight-decay 0.1 --decay-all 0"
        every += f" --answers-after {names.first_query}:{names.first_filler}"
        data, learn = f"data/recall.py --window {T} --keys {keys}", p.recall_dense * max(1, T // 128)
        model = f"--vocab {names.V} -C {p.C} -L 2 -H 4 -T {T}"

    def one(arm, flags, **more):
        settings = dict(task=task, T=T, arm=arm)
        run = dict(seed=seed, trainer="train_sparse_attn.py", data=data, settings=settings) | more
        return Run(name=slug(f"{task} {T} {arm}"), flags=f"{flags} {every}", **run)

    base = one("before", f"{LEARN} -n {learn}", model=model)
    found = [base]
    for arm, flags in arms(p).items():
        match = slug(f"{task} {T} prefix") if "{k}" in flags else ""
        found.append(one(arm, f"{flags} {GO_ON}", after=base.name, match=match))
    for arm in SHARED:
        warm = f"{INDEXER} --indexer-warmup {p.warmup} -n {p.warmup + p.sparse}"
        found.append(one(arm, f"{shared(arm, T)} {warm} {GO_ON}", after=base.name, later=True))
    if task == "text" and p.vocab == "byte":  # how many keys the trained controller takes on other sequences
        prefix = slug(f"{task} {T} prefix")
        for probe, ids in (("random bytes", 256), ("two ids", 2)):
            random = f"data/random_tokens.py --vocab {ids}"
            found.append(one(f"prefix on {probe}", "-n 0", after=prefix, data=random))
    return found


def leak_runs(seed: int, p, T: int) -> list[Run]:
    """Random tokens from random weights: nothing can be learnt, unless the future is seen."""
    every = f"-b {p.tokens // 2 // T} -t {T} -m {p.m} -n {p.leak} -v {p.leak} {GO_ON}"
    found = []
    for arm in ("causal", "leak 0.25", "leak 0.5", "leak 0.75", "leak 1"):
        leak = f"--legacy-leak 1 --keep-ratio {arm.split()[-1]} {INDEXER}"
        found.append(
            Run(
                name=slug(f"random {T} {arm}"),
                seed=seed,
                trainer="train_sparse_attn.py",
                flags=f"{'--attention dense' if arm == 'causal' else leak} {every.replace('-l 1e-3', '-l 3e-3')}",
                data=f"data/random_tokens.py --vocab {IDS}",
                model=f"--vocab {IDS} -C {p.C} -L 2 -H 4 -T {T}",
                settings=dict(task="random", T=T, arm=arm),
            )
        )
    found.append(
        Run(
            name=slug(f"random {T} upstream controller"),
            seed=seed,
            trainer="train_sparse_attn.py",
            flags=f"--adaptive upstream --indexer upstream -n 0 -b 8 -t {T} -m 2",
            data="data/random_tokens.py --vocab 1000",
            model=f"--preset dsa --vocab 1000 -T {max(T, 64)}",
            settings=dict(task="controller", T=T, arm="upstream"),
        )
    )
    return found


# ----------------------------------------------------------------------------------------------------------------------
# tables and figures


def kept(run: dict) -> float:
    """Pairs that a query-key list keeps of the causal ones, in per cent; 100 for dense attention."""
    found = run["found"]
    return 100 * float(np.mean(found["kept_pairs"])) / found["causal_pairs"] if "kept_pairs" in found else 100.0


def accuracy(run: dict) -> float:
    return run["found"]["answers"][-1][1]


def rate(run: dict) -> float:
    """Tokens a second, in thousands."""
    flags = run["commands"][-1].split()
    tokens = int(flags[flags.index("-b") + 1]) * int(flags[flags.index("-t") + 1])
    return tokens / run["measured"]["ms_per_step"]


def top_p_at(found: list[dict], task: str, T: int) -> np.ndarray:
    """(seeds): top-p's loss at the pairs that prefix keeps, on straight lines between its coverages."""
    curves = [pick(found, task=task, T=T, arm=f"top-p {coverage}") for coverage in COVERAGES]
    prefix = pick(found, task=task, T=T, arm="prefix")
    values_ = []
    for at, points in zip(prefix, zip(*curves)):
        x, y = zip(*sorted((kept(point), losses([point])[0]) for point in points))
        values_.append(np.interp(kept(at), x, y))
    return np.array(values_)


def of(found, task, T, arm, value=None):
    settings = dict(task=task, T=T, arm=arm)
    return losses(found, value, **settings) if value else losses(found, **settings)


def there(found, task, T, arm) -> bool:
    """Whether every seed has the arm: SHARED came when results were on file."""
    return len(of(found, task, T, arm)) == len(of(found, task, T, "dense"))


def report(found: list[dict]) -> str:
    lengths = values(found, "T")
    order = ["before", "dense", *FIXED, *SHARED, "prefix", *(f"top-p {each}" for each in COVERAGES), *MATCHED]
    parts = []
    for task in ("text", "recall"):
        for T in lengths:
            rows = []
            for arm in (arm for arm in order if there(found, task, T, arm)):
                row = [arm, cell(of(found, task, T, arm, kept), 1), cell(of(found, task, T, arm))]
                row.append(delta(of(found, task, T, arm), of(found, task, T, "dense")) if arm != "before" else "")
                if task == "recall":
                    row.append(cell(of(found, task, T, arm, accuracy), 3))
                row.append(f"{of(found, task, T, arm, rate).max():.1f}")  # other work on the machine only slows
                rows.append(row)
            answers = ("answers right",) if task == "recall" else ()
            title = {"text": "Text", "recall": "Tagged recall"}[task]
            parts.append(f"{title}, length {T}:\n")
            parts.append(table(("arm", "pairs kept, %", "loss", "against dense", *answers, "thousand tokens/s"), rows))
    parts += ["The questions, at as many kept pairs as prefix has:\n", table(("question", "found"), questions(found))]
    if rows := sharing(found):
        parts += ["One list for T/16 queries, at as many kept pairs:\n", table(("question", "found"), rows)]
    parts += ["Random tokens, ln 64 = 4.1589 is the floor for who does not see the future:\n", leaks(found)]
    parts += ["Mean k of a query:\n", controllers(found), claims(judged(found))]
    return "\n".join(parts)


def questions(found: list[dict]) -> list[list[str]]:
    rows = []
    for task in ("text", "recall"):
        for T in values(found, "T"):
            prefix, dense = of(found, task, T, "prefix"), of(found, task, T, "dense")
            others = {arm: of(found, task, T, arm) for arm in MATCHED} | {"top-p": top_p_at(found, task, T)}
            for arm, other in others.items():
                difference = verdict(100 * (prefix - other) / dense, f"{arm} is better", "prefix is better", " %")
                rows.append([f"{task} {T}: prefix against {arm}", difference])
    return rows


def sharing(found: list[dict]) -> list[list[str]]:
    rows = []
    for task in ("text", "recall"):
        for T in values(found, "T"):
            for arm in (arm for arm in SHARED if there(found, task, T, arm)):
                own, dense = of(found, task, T, arm.replace("share", "keep")), of(found, task, T, "dense")
                difference = 100 * (of(found, task, T, arm) - own) / dense
                found_ = verdict(difference, "a list of its own is better", "one list is better", " %")
                rows.append([f"{task} {T}: {arm} against a list for each query", found_])
    return rows


def leaks(found: list[dict]) -> str:
    seeds = [each["seed"] for each in pick(found, task="random", T=values(found, "T")[0], arm="causal")]
    rows = [
        [f"{T}, {arm}", *(f"{loss:.4f}" for loss in of(found, "random", T, arm))]
        for T in values(found, "T")
        for arm in ("causal", "leak 0.25", "leak 0.5", "leak 0.75", "leak 1")
    ]
    return table(("length, arm", *(f"seed {seed}" for seed in seeds)), rows)


def mean_k(run: dict) -> float:
    return float(np.mean(run["found"]["kept_pairs"])) / run["settings"]["T"]


def constant_k(run: dict) -> float:
    """The k of all queries at which so many pairs are kept."""
    T, pairs = run["settings"]["T"], np.mean(run["found"]["kept_pairs"])
    return min(range(1, T + 1), key=lambda k: abs(kept_pairs(k, T) - pairs))


def controllers(found: list[dict]) -> str:
    """Ours on three kinds of sequences, and upstream's, which cannot learn."""
    rows = []
    for T in values(found, "T"):
        cells = [cell(of(found, "text", T, arm, mean_k), 1) for arm in ("prefix", *probes(found))]
        upstream = cell(of(found, "controller", T, "upstream", constant_k), 1)
        rows.append([T, *cells, upstream, {64: "17", 128: "35", 256: "70 to 71"}.get(T, "not run")])
    header = ("length", "prefix, text", *(arm.replace("prefix on", "prefix,") for arm in probes(found)))
    return table((*header, "upstream's, k of all queries", "published"), rows)


def probes(found: list[dict]) -> list[str]:
    return [arm for arm in values(found, "arm") if arm.startswith("prefix on")]


def judged(found: list[dict]) -> list[tuple[str, str, str]]:
    T = values(found, "T")[0]

    def of_task(task):
        prefix, half = of(found, task, T, "prefix"), of(found, task, T, "keep 0.5")
        return f"{task}, length {T}: {delta(prefix, half)}"

    worst = np.min([of(found, "random", each, "causal") for each in values(found, "T")])
    leak = ", ".join(f"{loss:.3f}" for loss in of(found, "random", T, "leak 0.5"))
    parameters = {
        arm: pick(found, task="text", T=T, arm=arm)[0]["found"].get("parameters_in_all", 0)
        for arm in ("keep 0.5", "prefix")
    }
    more = parameters["prefix"] - parameters["keep 0.5"]
    constant = "nothing trains it: rounding cuts its gradient, so k is a constant of its initial weights"
    return [
        (
            "adaptive k is 10.9 % better than keeping 50 % at length 64",
            f"{of_task('text')}; {of_task('recall')}",
            "random tokens without a causal mask: one of three seeds of each arm found the copy, none could learn else",
        ),
        (
            "a loss of 3.733 on random tokens (keep 50 %, one seed)",
            f"with the leak {leak} by seed at length {T}; without, never below {worst:.4f}",
            "below ln V, on random tokens, only the future tells",
        ),
        ("k adapts to the sequence: 17, 35, 70", "the column of upstream's controller", constant),
        (
            "the controllers add 1.3 M parameters, 12.4 %",
            f"{more:,} here",
            "1,254,384 there, 11.9 %; ours is a small MLP",
        ),
    ]


def draw(found: list[dict], folder) -> None:
    lengths = values(found, "T")
    markers = dict(zip(("dense", "prefix", *MATCHED), ("*", "D", "o", "v", "x", "s", "^")))
    with figure(folder / f"{found[0]['preset']}.png", 2, len(lengths), 4.2, 3.4) as axes:
        for row, task in zip(axes, ("text", "recall")):
            for axis, T in zip(row, lengths):
                dense, first = of(found, task, T, "dense"), axis is axes[0][0]  # which has the legend
                for line, arms_of_line in (("-", FIXED), ("--", [f"top-p {each}" for each in COVERAGES])):
                    x = [of(found, task, T, arm, kept).mean() for arm in arms_of_line]
                    y = [(100 * (of(found, task, T, arm) / dense - 1)).mean() for arm in arms_of_line]
                    label = "fixed k, indexer" if line == "-" else "top-p"
                    axis.plot(x, y, line, color="0.4", marker=".", linewidth=1, label=label if first else None)
                for arm, marker in markers.items():
                    y = 100 * (of(found, task, T, arm) / dense - 1)
                    x = of(found, task, T, arm, kept)
                    axis.plot(x, y, marker, color="0.6", ms=4)
                    label = arm if first else None
                    axis.plot(x.mean(), y.mean(), marker, color="0", ms=7, fillstyle="none", label=label)
                axis.set(title=f"{task}, length {T}", xlabel="causal pairs kept, %", ylabel="loss above dense, %")
