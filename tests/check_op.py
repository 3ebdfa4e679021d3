"""What tests any op: gradients against finite differences in float64, float32 against float64, CUDA against NumPy."""

import inspect

import numpy as np

from kernels import cpu, cuda

STEP = 1e-5  # of the central difference, for values of order 1
ELEMENTS = 60  # of a tensor that are checked, drawn at random
TOL = 1e-5  # of CUDA's float32 against float64, relative to the tensor's largest value
TOL_TENSOR = {False: 5e-6, True: 1.5e-3}  # of products on tensor cores, by runtime.tf32: 3xTF32 and TF32
ROUNDED = 2e-5  # what rounding to TF32 costs at least, where there are many values


def check_op(device, op: str, outs: dict, adds=(), offset: int = 0, tol: float = 1e-6, tol32: float = 1e-5, **inputs):
    """Check <op>_forward and <op>_backward, if there is one, at random inputs; raises AssertionError past a tolerance.

    outs: shapes of what forward writes, `out` first. inputs: by name a shape, of what is drawn at random and has a
    gradient, or a value: an array of integers, a number, None. adds: names of the gradients that are added to what is
    there; the others overwrite. The parameters' names tell what goes where.

    On the CPU gradients are compared with finite differences in float64, float32 with float64 within tol32. On a
    runtime all that both ops write is compared with what the CPU's write in float64, arrays lie `offset` values behind
    an aligned address.
    """
    shapes = {name: value for name, value in inputs.items() if isinstance(value, tuple)}
    given = {name: value for name, value in inputs.items() if name not in shapes}
    there, back = f"{op}_forward", f"{op}_backward"
    has_backward = hasattr(cpu, back)

    def written(dtype) -> dict:
        return {name: np.full(shape, np.nan, dtype) for name, shape in outs.items()}

    def forward(**drawn):
        saved = written(next(iter(drawn.values())).dtype)
        getattr(cpu, there)(*arguments(there, given | drawn | saved))
        return tuple(saved.values())

    def gradients(drawn, before) -> dict:
        """What backward writes to: NaN, or something that it adds to."""
        names = {f"d{name}": value for name, value in drawn.items()}
        return {name: before(value) if name in adds else np.full_like(value, np.nan) for name, value in names.items()}

    def backward(dout, saved, **drawn):
        grads = gradients(drawn, lambda value: np.full_like(value, 3))
        values = given | drawn | dict(zip(outs, saved)) | {f"d{next(iter(outs))}": dout} | grads
        getattr(cpu, back)(*arguments(back, values))
        return {name: grads[f"d{name}"] - (3 if f"d{name}" in adds else 0) for name in drawn}

    if device is cpu and has_backward:
        check_gradients(forward, backward, tol, tol32, **shapes)
    elif device is cpu:
        drawn = {name: rounded(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}
        single = forward(**{name: value.astype(np.float32) for name, value in drawn.items()})
        errors = {name: relative(*pair) for name, *pair in zip(outs, single, forward(**drawn))}
        assert all(array.dtype == np.float32 for array in single), "float32 in, float64 out"
        assert all(error <= tol32 for error in errors.values()), errors
    else:
        drawn = {name: rounded(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}
        check_twin(device, there, *arguments(there, given | drawn | written(np.float64)), offset=offset)
        if has_backward:
            saved = [array.astype(np.float32).astype(np.float64) for array in forward(**drawn)]
            grads = gradients(drawn, lambda value: rounded(*value.shape, seed=len(shapes)))
            dout = rounded(*saved[0].shape, seed=len(shapes) + 1)
            values = given | drawn | dict(zip(outs, saved)) | {f"d{next(iter(outs))}": dout} | grads
            check_twin(device, back, *arguments(back, values), offset=offset)


def arguments(op: str, values: dict) -> list:
    """Those of `values` that the op takes, in its order: gradients that nobody asks for are None."""
    parameters = inspect.signature(getattr(cpu, op)).parameters
    return [values.get(name, None if each.default is each.empty else each.default) for name, each in parameters.items()]


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
    assert all(error <= tol for error in errors.values()), errors  # all, not max: NaN fails
    assert all(error <= tol32 for error in errors32.values()), errors32


def gradient_error(forward, inputs: dict, name: str, dout, grad, rng) -> float:
    """Largest deviation of `grad` from the central difference of sum(dout * out), relative to the largest of `grad`."""
    tensor = inputs[name]
    assert grad.shape == tensor.shape
    chosen = rng.choice(tensor.size, min(tensor.size, ELEMENTS), replace=False)
    apart = []
    for index in chosen:
        kept, sums = tensor.flat[index], []
        for value in (kept + STEP, kept - STEP):
            tensor.flat[index] = value
            sums.append(float(np.sum(dout * forward(**inputs)[0])))
        tensor.flat[index] = kept
        apart.append((sums[0] - sums[1]) / (2 * STEP) - grad.flat[index])
    return float(np.abs(apart).max() / (np.abs(grad).max() or 1.0))


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


def check_twin(runtime, op: str, *args, offset: int = 0, tol: float = TOL, changed: tuple[str, ...] = ()) -> None:
    """Run an op on both devices; every array among its arguments must agree afterwards, outputs and inputs.

    changed: names of outputs that CUDA's rounding may change where the CPU adds exactly 0.
    """
    device = cuda.device(runtime)
    ours = [place(runtime, arg, offset) if isinstance(arg, np.ndarray) else arg for arg in args]
    reference = [arg.copy() if isinstance(arg, np.ndarray) else arg for arg in args]
    returned, expected = getattr(device, op)(*ours), getattr(cpu, op)(*reference)
    names = inspect.signature(getattr(cpu, op)).parameters
    errors = {}
    for name, array, twin, before in zip(names, ours, reference, args):
        if isinstance(twin, np.ndarray):
            values = runtime.to_host(array)
            # an input, or all zeros: not a bit may change
            same = name not in changed and np.array_equal(twin, before, equal_nan=True)
            assert not same or np.array_equal(values, before.astype(values.dtype), equal_nan=True), (
                f"{op} changed {name}"
            )
            errors[name] = 0.0 if same else relative(values, twin)
    if expected is not None:
        errors["returned"] = relative(np.float64(returned), np.float64(expected))
    print(f"{op}: " + ", ".join(f"{name} {error:.1e}" for name, error in errors.items() if error))
    assert all(error <= tol for error in errors.values()), errors
