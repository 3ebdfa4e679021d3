"""Train GPT-2 with MLP weights limited to a diagonal band.

    make train_banded                                          # data, model, a short run (2 minutes on a laptop)
    python train_banded.py -e model.bin -w 256 -n 2000         # experiment 00007: FC1 banded
    python train_banded.py -e model.bin -1 0 -2 256 -n 5000    # experiment 00009: FC1 and FC2 apart, here FC2 only

Reads top to bottom as train_gpt2_fp32.cu does: options, model (views, forward, backward, update), loop. What differs
from GPT-2 is the band: FC1 weights fcw (4C,C) and FC2 weights fcprojw (C,4C) keep only |j - 4i| <= bandwidth / 2, with
channel i and hidden unit j; masked are the initial weights, their gradients, and the weights after every update.
"""

import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

import kernels
from llmc import table
from llmc.checkpoint import (
    BANDED,
    DENSE,
    MATRICES,
    GPT2Config,
    Model,
    named_views,
    num_parameters,
    read_model,
    state_path,
    tensor_shapes,
    write_model,
)
from llmc.cli import ArgumentParser
from llmc.dataloader import DataLoader
from llmc.errors import UserError, run
from llmc.interrupt import Interrupt
from llmc.logger import Logger
from llmc.sampler import Sampler, sample_logits
from llmc.schedulers import SCHEDULES, learning_rate
from llmc.state import TrainState, read_state, write_state
from llmc.tokenizer import Tokenizer, find_tokenizer

# ----------------------------------------------------------------------------------------------------------------------
# the model


class GPT2:
    """GPT-2 on a device: parameters, gradients, m and v are one flat float32 buffer each, with a view per tensor."""

    def __init__(self, device, config: GPT2Config, params: np.ndarray, B: int, T: int, fc1_bandwidth=0, fc2_bandwidth=0):
        self.ops, self.config, self.B, self.T = device, config, B, T
        self.fc1_bandwidth, self.fc2_bandwidth = fc1_bandwidth, fc2_bandwidth  # 0 = dense
        self.shapes = tensor_shapes(config)
        self.params_flat, self.params = self._buffer(device.to_device(params))
        self.grads_flat = self.m_flat = self.v_flat = self.acts = self.decoder = None

    def _buffer(self, flat=None):
        """A flat buffer of all parameters' size (zeros if none is given) and its views by name."""
        if flat is None:
            flat = self.ops.zeros(num_parameters(self.config))
        return flat, SimpleNamespace(**named_views(flat, self.shapes))

    def _allocate(self, what: str, shapes: dict) -> SimpleNamespace:
        total = sum(map(math.prod, shapes.values())) * 4
        print(f"allocated {total >> 20} MiB for {what}")
        return SimpleNamespace(**{name: self.ops.zeros(shape) for name, shape in shapes.items()})

    def mask_weights(self):
        """Zero the weights outside the bands."""
        self._mask(self.params)

    def _mask(self, tensors):
        if self.fc1_bandwidth:
            self.ops.band_mask(tensors.fcw, self.fc1_bandwidth)
        if self.fc2_bandwidth:
            self.ops.band_mask(tensors.fcprojw, self.fc2_bandwidth)

    def forward(self, inputs: np.ndarray, targets: np.ndarray | None = None, grad_accum: int = 1) -> float | None:
        """inputs, targets (B,T) int32 -> mean loss (None without targets).

        With targets, the logits are overwritten by their gradient for the loss / grad_accum, which backward starts from.
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
        a = self.acts
        ops.encoder_forward(a.encoded, inputs, p.wte, p.wpe)
        residual = a.encoded  # (N,C)
        for l in range(L):
            ops.layernorm_forward(a.ln1[l], a.ln1_mean[l], a.ln1_rstd[l], residual, p.ln1w[l], p.ln1b[l])
            ops.matmul_forward(a.qkv[l].reshape(N, 3 * C), a.ln1[l], p.qkvw[l], p.qkvb[l])
            ops.attention_forward(a.atty[l], a.lse[l], a.qkv[l], NH)
            ops.matmul_forward(a.residual2[l], a.atty[l], p.attprojw[l], p.attprojb[l])
            ops.residual_forward(a.residual2[l], a.residual2[l], residual)
            ops.layernorm_forward(a.ln2[l], a.ln2_mean[l], a.ln2_rstd[l], a.residual2[l], p.ln2w[l], p.ln2b[l])
            ops.matmul_forward(a.fch[l], a.ln2[l], p.fcw[l], p.fcb[l])
            ops.gelu_forward(a.fch_gelu[l], a.fch[l])
            ops.matmul_forward(a.residual3[l], a.fch_gelu[l], p.fcprojw[l], p.fcprojb[l])
            ops.residual_forward(a.residual3[l], a.residual3[l], a.residual2[l])
            residual = a.residual3[l]
        ops.layernorm_forward(a.lnf, a.lnf_mean, a.lnf_rstd, residual, p.lnfw, p.lnfb)
        ops.matmul_forward(a.logits, a.lnf, p.wte)  # (N,Vp)
        if targets is None:
            return None
        self.inputs = inputs
        ops.fused_classifier(a.losses, a.logits, targets.ravel(), self.config.V, 1 / (N * grad_accum))
        return float(ops.to_host(a.losses).mean())

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
            ops.matmul_backward(d.bt4c, g.fcprojw[l], g.fcprojb[l], d.residual, a.fch_gelu[l], p.fcprojw[l], beta)
            ops.gelu_backward(d.bt4c, a.fch[l], d.bt4c)
            ops.matmul_backward(d.btc, g.fcw[l], g.fcb[l], d.bt4c, a.ln2[l], p.fcw[l], beta)
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
        self._mask(g)

    def update(self, t, lr, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, decay_all=True, grad_clip=0.0):
        """AdamW update number t = 1, 2, ...; returns the gradient norm if grad_clip > 0, else None."""
        if self.m_flat is None:
            self.allocate_moments()
        norm = self.ops.global_norm(self.grads_flat) if grad_clip else None
        scale = grad_clip / norm if grad_clip and norm > grad_clip else 1.0
        for name in self.shapes:
            tensors = (getattr(buffer, name) for buffer in (self.params, self.grads, self.m, self.v))
            decay = weight_decay if decay_all or name in MATRICES else 0.0
            self.ops.adamw_update(*tensors, t, lr, beta1, beta2, eps, decay, scale)
        self.mask_weights()
        return norm

    def allocate_moments(self):
        for name in ("m", "v"):
            print(f"allocated {self.params_flat.nbytes >> 20} MiB for AdamW optimizer state {name}")
        self.m_flat, self.m = self._buffer()
        self.v_flat, self.v = self._buffer()

    def extend(self, tokens: np.ndarray, start: int) -> np.ndarray:
        """Logits (V) after `tokens` (n) int32 at positions start.., of which earlier calls ran 0..start-1.

        Queries, keys and values of all positions are kept, so a token costs its own row of the forward pass only.
        """
        ops, p, L, NH, C = self.ops, self.params, self.config.L, self.config.NH, self.config.C
        maxT, n, end = self.config.maxT, len(tokens), start + len(tokens)
        if self.decoder is None:
            shapes = dict(x=(maxT, C), y=(maxT, C), mean=(maxT,), rstd=(maxT,), lse=(NH * maxT,), fch=(maxT, 4 * C))
            shapes |= dict(qkv=(L, 1, maxT, 3 * C), logits=(1, self.config.Vp))
            self.decoder = SimpleNamespace(**{name: ops.zeros(shape) for name, shape in shapes.items()})
        a = self.decoder
        x, y, mean, rstd, fch = (array[:n] for array in (a.x, a.y, a.mean, a.rstd, a.fch))
        lse = a.lse[: NH * n].reshape(1, NH, n)
        ops.encoder_forward(x, tokens.reshape(1, n), p.wte, p.wpe, start)
        for l in range(L):
            ops.layernorm_forward(y, mean, rstd, x, p.ln1w[l], p.ln1b[l])
            ops.matmul_forward(a.qkv[l, 0, start:end], y, p.qkvw[l], p.qkvb[l])
            ops.attention_forward(y, lse, a.qkv[l, :, :end], NH, start)
            ops.matmul_forward(fch[:, :C], y, p.attprojw[l], p.attprojb[l])
            ops.residual_forward(x, x, fch[:, :C])
            ops.layernorm_forward(y, mean, rstd, x, p.ln2w[l], p.ln2b[l])
            ops.matmul_forward(fch, y, p.fcw[l], p.fcb[l])
            ops.gelu_forward(fch, fch)
            ops.matmul_forward(y, fch, p.fcprojw[l], p.fcprojb[l])
            ops.residual_forward(x, x, y)
        ops.layernorm_forward(y[-1:], mean[-1:], rstd[-1:], x[-1:], p.lnfw, p.lnfb)
        ops.matmul_forward(a.logits, y[-1:], p.wte)
        return ops.to_host(a.logits)[0, : self.config.V]
