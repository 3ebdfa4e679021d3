"""CPU and CUDA have the same ops with the same signatures."""

import inspect

from kernels import cpu, cuda


def test_ops_and_signatures_are_the_cpu_ops(emulator):
    device = cuda.device(emulator)
    assert set(vars(device)) == set(cpu.__all__)
    for name in filter(lambda name: callable(getattr(cpu, name)), cpu.__all__):
        theirs, ours = (inspect.signature(getattr(where, name)) for where in (cpu, device))
        assert list(ours.parameters) == list(theirs.parameters), name
        defaults = [[parameter.default for parameter in each.parameters.values()] for each in (ours, theirs)]
        assert defaults[0] == defaults[1], name
