"""Residual connection (llm.c residual_forward). Its backward is the identity for both inputs."""

import numpy as np


def residual_forward(out, inp1, inp2):
    """out = inp1 + inp2, all (N,C); out may be one of the inputs."""
    np.add(inp1, inp2, out=out)
