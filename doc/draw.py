"""Draw a layer of each system, with the names and shapes of its tensors, into doc/.

    python doc/draw.py                # all three
    python doc/draw.py --only band    # one of band, sparse_attention, toroidal

Needs matplotlib: pip install -r requirements-plot.txt. Black and white, so that a printed page shows the same.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))  # so that it runs from any folder
if __name__ == "__main__":
    from llmc import startup

    startup.begin()

import io
from itertools import pairwise
from pathlib import Path

import numpy as np

from kernels.cpu.band.band_mask import band_mask
from llmc.cli import ArgumentParser
from llmc.errors import UserError, run

FOLDER = Path(__file__).resolve().parent
STEP = 0.98  # from a tensor to the next below it
HEIGHT, WIDTH = 0.42, 2.9  # of a tensor's box
LEFT, MAIN = 0.9, 3.5  # middles of the weights' column and of the layer's
BYPASS = 5.45  # where the residual stream goes past attention and MLP
SIZE, SMALL = 10, 9
LEGEND = """\
N = B*T tokens. Solid boxes are kept for backward, dashed ones are not. Square boxes are parameters,
without their biases. Grey with a thick border: what this system adds to GPT-2, or changes in it."""
OF_BAND = """\
kept: |j - 4i| <= w / 2

All other weights are 0,
and so are their gradients,
m and v."""
OF_INDEXER = """\
The indexer's own loss: the mean of kl. In the warm-up attention
is dense and kl is over all keys; after it, over the selected ones,
and scores and p are (B,T,k) there.
Its gradient goes through scores to iq, ik, iw and their weights,
and no further; p is a constant, too. The language model's loss
gives the indexer no gradient: index is a choice, not a number.

HI heads of dI; one key ik for all of them.
scores[t,s] = c sum_j iw[t,j] ReLU(iq[t,j] . ik[s]),  s <= t"""
OF_HEAD = """\
Token i becomes D sub-tokens (i,k). By one softmax, (i,k)
attends to the sub-tokens (j,l) of all tokens j <= i:

score = q . k / sqrt(hs/D) - lams ds - lamd dd
ds = min(r, P - r) / P,   r = (i - j) mod P
dd = |k - l| / D"""
OF_RING = """\
grey: seen. dashed: later tokens, never seen, however
near on the ring they are (--mode upstream sees them).

token 13   r = 1     ds = 1/12
token 8     r = 6     ds = 6/12, the farthest there is
token 3     r = 11   ds = 1/12, the other way round
token 2     r = 12   ds = 0, the same place as the query"""


class Drawing:
    """A page in units of about an inch. `own` marks what the system adds to GPT-2: a grey box with a thick border."""

    def __init__(self, width: float, height: float, title: str):
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        self.figure, self.axes = pyplot.subplots(figsize=(width, height))
        self.figure.subplots_adjust(0, 0, 1, 1)
        self.axes.set(xlim=(0, width), ylim=(0, height))
        self.axes.axis("off")
        self.axes.text(0.15, height - 0.28, title, size=12, weight="bold", va="center")

    def text(self, x, y, text, size=SMALL, **style):
        self.axes.text(x, y, text, **(dict(size=size, va="center", linespacing=1.35) | style))

    def tensor(self, y, name, shape, x=MAIN, width=WIDTH, own=False, kept=True, small=""):
        """A box around the name and shape of a tensor; dashed: not kept for backward. small: a second line."""
        from matplotlib.patches import FancyBboxPatch

        height = HEIGHT + 0.2 * bool(small)
        corner = (x - width / 2, y - height / 2)
        style = dict(fc="0.88" if own else "white", ec="black", lw=2 if own else 1, ls="-" if kept else (0, (4, 3)))
        self.axes.add_patch(FancyBboxPatch(corner, width, height, boxstyle="round,pad=0,rounding_size=0.09", **style))
        middle = y + 0.1 * bool(small)
        label = rf"$\mathbf{{{name}}}$".replace("_", r"\_") + f"  {shape}"
        self.text(x, middle, label, SIZE, ha="center")
        if small:
            self.text(x, y - 0.12, small, ha="center")

    def weight(self, y, name, shape, x=LEFT, width=1.5, target=None, own=False, small=""):
        """A parameter: a square-cornered box, with a line to what it goes into."""
        from matplotlib.patches import Rectangle

        height = 0.34 + 0.2 * bool(small)
        style = dict(fc="0.88" if own else "white", ec="black", lw=2 if own else 0.8)
        self.axes.add_patch(Rectangle((x - width / 2, y - height / 2), width, height, **style))
        self.text(x, y + 0.1 * bool(small), f"{name}  {shape}", ha="center")
        if small:
            self.text(x, y - 0.12, small, ha="center")
        if target is not None:
            self.arrow((x + width / 2, y), (target, y))

    def arrow(self, begin, end, text="", dx=0.1, dashed=False, head=True, **style):
        arrow = dict(
            arrowstyle="-|>" if head else "-", lw=1, ls="--" if dashed else "-", shrinkA=0, shrinkB=0, fc="black"
        )
        self.axes.annotate("", xy=end, xytext=begin, arrowprops=arrow)
        if text:
            self.text((begin[0] + end[0]) / 2 + dx, (begin[1] + end[1]) / 2, text, style="italic", **style)

    def path(self, points, dashed=False):
        """Straight lines through points, an arrow's head at the last."""
        for begin, end in pairwise(points):
            self.arrow(begin, end, head=end is points[-1], dashed=dashed)

    def down(self, y, text, below=STEP, x=MAIN, top=0.0, bottom=0.0, **style):
        """The arrow from the tensor at y to the one `below` it, with what is computed there."""
        self.arrow((x, y - HEIGHT / 2 - top), (x, y - below + HEIGHT / 2 + bottom), text, **style)

    def legend(self, y, x=0.15, more=""):
        self.text(x, y, LEGEND + more)

    def save(self, path: Path):
        """In 16 shades of grey, a fifth of the bytes."""
        from PIL import Image  # comes with matplotlib

        buffer = io.BytesIO()
        self.figure.savefig(buffer, dpi=100)
        Image.open(buffer).convert("L").quantize(16).save(path, optimize=True)


def attention_input(page: Drawing, top: float) -> float:
    """residual -> ln1 -> qkv; returns the y of qkv."""
    page.tensor(top, "residual", "(N,C)")
    page.down(top, "layernorm")
    page.weight(top - STEP / 2, "ln1w, ln1b", "(C)", target=MAIN)
    page.tensor(top - STEP, "ln1", "(N,C)   mean, rstd (N)")
    page.down(top - STEP, "matmul")
    page.weight(top - 1.5 * STEP, "qkvw", "(3C,C)", target=MAIN)
    page.tensor(top - 2 * STEP, "qkv", "(B,T,3C)")
    return top - 2 * STEP


def attention_output(page: Drawing, y: float, top: float) -> float:
    """atty at y -> residual2, to which the residual at `top` is added; returns its y."""
    page.down(y, "attproj (N,C)\n= matmul")
    page.weight(y - STEP / 2, "attprojw", "(C,C)", target=MAIN)
    page.tensor(y - STEP, "residual2", "(N,C)")
    bypass(page, top, y - STEP)
    return y - STEP


def bypass(page: Drawing, top: float, bottom: float):
    edge = MAIN + WIDTH / 2
    page.path([(edge, top - 0.08), (BYPASS, top - 0.08), (BYPASS, bottom + 0.08), (edge, bottom + 0.08)])
    page.text(edge + 0.1, bottom + 0.2, "+", 12)


def mlp(page: Drawing, y: float, own: bool = False) -> None:
    """residual2 at y -> residual3."""
    product = "band_matmul" if own else "matmul"
    page.down(y, "layernorm")
    page.weight(y - STEP / 2, "ln2w, ln2b", "(C)", target=MAIN)
    page.tensor(y - STEP, "ln2", "(N,C)   mean, rstd (N)")
    page.down(y - STEP, product)
    page.weight(y - 1.5 * STEP, "fcw", "(4C,C)", target=MAIN, own=own)
    page.tensor(y - 2 * STEP, "fch", "(N,4C)")
    page.down(y - 2 * STEP, "gelu")
    page.tensor(y - 3 * STEP, "fch_gelu", "(N,4C)")
    page.down(y - 3 * STEP, f"fcproj (N,C)\n= {product}")
    page.weight(y - 3.5 * STEP, "fcprojw", "(C,4C)", target=MAIN, own=own)
    page.tensor(y - 4 * STEP, "residual3", "(N,C)")
    bypass(page, y, y - 4 * STEP)


# ----------------------------------------------------------------------------------------------------------------------
# the three systems


def band() -> Drawing:
    page = Drawing(9.2, 10, "A layer with both MLP weights banded (train_banded.py)")
    top = 9.2
    y = attention_input(page, top)
    page.down(y, "attention")
    page.tensor(y - STEP, "atty", "(N,C)   lse (B,NH,T)")
    mlp(page, attention_output(page, y - STEP, top), own=True)
    page.text(7.5, 8.2, OF_BAND, 10, ha="center")
    band_picture(page, "fcw", 16, 16, middle=5.0)
    band_picture(page, "fcprojw", 16, 16, middle=2.2)
    page.legend(0.42)
    return page


def band_picture(page: Drawing, name: str, C: int, bandwidth: int, middle: float):
    """The kept weights of fcw or fcprojw, dark in a frame."""
    shape = (4 * C, C) if name == "fcw" else (C, 4 * C)
    mask = np.ones((1, *shape), np.float32)
    band_mask(mask, bandwidth)
    height, width = 0.036 * np.array(shape)
    left, bottom = 7.5 - width / 2, middle - height / 2
    place = (left, left + width, bottom, bottom + height)
    page.axes.imshow(1 - 0.65 * mask[0], cmap="gray", vmin=0, vmax=1, aspect="auto", interpolation="none", extent=place)
    page.axes.set(xlim=(0, 9.2), ylim=(0, 10))
    x, y = [left, left + width, left + width, left, left], [bottom, bottom, bottom + height, bottom + height, bottom]
    page.axes.plot(x, y, color="black", lw=1)
    rows, columns = ("unit j", "channel i") if name == "fcw" else ("channel i", "unit j")
    page.text(7.5, bottom + height + 0.17, f"{columns}, 0 to {shape[1] - 1}", ha="center")
    page.text(left - 0.13, middle, f"{rows}, 0 to {shape[0] - 1}", ha="right", rotation=90)
    page.text(7.5, bottom - 0.2, f"{name} at C = {C}, w = {bandwidth}", SIZE, ha="center")


def sparse_attention() -> Drawing:
    page = Drawing(11.4, 11.4, "A layer with sparse attention, its keys chosen by an indexer (train_sparse_attn.py)")
    top, atty, chosen = 10.6, 6.6, 7.05
    y = attention_input(page, top)
    page.arrow((MAIN, y - HEIGHT / 2), (MAIN, atty + HEIGHT / 2))
    page.text(MAIN + 0.1, chosen + 0.45, "sparse_attention", style="italic")
    page.tensor(atty, "atty", "(N,C)   lse (B,NH,T)")
    mlp(page, attention_output(page, atty, top))

    ln1, edge, columns = top - STEP, MAIN + WIDTH / 2, (6.7, 8.45, 10.1)
    page.path([(edge, ln1), (columns[2], ln1), (columns[2], 9.22)], dashed=True)
    page.text(
        BYPASS + 0.12,
        ln1 + 0.17,
        "ln1 is a constant here: no gradient of the indexer flows back into it",
        style="italic",
    )
    for x, weight, shape, name, of in (
        (columns[0], "idxqw", "(HI*dI,C)", "iq", "(B,T,HI*dI)"),
        (columns[1], "idxkw", "(dI,C)", "ik", "(B,T,dI)"),
        (columns[2], "idxww", "(HI,C)", "iw", "(B,T,HI)"),
    ):
        page.weight(9.05, weight, shape, x=x, own=True)
        page.arrow((x, ln1), (x, 9.22), dashed=True)
        page.arrow((x, 8.88), (x, 8.45))
        page.tensor(8.24, name, of, x=x, width=1.55, own=True)
        page.arrow((x, 8.03), ((x + 2 * columns[1]) / 3, 7.81))
    page.text(columns[1] + 0.1, 8.67, "layernorm", style="italic")
    middle = columns[1]
    page.tensor(7.6, "scores", "(B,128,T),  128 queries at a time", x=middle, width=3.6, own=True, kept=False)
    page.arrow((middle, 7.39), (middle, chosen + HEIGHT / 2 - 0.3))
    page.text(middle + 0.1, 7.2, "select_topk", style="italic")
    page.tensor(chosen - 0.3, "index", "(B,T,k)   count (B,T)", x=middle, width=2.9, own=True)
    page.arrow((middle - 1.45, chosen - 0.3), (edge + 0.8, chosen - 0.3), head=False)
    page.path([(edge + 0.8, chosen - 0.3), (edge + 0.8, chosen + 0.15), (MAIN, chosen + 0.15)])

    page.path([(edge, atty), (edge + 0.6, atty), (edge + 0.6, 5.7), (middle - 1.8, 5.7)], dashed=True)
    page.tensor(5.7, "p", "(B,128,T)  the heads' mean attention", x=middle, width=3.6, own=True, kept=False)
    page.arrow((middle, 5.49), (middle, 4.96))
    page.text(middle + 0.1, 5.23, "fused_kl", style="italic")
    page.tensor(4.75, "kl", "(B,T)  = KL(p || softmax(scores))", x=middle, width=3.4, own=True)
    page.path([(middle + 1.8, 7.6), (10.9, 7.6), (10.9, 4.75), (middle + 1.7, 4.75)])
    page.text(BYPASS + 0.75, 3.45, OF_INDEXER)
    page.legend(0.6, more="\nDashed arrows: no gradient comes back on them.")
    return page


def toroidal() -> Drawing:
    page = Drawing(10.4, 11.9, "A layer with toroidal attention (train_toroidal.py)")
    top = 11.1
    y = attention_input(page, top)
    page.down(y, "torus_rope, in place\ntorus_attention", STEP + 0.25)
    page.weight(y - STEP / 2 - 0.1, "lams, lamd", "(NH)", target=MAIN, own=True)
    y -= STEP + 0.25
    page.tensor(y, "mixed", "(N,C)   lse (B,NH,T,D)", own=True)
    page.down(y, "depth_fusion")
    page.weight(y - STEP / 2, "fuse1, fuse2", "(D,r)", own=True, small="make omega (D,D)", target=MAIN)
    page.tensor(y - STEP, "atty", "(N,C)")
    mlp(page, attention_output(page, y - STEP, top))
    head_picture(page, 6.1, 10.1)
    ring_picture(page, 8.1, 5.3)
    page.legend(0.85)
    return page


def head_picture(page: Drawing, left: float, top: float):
    """How a head's channels are cut into platters, and a token into sub-tokens."""
    from matplotlib.patches import Rectangle

    page.text(left, top + 0.35, "a head of hs = 8 channels, cut into D = 2 platters", SIZE)
    for channel in range(8):
        style = dict(fc="white" if channel < 4 else "0.75", ec="black", lw=1)
        page.axes.add_patch(Rectangle((left + 0.42 * channel, top - 0.35), 0.42, 0.38, **style))
    page.text(left + 0.84, top - 0.55, "platter k = 0", ha="center")
    page.text(left + 2.52, top - 0.55, "platter k = 1", ha="center")
    page.text(left, top - 1.5, OF_HEAD)


def ring_picture(page: Drawing, x: float, y: float):
    """The ring of P positions: which tokens a query sees, and how far they are."""
    from matplotlib.patches import Circle

    P, T, query, radius = 12, 18, 14, 1.1
    page.text(x, y + 2.05, f"the ring, P = {P}; T = {T} tokens, the query is i = {query}", SIZE, ha="center")
    for token in range(T):
        angle = np.pi / 2 - 2 * np.pi * (token % P) / P
        distance = radius + 0.48 * (token // P)  # the second turn lies outside
        place = (x + distance * np.cos(angle), y + distance * np.sin(angle))
        shade = "black" if token == query else "0.82" if token < query else "white"
        line = dict(lw=1, ls="-" if token <= query else (0, (3, 2)))
        page.axes.add_patch(Circle(place, 0.2, fc=shade, ec="black", **line))
        page.text(*place, str(token), ha="center", color="white" if token == query else "black")
    page.text(x - 2.05, y - 2.45, OF_RING)


DRAWINGS = {"band": band, "sparse_attention": sparse_attention, "toroidal": toroidal}


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", choices=DRAWINGS, help="the page to draw (default: all)")
    args = parser.parse(argv)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("matplotlib is not installed", "pip install -r requirements-plot.txt") from None
    for name in [args.only] if args.only else DRAWINGS:
        DRAWINGS[name]().save(FOLDER / f"{name}.png")
        print(f"{FOLDER / name}.png")
    return 0


if __name__ == "__main__":
    run(main)
