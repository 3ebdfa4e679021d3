"""Which row of the experts' activations every token's work goes to: a counting sort of the assignments by expert.

Token n's j-th expert is assignment n * top + j. An expert's rows follow one another, in the order of the tokens, and
fill whole tiles: products are over tiles of one shape, whatever the number of tokens that chose an expert, and so what
a token gets does not depend, even in the last bit, on which experts others chose. Rows that fill a tile up are padding.
"""

import numpy as np

TILE = 64  # rows, where there are as many tokens


def expert_rows(N, top, E):
    """(rows, tile): rows that the assignments of N tokens to `top` of E experts each may take, at most, and of a tile.

    Both follow from these numbers alone. tile is a power of 2, 64 from 64 tokens on; rows is a multiple of tile.
    """
    tile = TILE
    while tile > N:
        tile //= 2
    assignments = N * top
    most = assignments + min(E, assignments) * (tile - 1)  # every expert that has a row may have one in its last tile
    return most // tile * tile, tile


def expert_plan(slot, source, tile_expert, load, experts):
    """slot (N,top), source (rows), tile_expert (rows/tile), load (E) from experts (N,top), all int32.

    slot[n,j]: the row of an assignment. source[row]: its assignment, -1 for padding. tile_expert: the expert of a tile,
    ascending, -1 for the tiles after the last that is used. load[e]: assignments of expert e. rows, tile: expert_rows.
    """
    tile, assigned, E = len(source) // len(tile_expert), experts.reshape(-1), len(load)
    load[...] = np.bincount(assigned, minlength=E)
    tiles = -(-load // tile)
    start = (np.cumsum(tiles) - tiles) * tile  # row of an expert's first assignment
    first = np.cumsum(load) - load  # its place among the sorted
    order = np.argsort(assigned, kind="stable")
    row = slot.reshape(-1)
    row[order] = np.arange(len(order)) + np.repeat(start - first, load)
    source[...] = -1
    source[row] = np.arange(len(row))
    tile_expert[...] = -1
    tile_expert[: tiles.sum()] = np.repeat(np.arange(E), tiles)
