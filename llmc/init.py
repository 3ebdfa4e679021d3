"""Random initialisation, drawn with NumPy's generator: GPT-2's (llm.c train_gpt2.py _init_weights), and that of models
with DeepSeek's MLA or MoE (the published sparse-attention experiments: all matrices N(0, 0.02), whatever the depth)."""

import numpy as np

from llmc.checkpoint import MATRICES, DeepSeekConfig, GPT2Config, named_views, num_parameters, tensor_shapes

STD = 0.02
RESIDUAL_PROJECTIONS = ("attprojw", "fcprojw")
NORM_WEIGHTS = ("ln1w", "ln2w", "lnfw", "qnw", "kvnw")
PADDED = ("wte", "headw")


def gpt2_init(config: GPT2Config, seed: int) -> np.ndarray:
    """All parameters of a fresh model, flat float32 in file order; nothing but this one array is allocated.

    Matrices ~ N(0, 0.02), those that write to a GPT-2's residual stream ~ N(0, 0.02 / sqrt(2 L)), norm weights 1,
    biases 0, and 0 for the rows of wte and headw beyond V. Drawn from numpy.random.default_rng(seed) in file order,
    each matrix over all layers at once, so a seed gives the same model everywhere. llm.c's Python and CUDA programs
    draw the same distribution from PyTorch's generator, layer by layer.
    """
    params = np.zeros(num_parameters(config), np.float32)
    views = named_views(params, tensor_shapes(config))
    scaled = () if isinstance(config, DeepSeekConfig) else RESIDUAL_PROJECTIONS
    generator = np.random.default_rng(seed)
    for name in views:
        if name in MATRICES:
            std = STD / np.sqrt(2 * config.L) if name in scaled else STD
            generator.standard_normal(dtype=np.float32, out=views[name])
            views[name] *= np.float32(std)
        elif name in NORM_WEIGHTS:
            views[name][...] = 1
        if name in PADDED:
            views[name][config.V :] = 0  # llm.c never masks the padded logits when it forms gradients
    return params
