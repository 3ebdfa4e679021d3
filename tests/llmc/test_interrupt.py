"""Ctrl-C and SIGTERM, sent to real processes."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from llmc.interrupt import Interrupt

ROOT = Path(__file__).parent.parent.parent
TIMEOUT = 30

# the steps are read from stdin: the test decides when one ends, and no clock is involved
LOOP = """
import signal, sys
from llmc.interrupt import Interrupt
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits it ignored
with Interrupt() as interrupt:
    print("ready", flush=True)
    for step, line in enumerate(sys.stdin):
        print("step", step, interrupt.signal, flush=True)
        if interrupt.signal and "last" in line:
            print("saved", flush=True)
            break
sys.exit(interrupt.exit_code)
"""


@pytest.fixture
def loop(tmp_path):
    script = tmp_path / "loop.py"
    script.write_text(LOOP)
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen([sys.executable, script], env={"PYTHONPATH": str(ROOT)}, **pipes)
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize(
    "number, code, again", [(signal.SIGINT, 130, "again "), (signal.SIGTERM, 143, "")], ids=["SIGINT", "SIGTERM"]
)
def test_the_step_is_finished_and_the_work_saved(loop, number, code, again):
    loop.send_signal(number)
    assert loop.stderr.readline() == f"finishing this step; press Ctrl-C {again}to stop at once\n"
    out, err = loop.communicate("step\nlast\n", timeout=TIMEOUT)
    assert out == f"step 0 {int(number)}\nstep 1 {int(number)}\nsaved\n"
    assert (err, loop.returncode) == ("", code)


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_further_ctrl_c_stops_at_once(loop, first):
    loop.send_signal(first)
    assert loop.stderr.readline()
    loop.send_signal(signal.SIGINT)
    assert loop.wait(TIMEOUT) == -signal.SIGINT
    assert "saved" not in loop.stdout.read()


def test_sigterm_passed_on_twice_still_saves(loop):
    loop.send_signal(signal.SIGTERM)
    assert loop.stderr.readline()
    loop.send_signal(signal.SIGTERM)
    out, _ = loop.communicate("last\n", timeout=TIMEOUT)
    assert out.endswith("saved\n") and loop.returncode == 143


def test_the_first_signal_is_kept(capfd):
    with Interrupt() as interrupt:
        interrupt._handle(signal.SIGTERM, None)
        interrupt._handle(signal.SIGINT, None)
        assert (interrupt.signal, interrupt.exit_code) == (signal.SIGTERM, 143)
    assert capfd.readouterr().err.count("finishing this step") == 2


def test_handlers_are_restored_and_ignored_signals_stay_ignored(capfd):
    mine = lambda number, frame: None  # noqa: E731
    before = signal.signal(signal.SIGTERM, mine), signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGINT)
            assert interrupt.signal is None
            os.kill(os.getpid(), signal.SIGTERM)
            assert interrupt.signal == signal.SIGTERM
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is mine
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])
    assert capfd.readouterr().err == "finishing this step; press Ctrl-C to stop at once\n"


def test_outside_the_main_thread_it_does_nothing():
    seen = []

    def work():
        with Interrupt() as interrupt:
            seen.append((interrupt.signal, interrupt.exit_code))

    handler = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(None, 0)]
    assert signal.getsignal(signal.SIGINT) is handler
