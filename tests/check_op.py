"""What tests any op: gradients against finite differences in float64, float32 against float64, CUDA against NumPy."""

import inspect

import numpy as np

from kernels import cpu, cuda

STEP = 1e-5  # of the central difference, for values of order 1
ELEMENTS = 60  # of a tensor that are checked, drawn at random
TOL = 1e-5  # of CUDA's float32 against float64, relative to the tensor's largest value


def check_gradients(forward, backward, tol: float = 1e-6, tol32: float = 1e-5, **shapes):
    """Check what check_op's list of names cannot say, at random inputs of the given shapes; prints a line.

    forward(**inputs) -> (out, *saved), new arrays of the inputs' dtype; backward(dout, (out, *saved), **inputs) -> the
    gradients by input name. Errors are relative to the largest value of the tensor.
    """
    rng = np.random.default_rng(0)
    inputs = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    out, *saved = forward(**inputs)
    dout = rng.standard_normal(out.shape)
    grads = backward(dout, (out, *saved), **inputs)
    errors = {name: gradient_error(forward, inputs, name, dout, grads[name], rng) for name in shapes}

    single = {name: value.astype(np.float32) for name, value in inputs.items()}
    out32, *saved32 = forward(**single)
    grads32 = backward(dout.astype(np.float32), (out32, *saved32), **single)
    errors32 = {name: relative(grads32[name], grads[name]) for name in shapes} | {"out": relative(out32, out)}
    assert all(array.dtype == np.float32 for array in (out32, *grads32.values())), "float32 in, float64 out"

    report = ", ".join(f"d{name} {error:.1e}" for name, error in errors.items())
    print(f"finite differences: {report}; float32: {max(errors32.values()):.1e}")
    assert max(errors.values()) <= tol, errors
    assert max(errors32.values()) <= tol32, errors32


def gradient_error(forward, inputs: dict, name: str, dout, grad, rng) -> float:
    """Largest deviation of `grad` from the central difference of sum(dout * out), relative to its largest value."""
    tensor = inputs[name]
    assert grad.shape == tensor.shape
    chosen = rng.choice(tensor.size, min(tensor.size, ELEMENTS), replace=False)
    largest = 0.0
    for index in chosen:
        kept, sums = tensor.flat[index], []
        for value in (kept + STEP, kept - STEP):
            tensor.flat[index] = value
            sums.append(float(np.sum(dout * forward(**inputs)[0])))
        tensor.flat[index] = kept
        largest = max(largest, abs((sums[0] - sums[1]) / (2 * STEP) - grad.flat[index]))
    return largest / np.abs(grad).max()


def relative(ours, reference) -> float:
    """Largest deviation, relative to the reference's largest value; absolute if that is 0."""
    return float(np.abs(ours - reference).max() / (np.abs(reference).max() or 1.0))


def rounded(*shape, seed=0) -> np.ndarray:
    """Normal values in float64 that float32 holds exactly."""
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32).astype(np.float64)


def nan(*shape) -> np.ndarray:
    """What an op has to overwrite."""
    return np.full(shape, np.nan)


def place(runtime, array: np.ndarray, offset: int):
    """`array` on the device, floats in single precision, `offset` values behind an aligned address."""
    array = array.astype(np.float32) if array.dtype == np.float64 else array
    padded = np.concatenate([np.zeros(offset, array.dtype), array.ravel()])
    return runtime.to_device(padded)[offset:].reshape(array.shape)


def run(runtime, op, *args, offset=0):
    """Arrays after an op on the device."""
    ours = [place(runtime, arg, offset) if isinstance(arg, np.ndarray) else arg for arg in args]
    getattr(cuda.device(runtime), op)(*ours)
    return [runtime.to_host(arg) if isinstance(before, np.ndarray) else arg for arg, before in zip(ours, args)]


def check_twin(runtime, op: str, *args, offset: int = 0, tol: float = TOL) -> None:
    """Run an op on both devices; every array among its arguments must agree afterwards, outputs and inputs."""
    device = cuda.device(runtime)
    ours = [place(runtime, arg, offset) if isinstance(arg, np.ndarray) else arg for arg in args]
    reference = [arg.copy() if isinstance(arg, np.ndarray) else arg for arg in args]
    returned, expected = getattr(device, op)(*ours), getattr(cpu, op)(*reference)
    names = inspect.signature(getattr(cpu, op)).parameters
    errors = {}
    for name, array, twin, before in zip(names, ours, reference, args):
        if isinstance(twin, np.ndarray):
            values = runtime.to_host(array)
            same = np.array_equal(twin, before, equal_nan=True)  # an input, or all zeros: not a bit may change
            assert not same or np.array_equal(values, before.astype(values.dtype), equal_nan=True), (
                f"{op} changed {name}"
            )
            errors[name] = 0.0 if same else relative(values, twin)
    if expected is not None:
        errors["returned"] = relative(np.float64(returned), np.float64(expected))
    print(f"{op}: " + ", ".join(f"{name} {error:.1e}" for name, error in errors.items() if error))
    assert all(error <= tol for error in errors.values()), errors
