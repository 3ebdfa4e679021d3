"""AdamW on banded weights: gradient and moments are zero outside the band, as the weights are, so it stays as it is."""

from kernels.cpu.band.band_matmul import blocks_of_band
from kernels.cpu.blocks import for_blocks
from kernels.cpu.gpt2.adamw import adamw_update, update_views

CHANNELS = 32  # channels in a block of the weight
PAYS = 0.5  # share of the weight from which on visiting all of it is as fast as visiting blocks


def band_adamw_update(params, grads, m, v, bandwidth, rates, norm):
    """adamw_update for banded weights (L,OC,C), whose values outside the band, zero in all four, are not visited."""
    _, OC, C = params.shape
    blocks = blocks_of_band(OC, C, bandwidth, CHANNELS)
    if sum((r.stop - r.start) * (c.stop - c.start) for r, c in blocks) > PAYS * OC * C:
        adamw_update(params, grads, m, v, rates, norm)
        return

    def some(start, stop):
        for rows, columns in blocks[start:stop]:
            views = [array[:, rows, columns] for array in (params, grads, m, v)]
            update_views(views, rates, norm)

    for_blocks(some, len(blocks), 1, params.size // len(blocks))
