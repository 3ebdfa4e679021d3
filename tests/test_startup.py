"""Every script from its first line on: without docstrings, without NumPy, and stopped while it imports."""

import ast
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TIMEOUT = 120
MODULES = ("llmc.diff", "llmc.plot", "kernels.cuda.runtime.compile", "kernels.cuda.runtime.roofline")  # python -m
FOLDERS = (".", "benchmarks", "data", "dev", "experiments", "tests")
SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for folder in FOLDERS
    for path in (ROOT / folder).glob("*.py")
    if re.search(r"^    ((errors\.)?run|sys\.exit)\(main", path.read_text(), re.MULTILINE)
)
ALL = [*SCRIPTS, *MODULES]
# their package, kernels.cuda, is imported before them, and NumPy with it: make calls them, after make setup
FIRST = [name for name in ALL if not name.startswith("kernels.")]
ARGUMENTS = {"tests/golden_run.py": [], "tests/check_gpt2.py": []}  # in the place of --help, which they do not know
WRITES = ("kernels.cuda.runtime.roofline",)  # its README, whatever the arguments


def command(name: str, *options: str) -> list[str]:
    script = ["-m", name] if name in MODULES else [str(ROOT / name)]
    return [sys.executable, *options, *script, *ARGUMENTS.get(name, ["--help"])]


def run(words: list[str], folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    environment = os.environ | environment
    return subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False
    )


def test_these_are_the_scripts():
    assert len(SCRIPTS) == len(set(SCRIPTS)) >= 17
    assert {"train_banded.py", "train_sparse_attn.py", "train_toroidal.py", "generate.py"} <= set(SCRIPTS)
    assert {"data/tinystories.py", "experiments/run.py", "tests/check_gpt2.py"} <= set(SCRIPTS)


@pytest.mark.parametrize("name", ALL)
def test_startup_comes_first(name):
    """Behind nothing but os, sys and the folder to import from, which Python itself has loaded."""
    path = ROOT / (f"{name.replace('.', '/')}.py" if name in MODULES else name)
    lines = [ast.unparse(node) for node in ast.parse(path.read_text()).body[1:]]
    if name not in MODULES and "/" in name:
        folder = "os.path.dirname(os.path.dirname(os.path.realpath(__file__)))"
        assert lines[:3] == ["import os", "import sys", f"sys.path.insert(0, {folder})"]
        lines = lines[3:]
    assert lines[0] == "if __name__ == '__main__':\n    from llmc import startup\n    startup.begin()"


@pytest.mark.parametrize("name", [name for name in ALL if name not in WRITES])
def test_without_docstrings(name):
    """python -OO, or PYTHONOPTIMIZE=2: __doc__ is None."""
    done = run(command(name), PYTHONOPTIMIZE="2")
    assert "Traceback" not in done.stderr, done.stderr
    if name in ARGUMENTS:
        assert "error: " in done.stderr or "usage: " in done.stderr
    else:
        assert done.returncode == 0 and done.stdout.startswith("usage: python"), done


@pytest.mark.parametrize("name", FIRST)
def test_without_numpy(name):
    """The environment was not activated: no package at all is there."""
    done = run(command(name, "-S", "-E"))
    expected = "error: NumPy is not installed here\n---> HINT: source .venv/bin/activate, or make setup\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", expected)


@pytest.mark.parametrize("script", ["tinystories", "tinyshakespeare", "starter_pack"])
@pytest.mark.parametrize("package", ["tqdm", "requests"])
def test_without_another_package(tmp_path, script, package):
    (tmp_path / f"{package}.py").write_text(f"raise ModuleNotFoundError('No module', name={package!r})")
    done = run(command(f"data/{script}.py"), PYTHONPATH=str(tmp_path))
    expected = f"error: {package} is not installed here\n---> HINT: source .venv/bin/activate, or make setup\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", expected)


def test_any_other_error_of_an_import_keeps_its_traceback(tmp_path):
    (tmp_path / "numpy.py").write_text("import not_one_of_ours")
    done = run(command("train_banded.py"), PYTHONPATH=str(tmp_path))
    assert done.returncode == 1 and done.stderr.startswith("Traceback")
    assert done.stderr.endswith("ModuleNotFoundError: No module named 'not_one_of_ours'\n")


# ----------------------------------------------------------------------------------------------------------------------
# Ctrl-C

# a NumPy that takes as long to import as the test wants: it says so, and goes on when a line comes
SLOW = """
import sys
sys.stdout.write("importing\\n")
sys.stdout.flush()
sys.stdin.readline()
sys.exit(7)
"""


def start(words: list[str], **options) -> subprocess.Popen:
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(words, cwd=ROOT, **pipes, **options)


@pytest.fixture
def slow(tmp_path):
    """start(name, ...): a script in the middle of its imports."""
    (tmp_path / "numpy.py").write_text(SLOW)

    def begin(name: str, **options) -> subprocess.Popen:
        process = start(command(name), env=os.environ | {"PYTHONPATH": str(tmp_path)}, **options)
        assert process.stdout.readline() == "importing\n", process.communicate()[1]
        return process

    return begin


def with_handler(handler) -> dict:
    """What makes a child begin with that handler of SIGINT, whatever this process has."""
    return dict(preexec_fn=lambda: signal.signal(signal.SIGINT, handler))


needs_signals = pytest.mark.skipif(sys.platform == "win32", reason="signals between processes are POSIX's")


@needs_signals
@pytest.mark.parametrize("name", FIRST)
def test_ctrl_c_while_importing(slow, name):
    process = slow(name, **with_handler(signal.SIG_DFL))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, out, err) == (-signal.SIGINT, "", "")


@needs_signals
def test_ctrl_c_that_is_ignored_stays_ignored(slow):
    """nohup, or the background job of a shell."""
    process = slow("train_banded.py", **with_handler(signal.SIG_IGN))
    process.send_signal(signal.SIGINT)
    _, err = process.communicate("go on\n", timeout=TIMEOUT)
    assert (process.returncode, err) == (7, "")


@needs_signals
@pytest.mark.parametrize("delay", [0, 0.03, 0.06, 0.1, 0.15, 0.2, 0.3])
def test_ctrl_c_at_any_moment(delay):
    """The real imports, from the first one behind startup on, until errors.run has taken over and --help is there."""
    process = start(command("train_banded.py", "-X", "importtime"), **with_handler(signal.SIG_DFL))
    for line in process.stderr:
        if "llmc.startup" in line:
            break
    process.stderr.readline()
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=TIMEOUT)
    assert "Traceback" not in err and process.returncode in (-signal.SIGINT, 130, 0)
    assert (process.returncode == 130) == ("interrupted" in err)


INSIDE = """
import os, signal, sys
from llmc import startup
startup.begin()
print(signal.getsignal(signal.SIGINT) == signal.SIG_DFL)
from llmc.errors import run
def main():
    print(signal.getsignal(signal.SIGINT) is signal.default_int_handler, sys.excepthook is sys.__excepthook__)
    {act}
run(main)
"""


@needs_signals
def test_inside_run_all_is_as_ever():
    done = start([sys.executable, "-c", INSIDE.format(act="signal.raise_signal(signal.SIGINT)")],
                 **with_handler(signal.SIG_DFL))  # fmt: skip
    out, err = done.communicate(timeout=TIMEOUT)
    assert (done.returncode, out, err) == (130, "True\nTrue True\n", "\ninterrupted\n")
    done = start([sys.executable, "-c", INSIDE.format(act="raise ModuleNotFoundError('No', name='numpy')")],
                 **with_handler(signal.SIG_DFL))  # fmt: skip
    assert done.communicate(timeout=TIMEOUT)[1].startswith("Traceback") and done.returncode == 1


def test_what_is_imported_changes_nothing():
    """A test, or generate.py, that imports a trainer keeps its handlers; so does whoever calls run without begin."""
    importable = (name for name in ALL if not name.startswith(("tests/", "experiments/", "benchmarks/")))
    names = [name.removesuffix(".py").replace("/", ".") for name in importable]
    code = f"""
import signal, sys
before = signal.getsignal(signal.SIGINT), sys.excepthook
for name in {names}:
    __import__(name)
print(before == (signal.getsignal(signal.SIGINT), sys.excepthook), "llmc.startup" in sys.modules)
from llmc.errors import run
signal.signal(signal.SIGINT, signal.SIG_DFL)
run(lambda: print(signal.getsignal(signal.SIGINT) == signal.SIG_DFL))
"""
    done = run([sys.executable, "-c", code])
    assert (done.returncode, done.stdout, done.stderr) == (0, "True True\nTrue\n", "")
