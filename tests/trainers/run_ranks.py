"""One rank of a trainer, as tests/trainers/test_ranks.py starts it: tells at its end whether all have the same weights.

    mpiexec -n 2 python tests/trainers/run_ranks.py train_banded.py -n 3 ...

RANK_FAULT="1 4 KIND": rank 1 in its step 4, counted from 0, meets with "error", "memory", "bug" or "kill"; with "slow"
every backward of that rank takes 0.4 s more.
RANK_GPUS="2": the machine has so many emulated GPUs (tests/fake_nccl.py).
"""

import importlib
import os
import signal
import sys
import time
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import kernels  # noqa: F401  # before NumPy, see its docstring  # isort: skip
from llmc import errors
from llmc.ranks import open_ranks

FAULTS = {
    "error": lambda: (_ for _ in ()).throw(errors.UserError("train.bin: gone bad", "mend it")),
    "memory": lambda: (_ for _ in ()).throw(MemoryError("no room")),
    "bug": lambda: 1 // 0,
    "slow": lambda: time.sleep(0.4),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
}


def main(argv: list[str]) -> int:
    if "RANK_GPUS" in os.environ:
        sys.path.insert(0, str(Path(__file__).parent.parent))
        import fake_nccl

        fake_nccl.current.ranks = open_ranks()
        fake_nccl.install(setattr, int(os.environ["RANK_GPUS"]))
    trainer = importlib.import_module(argv[0].removesuffix(".py"))
    batches, learning_rate = [], trainer.learning_rate

    rank, at, kind = os.environ.get("RANK_FAULT", "-1 -1 none").split()
    is_here = open_ranks().rank == int(rank)

    class Shares(trainer.Shares):
        def __init__(self, *args):
            super().__init__(*args)
            batches.append(self)

        def backward(self, *args, **named):
            super().backward(*args, **named)
            if is_here and kind == "slow":
                FAULTS[kind]()

    def then_fault(schedule, step, **settings):
        if is_here and step == int(at) and kind != "slow":
            FAULTS[kind]()
        return learning_rate(schedule, step, **settings)

    trainer.Shares, trainer.learning_rate = Shares, then_fault
    code = trainer.main(argv[1:])
    (model,) = batches[0].models
    sums = open_ranks().gather(zlib.crc32(model.ops.to_host(model.params_flat).data))
    print(f"weights of {len(sums)} ranks: {len(set(sums))} kind", flush=True)
    return code


if __name__ == "__main__":
    errors.run(lambda: main(sys.argv[1:]))
