"""kernels/cpu/blocks.py: shares of work, what becomes of errors, and how many threads there are."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from kernels import cpu
from kernels.cpu import blocks
from kernels.cpu.blocks import PARALLEL_BYTES, for_blocks, num_threads

ROOT = Path(__file__).parent.parent.parent
LARGE = PARALLEL_BYTES  # floats in a row, with which a few rows are worth several threads


@pytest.fixture
def three(monkeypatch):
    """Three threads, on however many cores."""
    monkeypatch.setattr(blocks, "num_threads", lambda: 3)


def has_openblas() -> bool:
    return "openblas" in np.show_config(mode="dicts")["Build Dependencies"]["blas"]["name"].lower()


needs_openblas = pytest.mark.skipif(not has_openblas(), reason="NumPy was not built with OpenBLAS")


def test_every_row_is_done_once_by_the_thread_whose_turn_it_is(three):
    done, threads = np.zeros(13, int), {}

    def work(start, stop):
        done[start:stop] += 1
        threads[start] = threading.get_ident()

    for_blocks(work, 13, 2, LARGE)
    assert done.tolist() == [1] * 13
    shares = [{threads[start] for start in range(2 * first, 13, 6)} for first in range(3)]
    assert [len(share) for share in shares] == [1, 1, 1] and len(set.union(*shares)) == 3
    threads.clear()
    for_blocks(work, 13, 2, 1)  # not worth a second thread
    assert set(threads.values()) == {threading.get_ident()}


# ----------------------------------------------------------------------------------------------------------------------
# blocks inside blocks

# in a process of its own, which can be ended if it waits for itself. x (R,C) @ w.T + b, by blocks of rows
NESTED = """
import numpy as np
from kernels import cpu
from kernels.cpu import blocks
blocks.num_threads = lambda: 3
R, C = 600, 1024
random = np.random.default_rng(1)
x, w, b = (random.standard_normal(shape, np.float32) for shape in ((R, C), (4096, C), (4096,)))
expected = x @ w.T + b
out, depth = np.zeros((R, 4096), np.float32), np.zeros(4, int)

def outer(start, stop):
    cpu.matmul_forward(out[start:stop], x[start:stop], w, b)  # adds its bias by blocks
    blocks.for_blocks(lambda s, e: middle(start + s, start + e), stop - start, 50, 1 << 23)

def middle(start, stop):
    blocks.for_blocks(lambda s, e: inner(start + s, start + e), stop - start, stop - start, 1 << 23)  # a single block

def inner(start, stop):
    blocks.for_blocks(lambda s, e: depth.__iadd__([e - s, 0, 0, 0]), stop - start, 10, 1 << 23)

blocks.for_blocks(outer, R, 200, 1 << 23)
print(float(np.abs(out - expected).max() / np.abs(expected).max()), len(blocks._workers))
"""


def run(code: str, timeout: float = 60, **environment: str) -> str:
    words, environment = [sys.executable, "-c", code], os.environ | environment
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_blocks_inside_blocks_are_right_and_do_not_wait_for_themselves():
    error, workers = run(NESTED).split()
    assert float(error) < 1e-6 and workers == "2"


IN_PLACE = """
import threading
from kernels.cpu import blocks
blocks.num_threads = lambda: 3
LARGE, seen = 1 << 23, []

def outer(start, stop):
    caller = threading.get_ident()
    blocks.for_blocks(lambda s, e: seen.append((start, s, caller == threading.get_ident())), 4, 1, LARGE)

def threads() -> int:
    found = set()
    blocks.for_blocks(lambda start, stop: found.add(threading.get_ident()), 3, 1, LARGE)
    return len(found)

blocks.for_blocks(outer, 6, 1, LARGE)
print(sorted(seen) == [(start, s, True) for start in range(6) for s in range(4)], threads())
try:
    blocks.for_blocks(lambda start, stop: blocks.for_blocks(lambda s, e: 1 // 0, 2, 1, LARGE), 3, 1, LARGE)
except ZeroDivisionError:
    print("raised", threads())
"""


def test_blocks_inside_blocks_run_in_place():
    """And what comes after them, or after an error in them, has its threads again."""
    assert run(IN_PLACE) == "True 3\nraised 3\n"


def test_a_single_block_leaves_the_threads_to_what_it_calls(three):
    threads = set()
    inner = lambda start, stop: threads.add(threading.get_ident())  # noqa: E731
    for_blocks(lambda start, stop: for_blocks(inner, 3, 1, LARGE), 1, 1, LARGE)
    assert len(threads) == 3


# ----------------------------------------------------------------------------------------------------------------------
# errors


@needs_openblas
@pytest.mark.parametrize("failing", [0, 1, 2], ids=["the caller's share", "a worker's", "the last worker's"])
def test_an_error_comes_when_nobody_writes_any_more(three, failing):
    set_threads, get_threads = blocks._blas
    before, done, while_at_work = get_threads(), np.zeros(30, int), []

    def work(start, stop):
        if start == failing:
            raise ZeroDivisionError("of the share that begins here")
        time.sleep(0.02)
        while_at_work.append(get_threads())
        done[start:stop] += 1

    set_threads(2)
    try:
        with pytest.raises(ZeroDivisionError):
            for_blocks(work, 30, 1, LARGE)
        finished = done.copy()
        assert get_threads() == 2 and set(while_at_work) == {1}
        time.sleep(0.1)
        assert np.array_equal(done, finished)
        assert finished.tolist() == [int(row % 3 != failing) for row in range(30)]
        for_blocks(lambda start, stop: done.__setitem__(slice(start, stop), 7), 30, 1, LARGE)  # and it goes on
        assert done.tolist() == [7] * 30 and get_threads() == 2
    finally:
        set_threads(before)


def test_ctrl_c_is_raised_when_all_shares_are_done(three, monkeypatch):
    """It comes while the caller, done with its own share, waits for the others."""
    done, wait = np.zeros(3, int), blocks.wait

    def interrupted(shares):
        monkeypatch.setattr(blocks, "wait", wait)
        raise KeyboardInterrupt

    def work(start, stop):
        time.sleep(0.1 if start else 0)
        done[start] = 1

    monkeypatch.setattr(blocks, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        for_blocks(work, 3, 1, LARGE)
    assert done.tolist() == [1, 1, 1]


def test_threads_of_the_caller_take_turns(three):
    """Else one would set OpenBLAS back to the single thread that another had set it to."""
    at_work, most = set(), []

    def work(caller):
        at_work.add(caller)
        most.append(len(at_work))
        time.sleep(0.002)

    def call(caller):
        for _ in range(5):
            for_blocks(lambda start, stop: work(caller), 6, 1, LARGE)
            at_work.discard(caller)

    before = blocks._blas and blocks._blas[1]()
    callers = [threading.Thread(target=call, args=(name,)) for name in "ab"]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert not any(caller.is_alive() for caller in callers) and len(most) == 60
    assert before == (blocks._blas and blocks._blas[1]())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
def test_a_forked_process_has_threads_of_its_own():
    """The parent's are not there: it would wait for them for ever."""
    code = """
import os, warnings
warnings.simplefilter("ignore")
from kernels.cpu import blocks
blocks.num_threads = lambda: 2
done = [0] * 4
work = lambda start, stop: done.__setitem__(start, done[start] + 1)
blocks.for_blocks(work, 4, 1, 1 << 23)
child = os.fork()
blocks.for_blocks(work, 4, 1, 1 << 23)
if child == 0:
    os._exit(0 if done == [2] * 4 else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), done)
"""
    assert run(code) == "0 [2, 2, 2, 2]\n"


# ----------------------------------------------------------------------------------------------------------------------
# how many


@needs_openblas
def test_inside_blocks_blas_has_one_thread():
    """Where NumPy has OpenBLAS its functions must be found: without them attention is up to a hundred times slower."""
    set_threads, get_threads = blocks._blas
    before, seen = get_threads(), []
    set_threads(2)
    try:
        for_blocks(lambda start, stop: seen.append(get_threads()), 4, 2)
        assert (seen, get_threads()) == ([1, 1], 2)
        with pytest.raises(ZeroDivisionError):
            for_blocks(lambda start, stop: 1 // 0, 4, 2)
        assert get_threads() == 2
        for_blocks(lambda start, stop: seen.append(get_threads()), 4, 4)  # one block: BLAS has the cores
        assert seen[2] == 2
    finally:
        set_threads(before)


@pytest.mark.parametrize(
    "openblas, omp, cores, expected",
    [
        (None, None, 8, 8),
        ("3", None, 8, 3),
        ("3", "5", 8, 3),
        (None, "5", 8, 5),
        ("1000", None, 8, 8),
        ("64", None, 2, 2),
        (None, "1000", 4, 4),
        ("0", "5", 8, 5),
        ("", "", 4, 4),
        ("-1", None, 4, 4),
        ("x", "2", 4, 2),
        (" 3,2", None, 4, 3),
        ("²", None, 4, 4),
        ("9" * 5000, None, 4, 4),
    ],
)
def test_num_threads(monkeypatch, openblas, omp, cores, expected):
    monkeypatch.setattr(blocks, "usable_cores", lambda: cores)
    for name, value in (("OPENBLAS_NUM_THREADS", openblas), ("OMP_NUM_THREADS", omp)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert num_threads() == expected
    assert cpu.describe().endswith(f" {expected} threads")


@needs_openblas
@pytest.mark.parametrize("asked", ["1", "2", "1000", "0", "2,1", None])
def test_the_threads_that_are_printed_are_the_ones_that_work(asked):
    """Those of OpenBLAS, and those that take blocks."""
    code = """
import threading
from kernels import cpu
from kernels.cpu import blocks
names = set()
blocks.for_blocks(lambda start, stop: names.add(threading.get_ident()), 5000, 1, 1 << 23)
print(len(names), blocks._blas[1](), cpu.describe().split(", ")[-1])
"""
    environment = {"OPENBLAS_NUM_THREADS": asked or "", "OMP_NUM_THREADS": ""}
    shares, of_blas, printed = run(code, **environment).strip().split(" ", 2)
    assert printed == f"{shares} threads" and of_blas == shares and int(shares) <= blocks.usable_cores()
