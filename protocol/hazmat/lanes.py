"""What the processor offers and numba does not: fused multiply-add, eight 64-bit words at once, 52-bit products.

Every function here has one exact meaning on every processor: where an instruction is missing, LLVM emits others with the same result.
Only `FIFTY_TWO` differs: it says whether 52-bit products are an instruction here, and `ring` has a portable kernel for the other case.
Importing this module imports numba (about a second).
Source: LLVM language reference (fma, vector types); Intel intrinsics guide, VPMADD52LUQ and VPMADD52HUQ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.registry import cpu_target
from numba.extending import intrinsic, models, register_model

Kernel = TypeVar("Kernel", bound=Callable[..., object])

LANES = 8
VECTOR = ir.VectorType(ir.IntType(64), LANES)


def compiled(function: Kernel) -> Kernel:
    """Return `function` compiled at its first call: free of the GIL, cached on disk, without any reordering of floating point."""
    try:
        return cast(Kernel, numba.njit(function, cache=True, nogil=True))
    except RuntimeError:  # no directory can be written: every process compiles for itself, results are the same
        return cast(Kernel, numba.njit(function, nogil=True))


def inlined(function: Kernel) -> Kernel:
    """Return `function` to be copied into the kernels that call it, by LLVM: numba's own inlining compiles a quarter longer."""
    return cast(Kernel, numba.njit(function, forceinline=True))


def emitted(function: Callable[..., Any]) -> Any:
    """Return a function of kernels whose instructions `function` emits; numba calls it with types and takes (signature, emitter)."""
    return intrinsic(function)


@emitted
def fused(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """Return a * b + c of doubles, rounded once."""
    return types.float64(types.float64, types.float64, types.float64), lambda context, builder, signature, args: builder.fma(*args)


@emitted
def wide(typing: Any) -> Any:
    """Let the calling kernel use 512-bit registers where there are any; LLVM stays at 256 by itself.  No result depends on it."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        # llvmlite lists the attributes it knows and this is not one; the underlying set takes it (NTT: 1.5 times faster).
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return types.void(), emit


# --- eight words in a register ---------------------------------------------------------------------------------------


class _Lanes(types.Type):
    def __init__(self) -> None:
        super().__init__(name="lanes")


@register_model(_Lanes)
class _LanesModel(models.PrimitiveModel):  # type: ignore[misc]  # numba is untyped
    def __init__(self, manager: Any, numba_type: Any) -> None:
        super().__init__(manager, numba_type, VECTOR)


_lanes = _Lanes()


def address(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    """Return the pointer to eight words of a contiguous array, for code that is being emitted."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), VECTOR.as_pointer())


@emitted
def zeros(typing: Any) -> Any:
    """Return eight zeros."""
    return _lanes(), lambda context, builder, signature, args: ir.Constant(VECTOR, None)


@emitted
def load(typing: Any, array: Any, index: Any) -> Any:
    """Return array[index : index + 8] of a contiguous (n,) uint64 array.  Nothing is checked."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        loaded = builder.load(address(context, builder, signature.args[0], *args))
        loaded.align = 8
        return loaded

    return _lanes(array, types.intp), emit


@emitted
def store(typing: Any, array: Any, index: Any, words: Any) -> Any:
    """Set array[index : index + 8] of a contiguous (n,) uint64 array.  Nothing is checked."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[2], address(context, builder, signature.args[0], args[0], args[1])).align = 8
        return context.get_dummy_value()

    return types.void(array, types.intp, _lanes), emit


def _binary(emit: Callable[[Any, Any, Any], Any]) -> Any:
    @emitted
    def operation(typing: Any, a: Any, b: Any) -> Any:
        return _lanes(_lanes, _lanes), lambda context, builder, signature, args: emit(builder, *args)

    return operation


def _constant(value: int) -> Any:
    return ir.Constant(VECTOR, [value] * LANES)


HALF_BITS = 25
add = _binary(lambda builder, a, b: builder.add(a, b))


# Halves of 25 bits: LLVM sees that 32-bit multiplications are enough.
def _low(builder: Any, a: Any) -> Any:
    return builder.and_(a, _constant((1 << HALF_BITS) - 1))


def _high(builder: Any, a: Any) -> Any:
    return builder.and_(builder.lshr(a, _constant(HALF_BITS)), _constant((1 << HALF_BITS) - 1))


def _middle(builder: Any, a: Any, b: Any) -> Any:
    return builder.add(builder.mul(_low(builder, a), _high(builder, b)), builder.mul(_high(builder, a), _low(builder, b)))


product_low = _binary(lambda builder, a, b: builder.mul(_low(builder, a), _low(builder, b)))
product_middle = _binary(_middle)
product_high = _binary(lambda builder, a, b: builder.mul(_high(builder, a), _high(builder, b)))


def _multiply_add(name: str) -> Any:
    @emitted
    def operation(typing: Any, total: Any, a: Any, b: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(VECTOR, [VECTOR] * 3), name)
            return builder.call(function, args)

        return _lanes(_lanes, _lanes, _lanes), emit

    return operation


add_low_52 = _multiply_add("llvm.x86.avx512.vpmadd52l.uq.512")  # total + the low 52 bits of a product of 52-bit words
add_high_52 = _multiply_add("llvm.x86.avx512.vpmadd52h.uq.512")  # total + the high 52 bits of it


def _has_52_bit_products() -> bool:
    *_, features = cpu_target.target_context.codegen().magic_tuple()  # what numba compiles for, which a variable may narrow
    return {"+avx512ifma", "+avx512f"} <= set(str(features).split(","))


FIFTY_TWO = _has_52_bit_products()
