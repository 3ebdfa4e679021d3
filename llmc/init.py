"""GPT-2's random initialisation (llm.c train_gpt2.py _init_weights), drawn with NumPy's generator."""

import numpy as np

from llmc.checkpoint import MATRICES, GPT2Config, named_views, num_parameters, tensor_shapes

STD = 0.02
RESIDUAL_PROJECTIONS = ("attprojw", "fcprojw")
LAYERNORM_WEIGHTS = ("ln1w", "ln2w", "lnfw")


def gpt2_init(config: GPT2Config, seed: int) -> np.ndarray:
    """All parameters of a fresh GPT-2, flat float32 in file order; nothing but this one array is allocated.

    Matrices ~ N(0, 0.02), those that write to the residual stream ~ N(0, 0.02 / sqrt(2 L)), layernorm weights 1,
    biases 0, and 0 for the rows of wte beyond V. Drawn from numpy.random.default_rng(seed) in file order, each matrix
    over all layers at once, so a seed gives the same model everywhere. llm.c's Python and CUDA programs draw the
    same distribution from PyTorch's generator, layer by layer.
    """
    params = np.zeros(num_parameters(config), np.float32)
    views = named_views(params, tensor_shapes(config))
    generator = np.random.default_rng(seed)
    for name in MATRICES:
        std = STD / np.sqrt(2 * config.L) if name in RESIDUAL_PROJECTIONS else STD
        generator.standard_normal(dtype=np.float32, out=views[name])
        views[name] *= np.float32(std)
    views["wte"][config.V :] = 0  # llm.c never masks the padded logits when it forms gradients
    for name in LAYERNORM_WEIGHTS:
        views[name][...] = 1
    return params
