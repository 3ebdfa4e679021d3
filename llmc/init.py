"""Random initialisation: GPT-2's (llm.c train_gpt2.py _init_weights), and that of models
with DeepSeek's MLA or MoE (the published sparse-attention experiments: all matrices N(0, 0.02), whatever the depth)."""

import numpy as np

from llmc.checkpoint import MATRICES, DeepSeekConfig, GPT2Config, named_views, num_parameters, tensor_shapes
from llmc.rand import normals

STD = 0.02
BLOCK = 1 << 20  # values drawn at a time, in float64
RESIDUAL_PROJECTIONS = ("attprojw", "fcprojw")
NORM_WEIGHTS = ("ln1w", "ln2w", "lnfw", "qnw", "kvnw")
PADDED = ("wte", "headw")


def gpt2_init(config: GPT2Config, seed: int) -> np.ndarray:
    """All parameters of a fresh model, flat float32 in file order; beside it 8 MiB are allocated.

    Matrices ~ N(0, 0.02), those that write to a GPT-2's residual stream ~ N(0, 0.02 / sqrt(2 L)), norm weights 1,
    biases 0, and 0 for the rows of wte and headw beyond V. Drawn from llmc.rand.normals(seed) in file order, each
    matrix over all layers at once, so a seed gives the same model everywhere. llm.c's Python and CUDA programs draw the
    same distribution from PyTorch's generator, layer by layer.
    """
    params = np.zeros(num_parameters(config), np.float32)
    views = named_views(params, tensor_shapes(config))
    scaled = () if isinstance(config, DeepSeekConfig) else RESIDUAL_PROJECTIONS
    generator = normals(seed)
    for name in views:
        if name in MATRICES:
            std = STD / np.sqrt(2 * config.L) if name in scaled else STD
            values = views[name].reshape(-1)
            for start in range(0, values.size, BLOCK):
                block = values[start : start + BLOCK]
                block[...] = std * generator.standard_normal(block.size)
        elif name in NORM_WEIGHTS:
            views[name][...] = 1
        if name in PADDED:
            views[name][config.V :] = 0  # llm.c never masks the padded logits when it forms gradients
    return params
