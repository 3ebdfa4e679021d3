"""What OpenBLAS reads from the environment when NumPy loads it: how many threads, and how long they spin."""

import os

# 2^20 cycles, 0.3 ms, instead of 2^26. longer, and they hold a core that the elementwise ops want: in a step of 7.3M
# parameters on 2 cores AdamW takes 13 ms instead of 24, the classifier 10 instead of 20. shorter, and every product has
# to wake them
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "20")

# of the processes that mpiexec or srun starts on a machine each takes its part of the cores
COUNTS = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "SLURM_NTASKS_PER_NODE", "LOCAL_WORLD_SIZE")
ranks = max((int(os.environ[name]) for name in COUNTS if os.environ.get(name, "").isdigit()), default=1)
if ranks > 1:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OPENBLAS_NUM_THREADS", str(max(1, cores // ranks)))
