"""What a selection of keys has of dense attention, and of answers: the figures that a validation prints.

A model here is train_sparse_attn.GPT2, its parts and what it keeps of each layer; dense is whether it attends to all
keys in this phase.
"""

import time
from argparse import ArgumentTypeError, Namespace
from dataclasses import astuple, dataclass
from functools import partial

import numpy as np

from kernels import cpu
from kernels.shares import Shares
from llmc.buffers import query_blocks
from llmc.cli import ArgumentParser
from llmc.dataloader import DataLoader
from llmc.loop import Run, check_finite
from llmc.ranks import ALONE, Ranks

ROWS = 128  # queries whose scores are in memory at a time: ROWS x T of them
GPU_SCORES = 64 << 20  # bytes of them on a GPU, which few queries leave idle: all of a layer at B = 1, T = 4096


def rows_at_once(device, B: int, T: int) -> int:
    """How many queries' scores (B,rows,T) are in memory at a time: ROWS, or on a GPU what GPU_SCORES has room for."""
    return min(T, ROWS if device is cpu else max(ROWS, GPU_SCORES // (4 * B * T)))


def ids(text: str) -> str:
    """FIRST:END, two token ids."""
    first, colon, end = text.partition(":")
    if not (colon and first.isdigit() and end.isdigit() and int(first) < int(end) < 1 << 24):
        raise ArgumentTypeError(f"{text!r}, expected FIRST:END, two token ids")
    return text


def add_report_options(parser: ArgumentParser) -> None:
    """Add the option about what a validation reports to `parser`."""
    add = parser.add_argument_group("report").add_argument
    add("--answers-after", type=ids, metavar="FIRST:END", help="ids whose next token is an answer: report accuracy")


def kept_pairs(k: int, T: int, share: int = 1) -> int:
    """How many (query, key) pairs T queries keep, query t those of min(k, t + 1) keys.

    share: queries of a tile with one list, as kernels/cpu/sparse/share_topk.py says; k counts what the last has.
    """
    if share > 1:
        t = np.arange(T)
        left_out = t // share * share - share - (k - 2 * share)  # keys before the tile before, but for those chosen
        return int((t + 1 - np.maximum(left_out, 0)).sum())
    k = min(k, T)
    return k * (k + 1) // 2 + (T - k) * k


def selected(index: np.ndarray, keys: int) -> np.ndarray:
    """index (...,K) of lists padded with -1 -> mask (...,keys)"""
    mask = np.zeros((*index.shape[:-1], keys + 1), bool)
    np.put_along_axis(mask, index.astype(np.int64), True, -1)  # -1 is the spare last column
    return mask[..., :keys]


@dataclass
class Agreement:
    """What a selection has of dense attention, summed over queries: recall@k, and the probability that it covers."""

    overlap: float = 0.0  # sum over rows of |selected and top| / |selected|
    rows: int = 0
    mass: float = 0.0
    queries: int = 0
    kept: int = 0

    def add(self, index: np.ndarray, top: np.ndarray, p: np.ndarray, first: int) -> None:
        """A block: selected index and the same number of likeliest keys, both (B,R,K), and p (B,R,S).

        Rows in which all keys are selected say nothing of recall and count for the mass only.
        """
        S = p.shape[2]
        chosen, best = selected(index, S), selected(top, S)
        sizes = chosen.sum(-1)  # (B,R)
        real = sizes < first + 1 + np.arange(index.shape[1])
        self.overlap += float(((chosen & best).sum(-1)[real] / sizes[real]).sum())
        self.rows += int(real.sum())
        self.mass += float((p * chosen).sum(dtype=np.float64))
        self.queries += sizes.size
        self.kept += int(sizes.sum())

    def __add__(self, other: "Agreement") -> "Agreement":
        """Both together."""
        return Agreement(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other))))

    @property
    def recall(self) -> float:
        """Mean share of the likeliest keys among those selected, 1 if nothing was left out anywhere."""
        return self.overlap / self.rows if self.rows else 1.0

    @property
    def mean_mass(self) -> float:
        """Mean probability that dense attention gives to the selected keys."""
        return self.mass / self.queries


def answers(inputs: np.ndarray, targets: np.ndarray, first: int, end: int) -> np.ndarray:
    """Mask (B,T) of the positions whose input is one of the ids first..end-1, and whose target stood earlier."""
    return (inputs >= first) & (inputs < end) & (sources(inputs, targets) >= 0)


def sources(inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """(B,T): the last position up to t whose input is the target of position t, -1 if there is none."""
    T = inputs.shape[1]
    found = (inputs[:, None, :] == targets[:, :, None]) & np.tri(T, dtype=bool)  # (B,T,T)
    return np.where(found.any(-1), T - 1 - found[..., ::-1].argmax(-1), -1)


def hits(index: np.ndarray, wanted: np.ndarray, mask: np.ndarray) -> float:
    """Share of the queries in mask (B,T) whose wanted key (B,T) is among index (B,T,K)."""
    return float((index == wanted[..., None]).any(-1)[mask].mean()) if mask.any() else float("nan")


def measure_rows(model, inputs: np.ndarray, dense: bool = False) -> tuple[list[float], list[Agreement], float]:
    """As measure, for a model's rows."""
    ops, NH, dense = model.ops, model.config.NH, dense or model.always_dense
    model.load(inputs, None, 0)
    began = time.perf_counter()
    model.launch_forward(False, 1, dense)  # not as a graph: what is compared with it below is none
    ops.synchronize()
    whole, chosen, divergences, agreements = time.perf_counter() - began, 0.0, [], []
    for l, a in enumerate(model.layers):
        if model.recompute:
            model.layer_again(l, dense)
        began = time.perf_counter()
        model.indexer.forward(l, a)
        model.selection.forward(l, a, 0, model.sparsity.leak)
        ops.synchronize()
        chosen += time.perf_counter() - began
        if model.sparsity.indexer != "none":
            model.divergence(l, dense)
            divergences.append(float(ops.to_host(a.kl).mean()))
        if not dense:
            ops.attention_forward(a.btc, a.dense_lse, a.qkv, NH)
        top, count, agreement = ops.zeros(a.index.shape, np.int32), ops.zeros(a.count.shape, np.int32), Agreement()
        for first, p in query_blocks(a.p, model.B, 0, model.T, model.selection.rows):
            ops.attention_mean(p, a.qkv, a.lse if dense else a.dense_lse, NH, first)
            ops.select_topk(top, count, p, a.count, first, 0, 0)
            rows = slice(first, first + p.shape[1])
            agreement.add(ops.to_host(a.index)[:, rows], ops.to_host(top)[:, rows], ops.to_host(p), first)
        agreements.append(agreement)
    return divergences, agreements, chosen / (whole + chosen if dense else whole)


def measure(batch: Shares, inputs: np.ndarray, dense: bool) -> tuple[list[float], list[Agreement], float]:
    """Each layer's KL, what its selection has of dense attention, the indexer's share of the time; over all rows."""
    found = batch.each(*(partial(_measure, inputs[rows], dense) for rows in batch.rows))
    return over_all(found, [model.B / batch.B for model in batch.models])


def over_all(found: list, weights: list[float]) -> tuple[list[float], list[Agreement], float]:
    """What measure found on several parts of the rows, together; weights: the part of the rows that each has."""
    divergences, agreements, times = zip(*found)
    together = [sum(of_layer, Agreement()) for of_layer in zip(*agreements)]
    return np.dot(weights, divergences).tolist(), together, float(np.dot(weights, times))


def _measure(inputs: np.ndarray, dense: bool, shares: Shares, k: int):
    """measure_rows of the k-th share."""
    return measure_rows(shares.models[k], inputs, dense)


def report(batch: Shares, run: Run, args: Namespace, step: int, dense: bool):
    """Print what the selection has of dense attention, on the first validation batch, and of answers, on all.

    Of several ranks, on the batches of all. dense: whether the model attends to all keys in this phase.
    """
    model, loader, log = batch.models[0], run.val_loader, run.log
    if model.sparsity.attention == "sparse" and not model.sparsity.leak:
        loader.reset()
        found = run.ranks.gather(measure(batch, loader.next_batch()[0], dense))
        divergences, agreements, part = over_all(found, len(found) * [1 / len(found)])
        causal = model.T * (model.T + 1) // 2
        for l, agreement in enumerate(agreements):
            kl = f"KL {divergences[l]:.4f}, " if divergences else ""
            has = f"recall@k {agreement.recall:.4f}, mass@k {agreement.mean_mass:.4f}"
            print(
                f"layer {l}: {kl}{has}, kept {agreement.kept / (batch.B * len(found)):.1f} of {causal} pairs",
                flush=True,
            )
        if divergences:
            check_finite("indexer's", sum(divergences), step, args)
            log.add("kl", step, sum(divergences) / len(divergences))
            print(f"indexer and selection: {100 * part:.1f}% of a forward pass")
        log.add("recall", step, sum(each.recall for each in agreements) / len(agreements))
        log.add("mass", step, sum(each.mean_mass for each in agreements) / len(agreements))
    if args.answers_after:
        first, end = map(int, args.answers_after.split(":"))
        right, found = answer_accuracy(batch, loader, run.val_batches, first, end, dense, run.ranks)
        if right is None:
            print("answers: none in the validation data", flush=True)
            return
        selected = ", ".join(f"{share:.3f}" for share in found)
        print(f"answers: accuracy {right:.4f}" + (f", source selected {selected}" if found else ""), flush=True)
        log.add("answers", step, right)


def answer_accuracy(
    batch: Shares, loader: DataLoader, batches: int, first: int, end: int, dense: bool, ranks: Ranks = ALONE
) -> tuple[float | None, list[float]]:
    """Share of the tokens after ids first..end-1 that are likeliest; by layer, how often their source was selected.

    dense: as in report. None if there is no answer at all, no layers where all keys are attended to.
    """
    total, right, hit = 0, 0, np.zeros(batch.models[0].config.L)
    loader.reset()
    for _ in range(batches):
        inputs, targets = loader.next_batch()
        share = (partial(_answered, inputs[rows], targets[rows], first, end, dense) for rows in batch.rows)
        for asked, correct, selected in batch.each(*share):
            total, right, hit = total + asked, right + correct, hit + selected
    total, right, hit = (sum(of_each) for of_each in zip(*ranks.gather((total, right, hit))))
    if not total:
        return None, []
    return right / total, [] if dense or batch.models[0].always_dense else list(hit / total)


def _answered(
    inputs: np.ndarray, targets: np.ndarray, first: int, end: int, dense: bool, shares: Shares, k: int
) -> tuple[int, int, np.ndarray]:
    """Of the k-th share: answers asked for, those that are likeliest, and by layer those whose source was selected."""
    model = shares.models[k]
    asked, wanted = answers(inputs, targets, first, end), sources(inputs, targets)
    model.forward(inputs, dense=dense)
    likeliest = model.ops.to_host(model.acts.logits)[:, : model.config.V].argmax(1).reshape(inputs.shape)
    hit = np.zeros(model.config.L)
    if asked.any() and not (dense or model.always_dense):
        hit += [hits(model.ops.to_host(layer.index), wanted, asked) * asked.sum() for layer in model.layers]
    return int(asked.sum()), int((likeliest == targets)[asked].sum()), hit
