"""Ops for GPT-2 training: kernels.cpu is NumPy. A device is a namespace of ops and of zeros, to_device, to_host."""


def open_device(name: str = "auto"):
    """The device "cpu", or the best there is for "auto". Raises ValueError for a device that this version lacks."""
    if name not in ("auto", "cpu"):
        raise ValueError(f"device {name} is not in this version, which runs on the CPU")
    from kernels import cpu

    return cpu
