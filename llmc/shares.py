"""A batch shared out to threads: each runs forward and backward of its rows alone, the gradients are added at the end.

What a small model's step waits for on a CPU is not arithmetic: two BLAS threads meet at every product, and most of what
lies between products is too short to be cut up. Threads that meet twice a step wait for nothing, and every product and
pass of a share fits its core's cache better. It costs a buffer of gradients for every share but the first.
"""

import numpy as np

from llmc.buffers import told_together

# measured on 2 cores, C from 64 to 768, V from 65 to 50257, 64 to 2048 tokens, against one share, whose products have
# two BLAS threads. by tokens times channels of a share: 4096 0.56 and 0.72 times as fast, 8192 0.82, 16384 0.90 to
# 0.97, 32768 1.07 to 1.28, more 1.02 to 1.23. by parameters for a token of a share: 84,000 1.06, 330,000 1.02, 400,000
# 0.91, 970,000 0.98
VALUES = 1 << 15  # tokens times channels of a share: below it threads wait for the interpreter more than they work
PARAMETERS = 1 << 17  # of the model for a token of a share: each share writes all their gradients


def share_rows(device, B: int, T: int, C: int, num_params: int) -> list[int]:
    """How many of B rows of T tokens each share has: about as many each core's, or all of them one share.

    The only place that decides; by sizes and the number of cores, so that a command gives the same bits every time.
    """
    shares = min(device.num_shares(), B)
    tokens = B * T // shares
    if tokens * C < VALUES or num_params > PARAMETERS * tokens:
        shares = 1
    return [B * (k + 1) // shares - B * k // shares for k in range(shares)]


class Shares:
    """Models with the same parameters, each for its rows of a batch; the first one's gradients are those of all.

    models: as in llmc.loop, and allocate_activations, allocate_gradients; one alone is called in place.
    """

    def __init__(self, models: list):
        self.models, self.B = models, sum(model.B for model in models)
        ends = np.cumsum([model.B for model in models]).tolist()
        self.rows = [slice(end - model.B, end) for model, end in zip(models, ends)]

    def split(self, *arrays: np.ndarray):
        """(model, its rows of each array) for each share."""
        return [(model, *(array[rows] for array in arrays)) for model, rows in zip(self.models, self.rows)]

    def side_by_side(self, work) -> None:
        """work(k) for the k-th share, all at the same time."""
        self.models[0].ops.side_by_side(work, len(self.models))

    def forward(self, inputs: np.ndarray, targets: np.ndarray | None = None, grad_accum: int = 1, **phase) -> None:
        """As the model's: inputs, targets (B,T). The mean is over all B rows."""
        with told_together():
            for model in self.models:
                if model.acts is None:
                    model.allocate_activations()

        def share(k):
            model, rows = self.models[k], self.rows[k]
            wanted = None if targets is None else targets[rows]
            model.forward(inputs[rows], wanted, grad_accum * self.B / model.B, **phase)

        self.side_by_side(share)

    def backward(self, first: bool = True, *stages: bool, **phase) -> None:
        """As the model's, then the sum of all shares' gradients."""
        with told_together():
            for model in self.models:
                if model.grads_flat is None:
                    model.allocate_gradients()

        def share(k):
            model, own = self.models[k], dict(phase)
            if "grad_accum" in phase:
                own["grad_accum"] *= self.B / model.B
            model.backward(first if k == 0 else True, *stages, **own)

        self.side_by_side(share)
        total, *others = (model.grads_flat for model in self.models)
        if others:
            size, shares = len(total), len(self.models)

            def add_up(k):
                part = slice(size * k // shares, size * (k + 1) // shares)
                for grads in others:
                    total[part] += grads[part]

            self.side_by_side(add_up)

    def mean(self, of) -> float:
        """The mean over all rows of of(model), a mean over its rows."""
        return sum(of(model) * model.B for model in self.models) / self.B

    def mean_loss(self) -> float:
        """As the model's, over all rows."""
        return self.mean(lambda model: model.mean_loss())
