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

import warnings
from argparse import Namespace
from types import SimpleNamespace

import kernels  # before NumPy, see its docstring  # isort: skip
import numpy as np

from kernels.cpu.gpt2.adamw import RATES, adamw_rates
from kernels.graph import Replay
from kernels.shares import Shares, share_rows
from llmc import errors, loop, options, table
from llmc.buffers import (
    all_but,
    allocate,
    first_of,
    flat_buffer,
    in_part,
    matrices_of,
    num_values,
    split,
    tell_allocated,
)
from llmc.checkpoint import MATRICES, GPT2Config, Model, named_views, tensor_shapes
from llmc.cli import ArgumentParser, flag01, natural
from llmc.interrupt import Interrupt
from llmc.ranks import ALONE, Ranks, open_ranks
from llmc.schedulers import learning_rate
from systems.band import NO_BAND, Band, choose_band, print_band, print_masks

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


# ----------------------------------------------------------------------------------------------------------------------
# the model

# gradients that their product writes in the first micro-step; all others are added to, and start from 0
WRITTEN = ("wte", "qkvw", "attprojw", "fcw", "fcprojw")
KEPT = ("residual3",)  # activations of its own that a layer has with --recompute


class GPT2:
    """GPT-2 on a device: parameters, gradients, m and v are one flat float32 buffer each, with a view per tensor."""

    def __init__(
        self,
        device,
        config: GPT2Config,
        params: np.ndarray,
        B: int,
        T: int,
        band: Band = NO_BAND,
        kernel: str = "band",
        recompute: bool = False,
        ranks: Ranks = ALONE,
    ):
        """band: the weights that are kept; kernel: "band" multiplies only those, "mask" all of them, and then masks.

        recompute: of its activations a layer keeps its output alone, all others are one layer's, and backward runs the
        layer again.
        """
        self.ops, self.config, self.B, self.T = device, config, B, T
        self.band, self.kernel, self.recompute, self.ranks = band, kernel, recompute, ranks
        self.skip_fc1, self.skip_fc2 = 0, 0  # the bands outside which products skip: none until weights are masked
        place = band.place(config.C)
        self.place = None if place is None else device.to_device(place)  # where along FC1's band a hidden unit lies
        self.shapes = tensor_shapes(config)
        self.params_flat, self.params = flat_buffer(device, self.shapes, params)
        self.part = ranks.part(self.params_flat.size)  # what this rank updates
        self.replay = Replay(device)  # on a GPU forward, backward and update become a CUDA graph each
        self.acts = self.layers = self.grads_flat = self.m_flat = self.v_flat = self.decoder = None

    def layer_shapes(self, B: int, T: int, start: int = 0) -> dict[str, tuple[int, ...]]:
        """What a layer keeps for backward, over B x T new tokens behind `start` old ones."""
        N, C, NH = B * T, self.config.C, self.config.NH
        return {
            "ln1": (N, C),
            "ln1_mean": (N,),
            "ln1_rstd": (N,),
            "qkv": (B, start + T, 3 * C),  # a decoder's old rows, too
            "atty": (N, C),
            "lse": (B, NH, T),  # log of the sum of exp(score) over a query's keys
            "residual2": (N, C),  # behind attention
            "ln2": (N, C),
            "ln2_mean": (N,),
            "ln2_rstd": (N,),
            "fch": (N, 4 * C),
            "fch_gelu": (N, 4 * C),
            "residual3": (N, C),  # behind the MLP
        }

    def other_shapes(self) -> dict[str, tuple[int, ...]]:
        """What forward keeps outside the layers."""
        N, C = self.B * self.T, self.config.C
        return {
            "encoded": (N, C),
            "lnf": (N, C),
            "lnf_mean": (N,),
            "lnf_rstd": (N,),
            "logits": (N, self.config.Vp),
            "losses": (N,),
        }

    def activation_bytes(self, recompute: bool) -> int:
        """What forward keeps for backward, logits included."""
        own, shared = split(self.layer_shapes(self.B, self.T), KEPT if recompute else None)
        return 4 * (self.config.L * num_values(own) + num_values(shared) + num_values(self.other_shapes()))

    def allocate_activations(self) -> None:
        """The buffers of forward, at its first call."""
        B, T, N = self.B, self.T, self.B * self.T
        tell_allocated(self.activation_bytes(self.recompute), "activations")
        own, shared = split(self.layer_shapes(B, T), KEPT if self.recompute else None)
        shared = vars(allocate(self.ops, shared))
        self.layers = [SimpleNamespace(**shared, **vars(allocate(self.ops, own))) for _ in range(self.config.L)]
        for a in self.layers:
            a.rows = a.qkv.reshape(N, -1)  # (N,3C)
        self.acts = allocate(self.ops, self.other_shapes())
        self.inputs, self.targets = self.ops.zeros((B, T), np.int32), self.ops.zeros(N, np.int32)

    def mask_weights(self):
        """Zero the weights outside the bands. From then on products skip them, and gradients, m and v stay 0 there.

        With kernel "mask" nothing is skipped: products stay dense, every gradient and every update is masked. So it is
        with FC1 if its band lies in another order than the hidden units, which leaves no diagonal to multiply.
        """
        self.mask(self.params.fcw, self.params.fcprojw)
        skips = (0 if self.band.permute else self.band.fc1, self.band.fc2) if self.kernel == "band" else (0, 0)
        if skips != (self.skip_fc1, self.skip_fc2):
            self.skip_fc1, self.skip_fc2 = skips
            self.replay = Replay(self.ops)  # anew: a graph holds the products that it was made of

    def mask(self, fcw, fcprojw):
        """Zero what lies outside the bands, of weights or their gradients, where products have not skipped it.

        fcw (n,4C,C), fcprojw (n,C,4C): of some layers.
        """
        if self.band.fc1 != self.skip_fc1:
            self.ops.band_mask(fcw, self.band.fc1, self.place)
        if self.band.fc2 != self.skip_fc2:
            self.ops.band_mask(fcprojw, self.band.fc2)

    def forward(self, inputs: np.ndarray, targets: np.ndarray | None = None, grad_accum: int = 1) -> None:
        """inputs, targets (B,T) int32 -> logits; with targets, losses, which mean_loss fetches.

        With targets, the logits are overwritten by the gradient of loss / grad_accum, which backward starts from.
        """
        if self.acts is None:
            self.allocate_activations()
        self.ops.copy_in(self.inputs, inputs)
        if targets is not None:
            self.ops.copy_in(self.targets, targets.ravel())
        self.replay(self.launch_forward, targets is not None, grad_accum)
        if targets is not None:
            self.losses = self.ops.to_host_later(self.acts.losses)

    def launch_forward(self, has_targets: bool, grad_accum: int) -> None:
        """What forward does on the device."""
        ops, p, acts, L, N = self.ops, self.params, self.acts, self.config.L, self.B * self.T
        ops.encoder_forward(acts.encoded, self.inputs, p.wte, p.wpe)
        residual = acts.encoded  # (N,C)
        for l in range(L):
            self.layer(l, self.layers[l], residual, 0)
            residual = self.layers[l].residual3
        ops.layernorm_forward(acts.lnf, acts.lnf_mean, acts.lnf_rstd, residual, p.lnfw, p.lnfb)
        ops.matmul_forward(acts.logits, acts.lnf, p.wte)  # (N,Vp)
        if has_targets:
            ops.fused_classifier(acts.losses, acts.logits, self.targets, self.config.V, 1 / (N * grad_accum))

    def layer(self, l: int, a: SimpleNamespace, residual, start, again: bool = False) -> None:
        """One layer over the rows `residual` (N,C) at positions start.. -> a, as layer_shapes lists it.

        a.rows (N,3C): the new rows of a.qkv or, where `start` is an array (1), what is to become them. again: for the
        activations that layers share with --recompute; a.residual3 is there.
        """
        ops, p, NH = self.ops, self.params, self.config.NH
        ops.layernorm_forward(a.ln1, a.ln1_mean, a.ln1_rstd, residual, p.ln1w[l], p.ln1b[l])
        ops.matmul_forward(a.rows, a.ln1, p.qkvw[l], p.qkvb[l])
        if not isinstance(start, int):
            ops.append_rows(a.qkv, a.rows.reshape(1, *a.rows.shape), start)
        ops.attention_forward(a.atty, a.lse, a.qkv, NH, start)
        ops.matmul_forward(a.residual2, a.atty, p.attprojw[l], p.attprojb[l])
        ops.fused_residual_forward(
            a.residual2, a.ln2, a.ln2_mean, a.ln2_rstd, a.residual2, residual, p.ln2w[l], p.ln2b[l]
        )
        ops.band_matmul_forward(a.fch, a.ln2, p.fcw[l], p.fcb[l], self.skip_fc1)
        ops.gelu_forward(a.fch_gelu, a.fch)
        if not again:
            ops.band_matmul_forward(a.residual3, a.fch_gelu, p.fcprojw[l], p.fcprojb[l], self.skip_fc2)
            ops.residual_forward(a.residual3, a.residual3, a.residual2)

    def mean_loss(self) -> float:
        """The loss of the last forward with targets; waits for that, not for what was begun since."""
        return float(self.losses().mean())

    def allocate_gradients(self) -> None:
        """The buffers of backward, at its first call."""
        B, T, C = self.B, self.T, self.config.C
        tell_allocated(self.params_flat.nbytes, "parameter gradients")
        self.grads_flat, self.grads = flat_buffer(self.ops, self.shapes)
        self.added_to = all_but(WRITTEN, self.grads_flat, self.shapes)
        shapes = {"residual": (B * T, C), "btc": (B * T, C), "qkv": (B, T, 3 * C), "bt4c": (B * T, 4 * C)}
        tell_allocated(4 * num_values(shapes), "activation gradients")
        self.dacts = allocate(self.ops, shapes)

    def backward(self, first: bool = True, last: bool = True) -> None:
        """Gradients of the last forward's loss; the `first` micro-step of an update starts them, later ones add.

        In the `last` one those of a layer may begin to add up over ranks as soon as they are there.
        """
        if self.grads_flat is None:
            self.allocate_gradients()
        self.replay(self.launch_backward, first, last and self.ranks.overlaps)

    def launch_backward(self, first: bool, begins: bool) -> None:
        """What backward does on the device."""
        ops, p, acts, L, NH = self.ops, self.params, self.acts, self.config.L, self.config.NH
        g, d, beta = self.grads, self.dacts, 0 if first else 1
        if first:
            for grads in self.added_to:
                grads.fill(0)
        d.residual.fill(0)  # (N,C)
        dqkv = d.qkv.reshape(self.B * self.T, -1)  # (N,3C)

        ops.matmul_backward(d.btc, g.wte, None, acts.logits, acts.lnf, p.wte, beta)
        residual = self.layers[L - 1].residual3
        ops.layernorm_backward(d.residual, g.lnfw, g.lnfb, d.btc, residual, p.lnfw, acts.lnf_mean, acts.lnf_rstd)
        for l in reversed(range(L)):
            a, residual = self.layers[l], self.layers[l - 1].residual3 if l > 0 else acts.encoded
            if self.recompute and l < L - 1:  # the last layer's are still there
                self.layer(l, a, residual, 0, again=True)
            fcw, fcprojw, skip1, skip2 = p.fcw[l], p.fcprojw[l], self.skip_fc1, self.skip_fc2
            ops.band_matmul_backward(d.bt4c, g.fcprojw[l], g.fcprojb[l], d.residual, a.fch_gelu, fcprojw, skip2, beta)
            ops.gelu_backward(d.bt4c, a.fch, d.bt4c)
            ops.band_matmul_backward(d.btc, g.fcw[l], g.fcb[l], d.bt4c, a.ln2, fcw, skip1, beta)
            ops.layernorm_backward(
                d.residual, g.ln2w[l], g.ln2b[l], d.btc, a.residual2, p.ln2w[l], a.ln2_mean, a.ln2_rstd
            )
            ops.matmul_backward(d.btc, g.attprojw[l], g.attprojb[l], d.residual, a.atty, p.attprojw[l], beta)
            ops.attention_backward(d.qkv, d.btc, a.qkv, a.atty, a.lse, NH)
            ops.matmul_backward(d.btc, g.qkvw[l], g.qkvb[l], dqkv, a.ln1, p.qkvw[l], beta)
            ops.layernorm_backward(d.residual, g.ln1w[l], g.ln1b[l], d.btc, residual, p.ln1w[l], a.ln1_mean, a.ln1_rstd)
            self.mask(g.fcw[l : l + 1], g.fcprojw[l : l + 1])
            if begins:
                ops.all_reduce_begin(self.grads_flat, matrices_of(l, g, self.config), self.ranks)
        ops.encoder_backward(g.wte, g.wpe, d.residual, self.inputs)

    def update(self, t, lr, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, decay_all=True, grad_clip=0.0):
        """AdamW update number t = 1, 2, ...; returns the gradient norm if grad_clip > 0, else None."""
        if self.m_flat is None:
            self.allocate_moments()
        decays = weight_decay, weight_decay if decay_all else 0.0  # of the matrices, of all other tensors
        rates = [adamw_rates(t, lr, beta1, beta2, eps, decay, grad_clip) for decay in decays]
        self.ops.copy_in(self.rates, np.array(rates, self.rates.dtype))
        if grad_clip and self.ranks.zero:
            self.gradient_norm()
        self.replay(self.launch_update, grad_clip > 0)
        self.ops.all_gather(self.params_flat, self.ranks)
        if self.ranks.zero:
            self.mask_weights()
        return float(self.ops.to_host(self.norm)[0]) if grad_clip else None

    def gradient_norm(self) -> float:
        """The norm of the gradient, which update limits, over the parts of all ranks."""
        if self.m_flat is None:
            self.allocate_moments()
        self.ops.global_norm(self.norm, self.grads_flat[self.part])
        norm = self.ranks.norm(float(self.ops.to_host(self.norm)[0]))
        self.ops.copy_in(self.norm, np.array([norm], self.norm.dtype))
        return norm

    def launch_update(self, clips: bool) -> None:
        """What update does on the device."""
        ops, zero, part, m, v = self.ops, self.ranks.zero, self.part, self.m_flat, self.v_flat
        if clips and not zero:
            ops.global_norm(self.norm, self.grads_flat)
        params, grads = vars(self.params), vars(self.grads)
        bands = {} if zero else {"fcw": self.skip_fc1, "fcprojw": self.skip_fc2}  # a rank's part may cut a band
        updates = []  # all at once
        for name in self.shapes:
            row = 0 if name in MATRICES else 1
            if bands.get(name):
                moments = vars(self.m)[name], vars(self.v)[name]
                ops.band_adamw_update(params[name], grads[name], *moments, bands[name], self.rates[row], self.norm)
            updates.append((params[name], grads[name], None if bands.get(name) else row))
        updates = in_part(updates, part, m, v)
        ops.adamw_update_all(self.params_flat, self.grads_flat[part], m, v, updates, self.rates, self.norm)
        if not zero:  # else there is more to come
            self.mask_weights()

    def allocate_moments(self, m: np.ndarray | None = None, v: np.ndarray | None = None) -> None:
        """AdamW's m and v: a checkpoint's, or zeros."""
        size = self.part.stop - self.part.start
        for name in ("m", "v"):
            tell_allocated(4 * size, f"AdamW optimizer state {name}")
        self.m_flat, self.v_flat = (self.ops.zeros(size) if x is None else self.ops.to_device(x) for x in (m, v))
        if not self.ranks.zero:
            self.m, self.v = (SimpleNamespace(**named_views(x, self.shapes)) for x in (self.m_flat, self.v_flat))
        self.rates, self.norm = self.ops.zeros((2, RATES)), self.ops.zeros(1)  # AdamW's, and of the gradient

    def extend(self, tokens: np.ndarray, start: int) -> np.ndarray:
        """Logits (V) after `tokens` (n) int32 at positions start.., of which earlier calls ran 0..start-1.

        Queries, keys and values of all positions are kept, so a token costs its own row of the forward pass only.
        """
        if self.decoder is None:
            self.allocate_decoder()
        ops, d, n = self.ops, self.decoder, len(tokens)
        ops.copy_in(d.tokens[:, :n], tokens.reshape(1, n))
        ops.copy_in(d.start, np.array([start], np.int32))
        if n == 1:
            self.replay(self.launch_extend, 1, None)  # the position comes from memory: one graph for all
        else:
            self.launch_extend(n, start)
        return ops.to_host(d.logits)[0, : self.config.V]

    def allocate_decoder(self) -> None:
        """Buffers for a text of all positions: queries, keys and values by layer, all other activations shared."""
        C, Vp, L, maxT = self.config.C, self.config.Vp, self.config.L, self.config.maxT
        once = {"encoded": (maxT, C), "rows": (1, 3 * C), "lnf": (1, C), "lnf_mean": (1,), "lnf_rstd": (1,)}
        once |= {"qkv": (L, 1, maxT, 3 * C), "logits": (1, Vp), "tokens": (1, maxT), "start": (1,)}
        self.decoder = allocate(self.ops, self.layer_shapes(1, maxT) | once, ("tokens", "start"))

    def launch_extend(self, n: int, start) -> None:
        """What extend does on the device; start: None for one token, whose position is in self.decoder.start."""
        ops, p, d = self.ops, self.params, self.decoder
        start = d.start if start is None else start
        residual, shapes = d.encoded[:n], self.layer_shapes(1, n)
        ops.encoder_forward(residual, d.tokens[:, :n], p.wte, p.wpe, start)
        for l in range(self.config.L):
            a, kept = first_of(d, shapes), d.qkv[l]  # (1,maxT,3C)
            a.qkv, a.rows = (kept, d.rows) if n == 1 else (kept[:, : start + n], kept[0, start : start + n])
            self.layer(l, a, residual, start)
            residual = a.residual3
        ops.layernorm_forward(d.lnf, d.lnf_mean, d.lnf_rstd, residual[n - 1 :], p.lnfw, p.lnfb)
        ops.matmul_forward(d.logits, d.lnf, p.wte)


# ----------------------------------------------------------------------------------------------------------------------
# the loop


def save(args: Namespace, batch: Shares, step: int, run: loop.Run):
    """Write the checkpoint, bands in its header, and the optimizer state for a run that goes on at `step`."""
    model = batch.models[0]
    kind, fields = model.band.header()
    params, m, v = map(model.ops.to_host, (model.params_flat, model.m_flat, model.v_flat))
    loop.save(args, batch, Model(model.config, params, step, kind=kind, fields=fields), m, v, run)


def main(argv: list[str] | None = None) -> int:
    warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's, for losses that overflow: reported below, once
    ranks = open_ranks()
    args, typed, file, state = options.parse_options(arguments(), argv, "train_banded.py", ranks)
    band = choose_band(args, typed, file)
    config, B, T, grad_accum = file.config, args.batch_size, args.seq_len, args.grad_accum
    device = kernels.open_device(args.device, args.tf32, args.graph, ranks)
    run = loop.open_run(args, config, state, ranks)
    start, steps = run.start, run.steps

    table.heading()
    print_band(args, band)
    options.print_options(args)
    options.print_model(device.describe(), device.tf32, config)
    print_masks(args, config, band)
    options.print_workload(steps, run.val_batches, ranks)

    tell_allocated(file.params.nbytes, "model parameters")
    rows = [B] if ranks.size > 1 else share_rows(device, B, T, config.C, file.params.size)
    more = band, args.kernel, args.recompute, ranks
    batch = Shares(device, rows, lambda device, B: GPT2(device, config, file.params, B, T, *more))
    model = batch.models[0]
    if state:
        model.allocate_moments(state.m, state.v)
        print(f"Resuming from step {start} (shard {state.shard}, sample {state.sample})")
    if state or args.mask_init:
        for each in batch.models:
            each.mask_weights()
    schedule = dict(lr=args.lr, warmup=args.warmup, steps=steps, final_frac=args.final_lr_frac)
    adamw = dict(beta2=args.beta2, weight_decay=args.weight_decay, decay_all=args.decay_all, grad_clip=args.grad_clip)

    seconds, before = 0.0, device.memory_used()
    with Interrupt() as interrupt, run.watch(args, batch.memory_used):
        for step in range(start, steps + 1):
            last_step = step == steps
            if run.stops(interrupt) and not last_step:
                if args.checkpoint and step > start:
                    save(args, batch, step, run)
                break
            if step == 0 or last_step or loop.due(args.val_every, step):
                loop.validate(batch, run, step, args)
            if args.recompute and step == start:
                loop.print_memory(batch.models, device.memory_used() - before)
            if loop.saves(args, run, step, last_step):
                save(args, batch, step, run)
            if args.sample_every and step > 0 and (last_step or loop.due(args.sample_every, step)):
                loop.print_sample(model, run, args.sample_tokens)
            if last_step:
                break

            started = loop.begin_step(args, run)
            loss = 0.0
            for micro_step in range(grad_accum):
                batch.forward(*run.train_loader.next_batch(), grad_accum * ranks.size)
                batch.backward(first=micro_step == 0, last=micro_step == grad_accum - 1)
                loss += batch.mean_loss() / grad_accum
            loop.wait_for_all(args, device, run, started)
            device.all_reduce(model.grads_flat, ranks)
            loss = ranks.mean(loss)
            loop.check_finite("train", loss, step + 1, args)
            lr = learning_rate(args.lr_schedule, step, **schedule)
            skips = loop.spiked(args, run, loss, model.gradient_norm)
            norm = None if skips else model.update(step + 1, lr, **adamw)
            seconds += loop.print_step(args, device, config, run, step, loss, started, lr, norm)

    loop.print_end(args, device, run, step, last_step, seconds)
    return interrupt.exit_code  # 0, but after a signal during the last step


if __name__ == "__main__":
    errors.run(main)
