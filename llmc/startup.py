"""The first thing that a script does: while its imports run, Ctrl-C and a missing package end it without a traceback.

    if __name__ == "__main__":
        from llmc import startup

        startup.begin()

The imports take 0.2 s, and seconds on a busy machine or a network disk. A script that is imported, by a test or by
generate.py, changes nothing in its process. errors.run ends this, and turns Ctrl-C into a line of its own from then on.
"""

import _signal  # what signal is made of, built in: signal itself imports enum, and Ctrl-C may come in these 5 ms
import sys

PACKAGES = {"numpy": "NumPy", "requests": "requests", "tqdm": "tqdm"}  # of requirements.txt, by module
_changed = {}  # what `end` has to put back


def begin() -> None:
    """Until `end`: SIGINT has the system's action, a quiet end that a shell reports as 130, unless it is ignored; a
    package of PACKAGES that is missing is told in two lines, with exit code 1."""
    handler = _signal.getsignal(_signal.SIGINT)
    if handler is _signal.default_int_handler:  # Python's, which raises KeyboardInterrupt wherever the import may be
        _changed["handler"] = handler
        _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
    _changed["excepthook"] = sys.excepthook
    sys.excepthook = _explain


def end() -> None:
    """What `begin` changed is as it was; nothing if it was not called."""
    if "excepthook" in _changed:
        sys.excepthook = _changed.pop("excepthook")
    if "handler" in _changed:
        _signal.signal(_signal.SIGINT, _changed.pop("handler"))


def _explain(kind, error, traceback) -> None:
    """In the place of sys.excepthook, after which Python exits with 1."""
    if not issubclass(kind, ModuleNotFoundError) or error.name not in PACKAGES:
        sys.__excepthook__(kind, error, traceback)
    elif sys.stderr is not None:  # the caller may have closed it
        print(f"error: {PACKAGES[error.name]} is not installed here", file=sys.stderr)
        print("---> HINT: source .venv/bin/activate, or make setup", file=sys.stderr)
