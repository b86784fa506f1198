"""Makes Triton's interpreter round as GPUs do, so that tests can hold kernels to the bounds of the real thing.

And makes it quicker, which touches no bit.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy
import torch
import triton.language as tl
from triton.runtime import interpreter

PATCH = interpreter._patch_lang


def lose_no_time(replace=setattr) -> None:
    """What the interpreter does again and again it does once, what for nothing not at all: a third of the time."""
    replace(interpreter, "_patch_lang", _patch_once_a_launch())
    # It computes integer sums and products in 64 bits as well, to tell an overflow that is told in debug mode only.
    options = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    replace(interpreter.interpreter_builder, "options", options)
    # It builds a dictionary of all types to look up one.
    replace(interpreter, "_get_np_dtype", _looked_up_once(interpreter._get_np_dtype))


def _looked_up_once(numpy_dtype):
    """By the scalar; pointers and blocks have no hash."""
    of_scalar = functools.cache(numpy_dtype)
    return lambda dtype: numpy_dtype(dtype) if dtype.scalar.is_ptr() else of_scalar(dtype.scalar)


def _patch_once_a_launch():
    """Calls of device functions find the language patched: the interpreter patches it anew for each, to no effect.

    A launch patches those modules of ``triton.language`` that its kernel's module knows, and restores them at its end.
    A device function whose module knows others (Triton's own know ``core``) has them patched at its first call.
    """
    patched = set()

    def patch(function):
        languages = {name for name in (tl, tl.core) if any(name is value for value in function.__globals__.values())}
        if languages and languages <= patched:
            return interpreter._LangPatchScope()  # nothing was changed, so there is nothing to restore
        scope = PATCH(function)
        if not patched:  # the launch itself: only its scope is restored
            restore = scope.restore

            def forget():
                patched.clear()
                restore()

            scope.restore = forget
        patched.update(languages)
        return scope

    return patch


def round_to_bf16_as_hardware_does(monkeypatch) -> None:
    """float32 → bfloat16 to the nearest, ties to even: the interpreter cuts the low bits off instead."""
    convert = interpreter._convert_float

    def rounded(values, source, target, mode):
        if source != tl.float32 or target != tl.bfloat16:
            return convert(values, source, target, mode)
        tensor = torch.from_numpy(numpy.ascontiguousarray(values)).to(torch.bfloat16)
        return tensor.view(torch.int16).numpy().view(numpy.uint16).reshape(values.shape)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)


def sum_alike_wherever_it_lies(monkeypatch) -> None:
    """tl.dot of float32 operands, a tile's rows and columns alike as on matrix units: summed in float64, rounded once.

    numpy's BLAS adds up rows at the edge of a tile in another order than others, on some CPUs and not on others.
    """
    multiply = interpreter.InterpreterBuilder.create_dot

    def dot(self, a, b, accumulator, *rest):
        if not a.data.dtype == b.data.dtype == accumulator.data.dtype == numpy.float32:
            return multiply(self, a, b, accumulator, *rest)
        with numpy.errstate(over="ignore", invalid="ignore"):  # what is masked may be anything
            product = numpy.matmul(a.data, b.data, dtype=numpy.float64).astype(numpy.float32)
            return interpreter.TensorHandle(product + accumulator.data, accumulator.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


def multiply_in_tf32(monkeypatch) -> None:
    """tl.dot with tf32x3 operands, emulated: the interpreter multiplies in full precision whatever is asked.

    Each is a sum of two numbers that are rounded to 10 mantissa bits, and the product of the two small ones is left
    out, as in the instruction sequence that Triton emits. No kernel asks for tf32 alone: matrix units drop what
    operands have beyond so many bits, and nothing rounds them before. Those of float16 are rounded, here and there.
    """
    multiply = interpreter.InterpreterBuilder.create_dot

    def dot(self, a, b, accumulator, precision, *rest):
        if a.data.dtype != numpy.float32 or "TF32" not in str(precision):
            return multiply(self, a, b, accumulator, precision, *rest)
        assert "x3" in str(precision), f"no kernel may ask for {precision}: operands would be cut off, not rounded"
        left, right = _rounded(a.data), _rounded(b.data)
        low_left, low_right = _rounded(a.data - left), _rounded(b.data - right)
        product = left.astype(numpy.float64) @ right
        product += low_left.astype(numpy.float64) @ right + left.astype(numpy.float64) @ low_right
        total = accumulator.data + product.astype(numpy.float32)
        return interpreter.TensorHandle(total.astype(numpy.float32), accumulator.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


def _rounded(values):
    """To the nearest number with 10 mantissa bits."""
    bits = numpy.ascontiguousarray(values).view(numpy.uint32)
    return ((bits + numpy.uint32(0x1000)) & numpy.uint32(0xFFFFE000)).view(numpy.float32)
