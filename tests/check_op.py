"""One helper for any op's test: gradients against finite differences in float64, and float32 against float64."""

import numpy as np

STEP = 1e-5  # of the central difference, for values of order 1
ELEMENTS = 60  # of a tensor that are checked, drawn at random


def check_op(forward, backward, tol: float = 1e-6, tol32: float = 1e-5, **shapes):
    """Check an op at random inputs of the given shapes; prints a line, raises AssertionError past a tolerance.

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
