"""Train GPT-2 with MLP weights limited to a diagonal band.

    make train_banded                                          # data, model, a short run (2 minutes on a laptop)
    python train_banded.py -e model.bin -w 256 -n 2000         # experiment 00007: FC1 banded
    python train_banded.py -e model.bin -1 0 -2 256 -n 5000    # experiment 00009: FC1 and FC2 apart, here FC2 only

Reads top to bottom as train_gpt2_fp32.cu does: options, model (views, forward, backward, update), loop. What differs
from GPT-2 is the band: FC1 weights fcw (4C,C) and FC2 weights fcprojw (C,4C) keep only |j - 4i| <= bandwidth / 2, with
channel i and hidden unit j; masked are the initial weights, their gradients, and the weights after every update.
"""

if __name__ == "__main__":
    from llmc import startup

    startup.begin()

import math
import time
import warnings
from argparse import Namespace
from types import SimpleNamespace

import kernels  # before NumPy, see its docstring  # isort: skip
import numpy as np

from kernels.cpu.band.band_mask import band_count, band_fan_in, band_mask
from llmc import errors, loop, options, table
from llmc.checkpoint import (
    BANDED,
    DENSE,
    MATRICES,
    GPT2Config,
    Model,
    check_trains,
    named_views,
    num_parameters,
    tensor_shapes,
)
from llmc.cli import ArgumentParser, flag01, natural
from llmc.errors import UserError
from llmc.interrupt import Interrupt
from llmc.logger import Logger
from llmc.rand import permutation
from llmc.schedulers import learning_rate

# ----------------------------------------------------------------------------------------------------------------------
# options

EPILOG = """examples:
  python train_banded.py -n 200 -b 4 -t 64                        the default data and model.bin, FC1 bandwidth 256
  python train_banded.py -e model.bin -w 256 -n 2000              experiment 00007, banded
  python train_banded.py -e model.bin -d 1 -n 2000                experiment 00007, dense
  python train_banded.py -1 128 -2 512 -n 5000 -c checkpoint.bin  experiment 00009, asymmetric
  python train_banded.py -w 256 --kernel mask -n 2000             as the reference did: dense products, then masks
  python train_banded.py --resume checkpoint.bin                  go on where a run stopped, with its settings

A bandwidth counts positions in the 4C-wide space: 256 at C = 128 keeps 43.9% of the weights, 8C - 2 and more all.
Exit status: 0 done, 1 error, 2 wrong usage, 130 after Ctrl-C, 143 after SIGTERM."""


BY_W, BY_12, INIT = {"bandwidth", "dense"}, {"fc1_bandwidth", "fc2_bandwidth"}, {"mask_init", "band_init", "permute"}


# the header fields: bandwidths of FC1 and FC2, FAN_IN if --band-init scaled the weights, --permute's seed, and which
# generator drew its order
FAN_IN = 1
BY_NUMPY, BY_MERSENNE = range(2)  # default_rng, in files of before; llm.c's Mersenne Twister


def arguments() -> ArgumentParser:
    """Both reference command lines in one: the bands, and what all trainers have."""
    parser = ArgumentParser(description=(__doc__ or "").partition("\n")[0], epilog=EPILOG)
    add = parser.add_argument_group("band (-w and -d, or -1 and -2)").add_argument
    add("-w", "--bandwidth", type=natural, help="FC1 bandwidth (default: 256, or the -e file's bands)")
    add("-d", "--dense", type=flag01, default=False, help="1: no band")
    add("-1", "--fc1-bandwidth", type=natural, help="FC1 bandwidth, 0: dense (default: 0 with -2)")
    add("-2", "--fc2-bandwidth", type=natural, help="FC2 bandwidth, 0: dense (default: 0 with -1)")
    add("--mask-init", type=flag01, default=True, help="1: mask the initial weights, 0: from the first update on")
    add("--band-init", choices=("none", "fan-in"), default="none", help="fan-in: scale masked initial weights up to it")
    add("--permute", type=natural, default=0, help="seed of a random order of FC1's hidden units, 0: their own")
    add("--kernel", choices=("band", "mask"), default="band", help="band: multiply only the band, mask: all, then mask")
    options.add_options(parser)
    return parser


def choose_bands(args: Namespace, typed: set[str], model: Model) -> tuple[int, int]:
    """(FC1, FC2) bandwidths, 0 = dense: the flags', else the model file's, else 256 for FC1.

    typed: the names of the flags that were given.
    """
    check_trains(args.model, model, "train_banded.py")
    saved = model.fields[:2] if model.kind == BANDED else (0, 0)
    if model.kind == BANDED:
        seed, drawn_by = model.fields[3:5]
        if min(*saved, seed) < 0 or drawn_by not in (BY_NUMPY, BY_MERSENNE):
            found = f"bandwidths {saved[0]} and {saved[1]}, order {drawn_by} of seed {seed}"
            expected = f"expected none below 0, order {BY_NUMPY} or {BY_MERSENNE}"
            raise UserError(f"{args.model}: {found}, {expected}", "train it again from its model file")
    if args.resume:
        check_in_band(args.model, model)
        if typed & (BY_W | BY_12 | INIT):
            hint = f"for another band start a new run from its weights: -e {args.resume}"
            flags = "no -w, -d, -1, -2, --mask-init, --band-init or --permute"
            raise UserError(f"--resume keeps the bands of the checkpoint: {flags}", hint, 2)
        return saved
    if typed & BY_12:
        return args.fc1_bandwidth or 0, args.fc2_bandwidth or 0
    if args.dense:
        return 0, 0
    if args.bandwidth is not None:
        return max(args.bandwidth, 1), 0  # -w 0 keeps the centres alone, and so does 1: here 0 is not dense
    if model.kind == BANDED:
        check_in_band(args.model, model)
        return saved
    return 256, 0


def check_in_band(path: str, model: Model):
    """Raise UserError if a banded model file has weights outside its bands, which training would silently drop."""
    fc1, fc2, _, seed, drawn_by = model.fields[:5] if model.kind == BANDED else (0,) * 5
    weights = named_views(model.params, tensor_shapes(model.config))
    for name, bandwidth in (("fcw", fc1), ("fcprojw", fc2)):
        if bandwidth:
            weight = weights[name]
            if seed and name == "fcw":
                weight = weight[:, hidden_order(model.config, seed, drawn_by)[0]]
            kept = np.ones((1, *weight.shape[1:]), bool)
            band_mask(kept, bandwidth)
            if outside := int(np.count_nonzero(weight[:, ~kept[0]])):
                found = f"{outside} weights of {name} that are not 0 lie outside its band of {bandwidth}"
                order = f" (hidden units in order {drawn_by} of seed {seed})" if seed else ""
                hint = f"-e {path} with -w or -1 and -2 makes a band of it, and drops them"
                raise UserError(f"{path}: {found}{order}", hint)


def rescale_to_fan_in(device, args: Namespace, file: Model, bands: tuple[int, int], drawn_by: int):
    """Scale each row of the banded weights by sqrt(all its inputs / those that the band keeps), in place.

    Outputs then have the variance of the dense layer's at the start, whose weights had that many inputs to add up.
    """
    if not args.mask_init:
        raise UserError("--band-init fan-in with --mask-init 0: the weights outside still count", "leave one out", 2)
    if scaled_before(file):
        raise UserError(f"--band-init fan-in: the weights of {args.model} are scaled to theirs already", "leave it out")
    for name, bandwidth in zip(("fcw", "fcprojw"), bands):
        if bandwidth:
            weight = named_views(file.params, tensor_shapes(file.config))[name]  # (L,OC,C)
            kept = np.array(band_fan_in(*weight.shape[1:], bandwidth))
            if args.permute and name == "fcw":
                kept = kept[hidden_order(file.config, args.permute, drawn_by)[1]]
            weight *= np.sqrt(weight.shape[2] / np.maximum(kept, 1)).astype(np.float32)[:, None]


def hidden_order(config: GPT2Config, seed: int, drawn_by: int = BY_MERSENNE) -> tuple[np.ndarray, np.ndarray]:
    """--permute's order: FC1's p-th hidden unit is number order[p]; unit j is its position[j]-th. Both (4C) int32."""
    if drawn_by == BY_NUMPY:  # NumPy may change this stream: then check_in_band refuses the file
        order = np.random.default_rng(seed).permutation(4 * config.C).astype(np.int32)
    else:
        order = permutation(4 * config.C, seed)
    return order, np.argsort(order).astype(np.int32)


def scaled_before(file: Model) -> bool:
    """Whether a run with --band-init fan-in wrote the file."""
    return file.kind == BANDED and file.fields[2:3] == (FAN_IN,)


def has_two_bands(args: Namespace, bands: tuple[int, int]) -> bool:
    """Whether the table is experiment 00009's (two bands) or 00007's (one)."""
    return bool(args.fc1_bandwidth is not None or args.fc2_bandwidth is not None or bands[1])


def print_bands(args: Namespace, bands: tuple[int, int]):
    """The reference's first rows."""
    fc1, fc2 = bands
    if has_two_bands(args, bands):
        table.row("FC1 bandwidth", fc1, "%d")
        table.row("FC2 bandwidth", fc2, "%d")
        names = [name for name, bandwidth in (("FC1", fc1), ("FC2", fc2)) if bandwidth]
        banded = " + ".join(names) if len(names) == 2 else f"{names[0]} only" if names else ""
        table.row("Sparsity mode", f"BANDED ({banded})" if banded else "DENSE (no sparsity)")
    else:
        mode = "ENABLED" if fc1 else "DISABLED"
        print(f"| BANDED SPARSITY       | {mode} (bandwidth={fc1})                          |")


def print_masks(device, args: Namespace, config: GPT2Config, bands: tuple[int, int]):
    """The reference's mask rows, with exact counts; a warning for a band that leaves nothing out."""
    L, C = config.L, config.C
    sizes, full = {"FC1": (4 * C, C), "FC2": (C, 4 * C)}, 4 * C * C
    two = has_two_bands(args, bands)
    for (name, size), bandwidth in zip(sizes.items(), bands):
        if bandwidth:
            kept = band_count(*size, bandwidth)
            density = f"bandwidth={bandwidth}, density={100 * kept / full:.1f}%"
            print(f"| {name} banded mask       | {density}                       |")
            print(f"| {name} connections       | {L * kept} / {L * full} (per layer: {kept} / {full})              |")
            if kept == full:
                print(f"WARNING: {name} bandwidth {bandwidth} covers all of {size[0]} x {size[1]}: {name} is dense")
        elif two:
            print(f"| {name}                   | DENSE (bandwidth=0)                                |")
    if any(bands):
        mode = "initial weights masked" if args.mask_init else "gradients + post-update only"
        label = "Mask mode" if two else "FC1 mask applied" if args.mask_init else "FC1 mask mode"
        table.row(label, mode)
        if args.band_init == "fan-in":
            table.row("Band init", "rows scaled by sqrt(inputs / kept inputs)")
        if args.permute:
            table.row("FC1 hidden units", f"in random order (seed {args.permute})")
        if args.kernel == "mask":
            table.row("Band kernel", "dense products, then masks")
    table.rule()


# ----------------------------------------------------------------------------------------------------------------------
# the model


class GPT2:
    """GPT-2 on a device: parameters, gradients, m and v are one flat float32 buffer each, with a view per tensor."""

    def __init__(
        self,
        device,
        config: GPT2Config,
        params: np.ndarray,
        B,
        T,
        fc1_bandwidth=0,
        fc2_bandwidth=0,
        permute=0,
        drawn_by=BY_MERSENNE,
    ):
        """permute: seed of the order of hidden units along FC1's band, 0 for their own, which is that of files and FC2.

        FC1's rows stand in the order of its band here, so that this is a diagonal.
        """
        self.ops, self.config, self.B, self.T = device, config, B, T
        self.fc1_bandwidth, self.fc2_bandwidth = fc1_bandwidth, fc2_bandwidth  # 0 = dense
        self.kernel, self.scaled = "band", False  # --kernel; whether the weights were scaled to the band's fan-in
        self.masked, self.fc1, self.fc2 = False, 0, 0  # the bands of the products: none until the weights are masked
        self.permute, self.drawn_by = permute, drawn_by
        if permute:
            self.order, self.position = hidden_order(config, permute, drawn_by)
            self.to_fc1, self.from_fc1 = (device.to_device(index) for index in (self.order, self.position))
        self.shapes = tensor_shapes(config)
        self.params_flat, self.params = self._buffer(params)
        self.grads_flat = self.m_flat = self.v_flat = self.acts = self.decoder = None

    def _buffer(self, values: np.ndarray | None = None) -> tuple:
        """A flat buffer on the device, of `values` or of zeros for all parameters, and its views by name."""
        if values is None:
            flat = self.ops.zeros(num_parameters(self.config))
        else:
            flat = self.ops.to_device(self._reordered(values, self.order) if self.permute else values)
        return flat, SimpleNamespace(**named_views(flat, self.shapes))

    def _reordered(self, values: np.ndarray, index: np.ndarray) -> np.ndarray:
        """A copy of the parameters, m or v (on the host) with the rows of FC1 taken by `index`."""
        values = values.copy()
        tensors = named_views(values, self.shapes)
        for name in ("fcw", "fcb"):
            tensors[name][...] = tensors[name][:, index]
        return values

    def in_file_order(self, flat) -> np.ndarray:
        """The parameters, m or v on the host, hidden units in their own order."""
        values = self.ops.to_host(flat)
        return self._reordered(values, self.position) if self.permute else values

    def _allocate(self, what: str, shapes: dict) -> SimpleNamespace:
        total = sum(map(math.prod, shapes.values())) * 4
        print(f"allocated {total >> 20} MiB for {what}")
        return SimpleNamespace(**{name: self.ops.zeros(shape) for name, shape in shapes.items()})

    def mask_weights(self):
        """Zero the weights outside the bands. From then on products skip them, and gradients, m and v stay 0 there.

        With kernel "mask" nothing is skipped: products stay dense, every gradient and every update is masked.
        """
        self._mask(self.params)
        if self.kernel == "band":
            self.masked, self.fc1, self.fc2 = True, self.fc1_bandwidth, self.fc2_bandwidth

    def _mask(self, tensors):
        if self.fc1_bandwidth:
            self.ops.band_mask(tensors.fcw, self.fc1_bandwidth)
        if self.fc2_bandwidth:
            self.ops.band_mask(tensors.fcprojw, self.fc2_bandwidth)

    def forward(self, inputs: np.ndarray, targets: np.ndarray | None = None, grad_accum: int = 1) -> None:
        """inputs, targets (B,T) int32 -> logits; with targets, losses, which mean_loss fetches.

        With targets, the logits are overwritten by the gradient of loss / grad_accum, which backward starts from.
        """
        ops, p, L, NH, Vp = self.ops, self.params, self.config.L, self.config.NH, self.config.Vp
        B, T, C = self.B, self.T, self.config.C
        N = B * T
        if self.acts is None:
            shapes = dict(encoded=(N, C), ln1=(L, N, C), ln1_mean=(L, N), ln1_rstd=(L, N), qkv=(L, B, T, 3 * C))
            shapes |= dict(atty=(L, N, C), lse=(L, B, NH, T), residual2=(L, N, C), ln2=(L, N, C), ln2_mean=(L, N))
            shapes |= dict(ln2_rstd=(L, N), fch=(L, N, 4 * C), fch_gelu=(L, N, 4 * C), residual3=(L, N, C))
            shapes |= dict(lnf=(N, C), lnf_mean=(N,), lnf_rstd=(N,), logits=(N, Vp), losses=(N,))
            self.acts = self._allocate("activations", shapes)
            self.inputs, self.targets = ops.zeros((B, T), np.int32), ops.zeros(N, np.int32)
            self.hidden = ops.zeros((N, 4 * C)) if self.permute else None
        a = self.acts
        ops.copy_in(self.inputs, inputs)
        ops.encoder_forward(a.encoded, self.inputs, p.wte, p.wpe)
        ops.layernorm_forward(a.ln1[0], a.ln1_mean[0], a.ln1_rstd[0], a.encoded, p.ln1w[0], p.ln1b[0])
        residual = a.encoded  # (N,C)
        for l in range(L):
            ops.matmul_forward(a.qkv[l].reshape(N, 3 * C), a.ln1[l], p.qkvw[l], p.qkvb[l])
            ops.attention_forward(a.atty[l], a.lse[l], a.qkv[l], NH)
            ops.matmul_forward(a.residual2[l], a.atty[l], p.attprojw[l], p.attprojb[l])
            ln2 = (a.ln2[l], a.ln2_mean[l], a.ln2_rstd[l])
            ops.fused_residual_forward(a.residual2[l], *ln2, a.residual2[l], residual, p.ln2w[l], p.ln2b[l])
            ops.band_matmul_forward(a.fch[l], a.ln2[l], p.fcw[l], p.fcb[l], self.fc1)
            if self.permute:
                ops.gelu_forward(self.hidden, a.fch[l])
                ops.take_columns(a.fch_gelu[l], self.hidden, self.from_fc1)
            else:
                ops.gelu_forward(a.fch_gelu[l], a.fch[l])
            ops.band_matmul_forward(a.residual3[l], a.fch_gelu[l], p.fcprojw[l], p.fcprojb[l], self.fc2)
            if l + 1 < L:  # the next layer's layernorm, or the last
                ln, w, b = (a.ln1[l + 1], a.ln1_mean[l + 1], a.ln1_rstd[l + 1]), p.ln1w[l + 1], p.ln1b[l + 1]
            else:
                ln, w, b = (a.lnf, a.lnf_mean, a.lnf_rstd), p.lnfw, p.lnfb
            ops.fused_residual_forward(a.residual3[l], *ln, a.residual3[l], a.residual2[l], w, b)
            residual = a.residual3[l]
        ops.matmul_forward(a.logits, a.lnf, p.wte)  # (N,Vp)
        if targets is not None:
            ops.copy_in(self.targets, targets.ravel())
            ops.fused_classifier(a.losses, a.logits, self.targets, self.config.V, 1 / (N * grad_accum))
            self.losses = ops.to_host_later(a.losses)

    def mean_loss(self) -> float:
        """The loss of the last forward with targets; waits for that, not for what was begun since."""
        return float(self.losses().mean())

    def backward(self, first: bool = True):
        """Gradients of the last forward's loss; the `first` micro-step of an update starts them, later ones add."""
        ops, p, a, L, NH = self.ops, self.params, self.acts, self.config.L, self.config.NH
        B, T, C = self.B, self.T, self.config.C
        N = B * T
        if self.grads_flat is None:
            print(f"allocated {self.params_flat.nbytes >> 20} MiB for parameter gradients")
            self.grads_flat, self.grads = self._buffer()
            shapes = dict(residual=(N, C), btc=(N, C), qkv=(B, T, 3 * C), bt4c=(N, 4 * C))
            self.dacts = self._allocate("activation gradients", shapes)
        g, d = self.grads, self.dacts
        beta = 0 if first else 1
        if first:  # the matrices' gradients are written by their product, all others are added to
            for name, tensor in vars(g).items():
                if name not in MATRICES or name == "wpe":
                    tensor.fill(0)
        d.residual.fill(0)

        ops.matmul_backward(d.btc, g.wte, None, a.logits, a.lnf, p.wte, beta)
        last = a.residual3[L - 1]
        ops.layernorm_backward(d.residual, g.lnfw, g.lnfb, d.btc, last, p.lnfw, a.lnf_mean, a.lnf_rstd)
        for l in reversed(range(L)):
            residual = a.residual3[l - 1] if l > 0 else a.encoded
            ops.band_matmul_backward(
                d.bt4c, g.fcprojw[l], g.fcprojb[l], d.residual, a.fch_gelu[l], p.fcprojw[l], self.fc2, beta
            )
            if self.permute:
                ops.take_columns(self.hidden, d.bt4c, self.to_fc1)
                ops.gelu_backward(d.bt4c, a.fch[l], self.hidden)
            else:
                ops.gelu_backward(d.bt4c, a.fch[l], d.bt4c)
            ops.band_matmul_backward(d.btc, g.fcw[l], g.fcb[l], d.bt4c, a.ln2[l], p.fcw[l], self.fc1, beta)
            ops.layernorm_backward(
                d.residual, g.ln2w[l], g.ln2b[l], d.btc, a.residual2[l], p.ln2w[l], a.ln2_mean[l], a.ln2_rstd[l]
            )
            ops.matmul_backward(d.btc, g.attprojw[l], g.attprojb[l], d.residual, a.atty[l], p.attprojw[l], beta)
            ops.attention_backward(d.qkv, d.btc, a.qkv[l], a.atty[l], a.lse[l], NH)
            ops.matmul_backward(d.btc, g.qkvw[l], g.qkvb[l], d.qkv.reshape(N, 3 * C), a.ln1[l], p.qkvw[l], beta)
            ops.layernorm_backward(
                d.residual, g.ln1w[l], g.ln1b[l], d.btc, residual, p.ln1w[l], a.ln1_mean[l], a.ln1_rstd[l]
            )
        ops.encoder_backward(g.wte, g.wpe, d.residual, self.inputs)
        if not self.masked:
            self._mask(g)

    def update(self, t, lr, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, decay_all=True, grad_clip=0.0):
        """AdamW update number t = 1, 2, ...; returns the gradient norm if grad_clip > 0, else None."""
        if self.m_flat is None:
            self.allocate_moments()
        norm = self.ops.global_norm(self.grads_flat) if grad_clip else None
        scale = grad_clip / norm if grad_clip and norm > grad_clip else 1.0
        for name in self.shapes:
            tensors = [getattr(views, name) for views in (self.params, self.grads, self.m, self.v)]
            decay = weight_decay if decay_all or name in MATRICES else 0.0
            bandwidth = {"fcw": self.fc1, "fcprojw": self.fc2}.get(name, 0)
            if bandwidth:
                self.ops.band_adamw_update(*tensors, bandwidth, t, lr, beta1, beta2, eps, decay, scale)
            else:
                self.ops.adamw_update(*tensors, t, lr, beta1, beta2, eps, decay, scale)
        if not self.masked:
            self.mask_weights()
        return norm

    def allocate_moments(self, m: np.ndarray | None = None, v: np.ndarray | None = None):
        """AdamW's m and v: a checkpoint's, or zeros."""
        for name in ("m", "v"):
            print(f"allocated {self.params_flat.nbytes >> 20} MiB for AdamW optimizer state {name}")
        self.m_flat, self.m = self._buffer(m)
        self.v_flat, self.v = self._buffer(v)

    def extend(self, tokens: np.ndarray, start: int) -> np.ndarray:
        """Logits (V) after `tokens` (n) int32 at positions start.., of which earlier calls ran 0..start-1.

        Queries, keys and values of all positions are kept, so a token costs its own row of the forward pass only.
        """
        ops, p, L, NH, C = self.ops, self.params, self.config.L, self.config.NH, self.config.C
        maxT, n, end = self.config.maxT, len(tokens), start + len(tokens)
        if self.decoder is None:
            shapes = dict(x=(maxT, C), y=(maxT, C), mean=(maxT,), rstd=(maxT,), lse=(NH * maxT,), fch=(maxT, 4 * C))
            shapes |= dict(z=(maxT, C), qkv=(L, 1, maxT, 3 * C), logits=(1, self.config.Vp))
            shapes |= dict(hidden=(maxT, 4 * C)) if self.permute else {}
            self.decoder = SimpleNamespace(**{name: ops.zeros(shape) for name, shape in shapes.items()})
            self.decoder.tokens = ops.zeros((1, maxT), np.int32)
        a = self.decoder
        x, y, z, mean, rstd, fch = (array[:n] for array in (a.x, a.y, a.z, a.mean, a.rstd, a.fch))
        lse = a.lse[: NH * n].reshape(1, NH, n)
        ops.copy_in(a.tokens[:, :n], tokens.reshape(1, n))
        ops.encoder_forward(x, a.tokens[:, :n], p.wte, p.wpe, start)
        for l in range(L):
            ops.layernorm_forward(y, mean, rstd, x, p.ln1w[l], p.ln1b[l])
            ops.matmul_forward(a.qkv[l, 0, start:end], y, p.qkvw[l], p.qkvb[l])
            ops.attention_forward(y, lse, a.qkv[l, :, :end], NH, start)
            ops.matmul_forward(z, y, p.attprojw[l], p.attprojb[l])
            ops.fused_residual_forward(x, y, mean, rstd, x, z, p.ln2w[l], p.ln2b[l])
            ops.matmul_forward(fch, y, p.fcw[l], p.fcb[l])
            ops.gelu_forward(fch, fch)
            if self.permute:
                ops.take_columns(a.hidden[:n], fch, self.from_fc1)
            ops.matmul_forward(y, a.hidden[:n] if self.permute else fch, p.fcprojw[l], p.fcprojb[l])
            ops.residual_forward(x, x, y)
        ops.layernorm_forward(y[-1:], mean[-1:], rstd[-1:], x[-1:], p.lnfw, p.lnfb)
        ops.matmul_forward(a.logits, y[-1:], p.wte)
        return ops.to_host(a.logits)[0, : self.config.V]


# ----------------------------------------------------------------------------------------------------------------------
# the loop


def save(args: Namespace, model: GPT2, step: int, run: loop.Run):
    """Write the checkpoint, bands in its header, and the optimizer state for a run that goes on at `step`."""
    host, bands = model.in_file_order, (model.fc1_bandwidth, model.fc2_bandwidth)
    fields = (*bands, FAN_IN * model.scaled, model.permute, model.drawn_by)
    kind, fields = (BANDED, fields) if any(bands) else (DENSE, ())
    file = Model(model.config, host(model.params_flat), step, kind=kind, fields=fields)
    loop.save(args, model, file, host(model.m_flat), host(model.v_flat), run)


def main(argv: list[str] | None = None) -> int:
    warnings.simplefilter("ignore", RuntimeWarning)  # of NumPy, for losses that overflow: reported below, once
    parser = arguments()
    typed = parser.explicit(argv)
    if typed & BY_W and typed & BY_12:
        raise UserError("-w or -d given together with -1 or -2", "-w N is -1 N -2 0: keep to one of the two", 2)
    args, file, state = options.parse_options(parser, argv, "train_banded.py")
    bands = choose_bands(args, typed, file)
    drawn_by = BY_MERSENNE
    if file.kind == BANDED and "permute" not in typed:
        args.permute, drawn_by = file.fields[3:5]
    if "permute" in typed and args.permute and not bands[0]:
        raise UserError("--permute: it is FC1's band that it moves, and FC1 is dense", "add -w N or -1 N", 2)
    if args.band_init == "fan-in" and not any(bands):
        raise UserError("--band-init fan-in: there is no band", "add -w N, -1 N or -2 N", 2)
    config, B, T, grad_accum = file.config, args.batch_size, args.seq_len, args.grad_accum
    device = kernels.open_device(args.device, args.tf32)

    run = loop.open_run(args, config, state)
    start, steps = run.start, run.steps

    table.heading()
    print_bands(args, bands)
    options.print_options(args)
    options.print_model(device.describe(), device.tf32, config)
    print_masks(device, args, config, bands)
    options.print_workload(steps, run.val_batches)

    if args.band_init == "fan-in" and not state:
        rescale_to_fan_in(device, args, file, bands, drawn_by)
    print(f"allocated {file.params.nbytes >> 20} MiB for model parameters")
    model = GPT2(device, config, file.params, B, T, *bands, args.permute if any(bands) else 0, drawn_by)
    model.kernel, model.scaled = args.kernel, args.band_init == "fan-in" or scaled_before(file)
    if state:
        model.allocate_moments(state.m, state.v)
        print(f"Resuming from step {start} (shard {state.shard}, sample {state.sample})")
    if state or args.mask_init:
        model.mask_weights()
    schedule = dict(lr=args.lr, warmup=args.warmup, steps=steps, final_frac=args.final_lr_frac)
    adamw = dict(beta2=args.beta2, weight_decay=args.weight_decay, decay_all=args.decay_all, grad_clip=args.grad_clip)
    log = Logger(args.log, start)

    seconds = 0.0
    with Interrupt() as interrupt:
        for step in range(start, steps + 1):
            last_step = step == steps
            if interrupt.signal and not last_step:
                if args.checkpoint and step > start:
                    save(args, model, step, run)
                break
            if step == 0 or last_step or (args.val_every and step % args.val_every == 0):
                val_loss = loop.evaluate(model, run.val_loader, run.val_batches)
                loop.check_finite("val", val_loss, step, args)
                print(f"val loss {val_loss:f}", flush=True)
                log.val(step, val_loss)
            due = args.checkpoint_every and step % args.checkpoint_every == 0
            if args.checkpoint and step > start and (last_step or due):
                save(args, model, step, run)
            if args.sample_every and step > 0 and (last_step or step % args.sample_every == 0):
                loop.print_sample(model, run, args.sample_tokens)
            if last_step:
                break

            started = time.perf_counter()
            if args.overfit_batch:
                run.train_loader.reset()
            loss = 0.0
            for micro_step in range(grad_accum):
                model.forward(*run.train_loader.next_batch(), grad_accum)
                model.backward(first=micro_step == 0)
                loss += model.mean_loss() / grad_accum
            loop.check_finite("train", loss, step + 1, args)
            lr = learning_rate(args.lr_schedule, step, **schedule)
            norm = model.update(step + 1, lr, **adamw)
            device.synchronize()
            elapsed = time.perf_counter() - started
            seconds += elapsed
            rate = int(B * T * grad_accum / elapsed)
            print(f"step {step + 1:4d}/{steps}: train loss {loss:f} ({elapsed * 1000:f} ms, {rate} tok/s)", flush=True)
            if norm is not None:
                print(f"lr {lr:.2e}, gradient norm {norm:.4f}", flush=True)
            log.train(step, loss)
    log.close()

    if not last_step:
        loop.print_stopped(args, step, start)
        return interrupt.exit_code
    loop.print_finished(args, device, step - start, seconds)
    return interrupt.exit_code  # 0, but after a signal during the last step


if __name__ == "__main__":
    errors.run(main)
