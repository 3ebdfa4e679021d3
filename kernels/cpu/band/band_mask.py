"""The diagonal band of the MLP's weights (experiments 00007 and 00009).

Bandwidth w counts positions in the 4C-wide space; h = w // 2. With C input or output channels i and 4C hidden units j:

    kept(i, j)  iff  |j - 4i| <= h         FC1 weight (4C,C) is indexed [j,i], FC2 weight (C,4C) is indexed [i,j]

so FC2's band is the transpose of FC1's, and w >= 8C - 2 keeps everything.
"""


def band_columns(row, rows, columns, bandwidth):
    """(start, stop): the kept columns of a row of a (rows,columns) weight, FC1 if rows > columns, else FC2."""
    h = bandwidth // 2
    if rows > columns:  # FC1, row is j: kept i lie in (j-h)/4 .. (j+h)/4
        start, stop = -((h - row) // 4), (row + h) // 4 + 1
    else:  # FC2, row is i
        start, stop = 4 * row - h, 4 * row + h + 1
    start = min(max(start, 0), columns)
    return start, max(start, min(stop, columns))


def band_fan_in(rows, columns, bandwidth):
    """Number of kept weights of each row of a (rows,columns) matrix, rows = 4 columns (FC1) or the reverse (FC2)."""
    ranges = (band_columns(row, rows, columns, bandwidth) for row in range(rows))
    return [stop - start for start, stop in ranges]


def band_count(rows, columns, bandwidth):
    """Number of kept weights of a (rows,columns) matrix."""
    return sum(band_fan_in(rows, columns, bandwidth))


def band_mask(weight, bandwidth):
    """weight (L,4C,C) or (L,C,4C): zero what lies outside the band, in every layer, in place; contiguous."""
    L, rows, columns = weight.shape
    flat = weight.reshape(L, rows * columns)
    end = 0  # where the band of the rows so far ends; up to the next row's band memory is one stretch
    for row in range(rows):
        start, stop = band_columns(row, rows, columns, bandwidth)
        flat[:, end : row * columns + start] = 0
        end = row * columns + stop
    flat[:, end:] = 0
