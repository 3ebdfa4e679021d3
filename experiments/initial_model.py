"""Change the initial weights of a model file in ways that an experiment asks for.

    python data/create_model.py --vocab byte -o byte.bin
    python experiments/initial_model.py -e byte.bin -o narrow.bin --hidden 225             # a narrower dense MLP
    python experiments/initial_model.py -e byte.bin -o upstream.bin --residual unscaled --biases uniform

A hidden unit whose weights and bias are 0 on both sides stays so: gelu(0) = 0 gives its output weights no gradient, and
these, being 0, give none to its input weights. So a file with zeros from unit F on is an MLP of F units to train.

--residual unscaled undoes GPT-2's 1 / sqrt(2 L) for the projections that write to the residual stream, and --biases
uniform draws the biases of all products from U(-1/sqrt(n), 1/sqrt(n)) for n inputs, PyTorch's default: as the models of
experiments 00007 to 00009 were made.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))  # so that it runs from any folder
if __name__ == "__main__":
    from llmc import startup

    startup.begin()

from pathlib import Path

import numpy as np

from llmc.checkpoint import Model, named_views, read_model, tensor_shapes, write_model
from llmc.cli import ArgumentParser, natural, seed
from llmc.errors import UserError, run
from llmc.init import RESIDUAL_PROJECTIONS
from llmc.rand import normals

BIASES = {"qkvb": "qkvw", "attprojb": "attprojw", "fcb": "fcw", "fcprojb": "fcprojw"}  # each of the product by


def narrow(file: Model, hidden: int) -> None:
    """Zero all weights of the hidden units from number `hidden` on, in place."""
    weights = named_views(file.params, tensor_shapes(file.config))
    weights["fcw"][:, hidden:] = 0  # (L,4C,C)
    weights["fcb"][:, hidden:] = 0  # (L,4C)
    weights["fcprojw"][:, :, hidden:] = 0  # (L,C,4C)


def unscale_residual(file: Model) -> None:
    """Multiply the residual projections by sqrt(2 L), in place: N(0, 0.02) as all other matrices."""
    weights = named_views(file.params, tensor_shapes(file.config))
    for name in RESIDUAL_PROJECTIONS:
        weights[name] *= np.float32(np.sqrt(2 * file.config.L))


def draw_biases(file: Model, number: int) -> None:
    """Biases of all products ~ U(-1/sqrt(n), 1/sqrt(n)), n inputs, in place."""
    weights = named_views(file.params, tensor_shapes(file.config))
    generator = normals(number)
    for name, matrix in BIASES.items():
        most = 1 / np.sqrt(weights[matrix].shape[-1])
        weights[name][...] = generator.uniform(-most, most, weights[name].shape)


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("-e", "--model", required=True, help="model file to start from, a GPT-2's")
    add("-o", "--output", type=Path, required=True, help="model file to write")
    add("--hidden", type=natural, help="hidden units of the MLP (default: all 4C)")
    add("--residual", choices=("scaled", "unscaled"), default="scaled", help="residual projections, by 1 / sqrt(2 L)")
    add("--biases", choices=("zero", "uniform"), default="zero", help="of the products")
    add("--seed", type=seed, default=1, help="of the biases")
    args = parser.parse(argv)
    file = read_model(args.model)
    if args.hidden is not None and args.hidden > 4 * file.config.C:
        raise UserError(f"--hidden {args.hidden}: {args.model} has {4 * file.config.C} hidden units", exit_code=2)
    if args.residual == "unscaled":
        unscale_residual(file)
    if args.biases == "uniform":
        draw_biases(file, args.seed)
    if args.hidden is not None:
        narrow(file, args.hidden)
    write_model(args.output, file)
    print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    run(main)
