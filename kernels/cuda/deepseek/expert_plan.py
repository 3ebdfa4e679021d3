"""Launchers of expert_plan.cu."""

THREADS = 512  # threads of a block: BLOCK of expert_plan.cu


def expert_plan(cuda, slot, source, tile_expert, load, experts):
    """As kernels.cpu.deepseek.expert_plan.expert_plan. The host learns nothing of it, so it need not wait."""
    A, E, rows = experts.size, len(load), len(source)
    cuda.launch("expert_load_kernel", E, THREADS, (load, experts, A))
    args = (slot, source, tile_expert, load, experts, A, E, rows, rows // len(tile_expert))
    cuda.launch("expert_place_kernel", E + 1, THREADS, args)
