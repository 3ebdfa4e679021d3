"""Checkpoints that a run keeps beside the one it goes on with: the last N by their steps, and the best by validation.

    -c run.bin --keep 2        run_00000080.bin, run_00000100.bin      as many as llm.c's -nk says
    -c run.bin --keep-best 1   run_best.bin

Each is a pair, model and optimizer state, that --resume takes under a name of its own. It is a second name (a hard
link) of what was just saved, which costs no room until the next save; a copy where the file system has no links. Only
what this run wrote is ever removed: its state lists it.
"""

import contextlib
import math
import os
import re
import shutil
from argparse import Namespace
from dataclasses import asdict, dataclass, field
from pathlib import Path

from llmc.checkpoint import Model
from llmc.errors import UserError, explain_os_error
from llmc.files import atomic_write, check_replaceable, is_read_only, open_file
from llmc.outputs import same_file
from llmc.ranks import ALONE, Ranks
from llmc.resume import base_name, remove_states, state_path
from llmc.state import TrainState

BEST = "best"
BLOCK = 1 << 22  # bytes copied at a time


@dataclass
class Kept:
    """What a run keeps: the steps of its numbered copies, the latest last; the best one's loss, None if there is none.

    In a state file this is the extra value "kept".
    """

    steps: list[int] = field(default_factory=list)
    best: float | None = None

    def improves(self, loss: float) -> bool:
        """Whether `loss` is lower than that of the best copy."""
        return self.best is None or loss < self.best

    def saved(self) -> dict:
        """As a state file keeps it; nothing of a run that keeps nothing."""
        return {"kept": asdict(self)} if self.steps or self.best is not None else {}


def kept_path(path: str | os.PathLike, which: int | str) -> Path:
    """run.bin -> run_00000100.bin for step 100, run_best.bin for BEST."""
    path = Path(os.path.realpath(path))
    return path.with_name(f"{base_name(path)}_{which if which == BEST else f'{which:08d}'}.bin")


def kept_names(path: str | os.PathLike, numbered: bool = True, best: bool = True) -> re.Pattern:
    """What the copies are called that a run with -c `path` keeps."""
    which = "|".join([r"\d{8,10}"] * numbered + [BEST] * best)
    return re.compile(rf"{re.escape(base_name(Path(path)))}_({which})\.bin")


def open_kept(args: Namespace, state: TrainState | None, writes: bool = True) -> Kept:
    """The copies of the run that goes on under its own -c; none of a new run. writes: this process does, so it looks.

    Raises UserError for a flag that could do nothing, for a state that lists something else, and for a file in the
    place of a copy that this run did not write.
    """
    saves = args.checkpoint_every or args.keep_best
    for flag, value, needed, given in (
        ("--keep", args.keep, "-c", args.checkpoint),
        ("--keep-best", args.keep_best, "-c", args.checkpoint),
        ("--keep", args.keep, "-k", saves),
        ("--keep-best", args.keep_best, "-v", args.val_every),
    ):
        if value and not given:
            message = f"{flag} {int(value)}: there is nothing to keep without {needed}"
            raise UserError(message, f"add {needed} {'run.bin' if needed == '-c' else 20}", 2)
    if not args.checkpoint:
        return Kept()
    kept, path = Kept(), Path(os.path.realpath(args.checkpoint))
    if state and same_file(args.checkpoint, args.resume):
        kept = read_kept(args.resume, state.extra.get("kept", {}))
    own = {kept_path(path, step) for step in kept.steps} | ({kept_path(path, BEST)} if kept.best is not None else set())
    names = kept_names(path, args.keep > 0, args.keep_best)
    for other in sorted(path.parent.iterdir()) if writes and (args.keep or args.keep_best) else ():
        if names.fullmatch(other.name) and other not in own:
            if not args.overwrite:
                flag = "--keep-best 1" if other.name.endswith(f"_{BEST}.bin") else f"--keep {args.keep}"
                hint = "another -c leaves it; --overwrite 1 replaces it when its turn comes"
                raise UserError(f"{flag}: {other.name} exists already, and this run did not write it", hint, 2)
            print(f"{other.name} exists: this run may replace it")
    return kept


def read_kept(path: str | os.PathLike, saved) -> Kept:
    """The extra value "kept" of the checkpoint `path`. Raises UserError if it is none."""
    steps, best = (saved.get("steps", []), saved.get("best")) if isinstance(saved, dict) else (None, None)
    whole = isinstance(steps, list) and all(type(step) is int and step >= 0 for step in steps)
    if not whole or not (best is None or (isinstance(best, float | int) and math.isfinite(best))):
        found = f"kept is {saved!r}, expected steps and the best loss"
        raise UserError(f"{path}: {found}", f"start anew from its weights: -e {path}")
    return Kept(steps, best)


def add_copies(path: str | os.PathLike, model: Model, kept: Kept, most: int, best: bool, ranks: Ranks = ALONE) -> None:
    """Keep what was just saved as `path` under its number, if `most` > 0, and as the best one; then drop the oldest.

    kept: as it was saved, with this step among its steps. ranks: each has a state, the first one writes the model.
    Raises UserError if the system refuses.
    """
    for which in ([model.step] if most else []) + ([BEST] if best else []):
        copy, rank = kept_path(path, which), ranks.rank
        stays = copy.exists() and is_read_only(copy)
        ranks.meet()  # all have looked
        if stays:
            print(f"{copy.name} is read-only and stays as it is")
            continue
        state = state_path(copy, model, rank)
        second_name(state_path(os.path.realpath(path), model, rank), state)
        ranks.meet()
        if rank == 0:
            second_name(Path(os.path.realpath(path)), copy)
        ranks.meet()
        remove_states(copy, state, rank)
        print(f"kept as {copy.name}" + (f", val loss {kept.best:f} is the lowest so far" if which == BEST else ""))
    while most and len(kept.steps) > most:
        old = kept_path(path, kept.steps.pop(0))
        goes = old.exists() and not is_read_only(old)
        ranks.meet()
        if not goes:
            continue
        try:
            if ranks.rank == 0:
                old.unlink()  # the model first: without one a state is nobody's
        except OSError as error:
            raise explain_os_error(error, old, "removing") from None
        ranks.meet()
        remove_states(old, rank=ranks.rank)
        print(f"removed {old.name}, --keep {most}")


def second_name(path: Path, name: Path) -> None:
    """`name` becomes another name of the file `path`, or a copy of it where there are no links, at once or not at all.

    Raises UserError if the system refuses.
    """
    check_replaceable(name, "keeping")
    if name.exists() and os.path.samefile(path, name):
        return
    temporary = name.with_name(f".{name.name}.{os.getpid()}.tmp")
    try:
        os.link(path, temporary)
        os.replace(temporary, name)
    except OSError:
        with open_file(path) as source, atomic_write(name) as copy:
            shutil.copyfileobj(source, copy, BLOCK)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
