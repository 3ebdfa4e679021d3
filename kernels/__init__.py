"""Ops for GPT-2 training: kernels.cpu is NumPy. A device is a namespace of ops and of zeros, to_device, to_host."""

from llmc.errors import UserError


def open_device(name: str = "auto"):
    """The device "cpu", or the best there is for "auto". Raises UserError for a device that this version lacks."""
    if name not in ("auto", "cpu"):
        raise UserError(f"--device {name}: not in this version, which runs on the CPU", "--device cpu")
    from kernels import cpu

    return cpu
