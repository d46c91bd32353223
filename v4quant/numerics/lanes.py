"""Vectors of integer lanes inside kernels: what a loop over 32 weights does, written as arithmetic on all 32 at once.

A compiler vectorises the plain loops of these casts poorly: trip counts are short, lanes are narrow and arrays may
alias. A *lane function* says the vector code outright. Its body runs while numba compiles the kernel that calls it,
and emits portable LLVM vector instructions, which become AVX-512, AVX2 or NEON as the machine has it:

    @lane_function(results=0)
    def double(build, source, target):
        store(target, load(build, source, lanes=32, bits=16) << 1)

Addresses are byte addresses in memory; a lane function checks no bounds. Lanes are unsigned and wrap around. Memory is
little-endian, as in safetensors and on every machine that numba supports.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from llvmlite.ir import IRBuilder as Builder
from llvmlite.ir import Value
from numba.core import types
from numba.extending import intrinsic

# Bytes between what a kernel reads or writes and what it asks memory for, to hide the latency of DRAM. Asking ahead
# doubles the rate of most casts (benchmarks/casts.py); 1 to 8 KiB do about equally well.
PREFETCH_BYTES = 4096
LINE_BYTES = 64


class Lanes:
    """A vector value under construction; operators emit one instruction each, integers are meant for every lane."""

    def __init__(self, build: Builder, value: Value) -> None:
        self.build = build
        self.value = value

    def _new(self, value: Value) -> "Lanes":
        return Lanes(self.build, value)

    def _operand(self, other: "Lanes | int") -> Value:
        """The other side of an operator; an integer becomes a constant vector."""
        if isinstance(other, Lanes):
            return other.value
        kind = self.value.type
        return ir.Constant(kind, [other % (1 << kind.element.width)] * kind.count)

    def __and__(self, other: "Lanes | int") -> "Lanes":
        return self._new(self.build.and_(self.value, self._operand(other)))

    def __or__(self, other: "Lanes | int") -> "Lanes":
        return self._new(self.build.or_(self.value, self._operand(other)))

    def __add__(self, other: "Lanes | int") -> "Lanes":
        return self._new(self.build.add(self.value, self._operand(other)))

    def __sub__(self, other: "Lanes | int") -> "Lanes":
        return self._new(self.build.sub(self.value, self._operand(other)))

    def __lshift__(self, bits: int) -> "Lanes":
        return self._new(self.build.shl(self.value, self._operand(bits)))

    def __rshift__(self, bits: int) -> "Lanes":
        return self._new(self.build.lshr(self.value, self._operand(bits)))

    def minus_down_to_zero(self, other: "Lanes") -> "Lanes":
        """Subtract; zero where the result would be negative."""
        kind = self.value.type
        function = _llvm_function(self.build, "llvm.usub.sat", kind, kind, [kind, kind])
        return self._new(self.build.call(function, [self.value, other.value]))

    def equals(self, other: "Lanes | int") -> "Lanes":
        """Mask of the lanes that are equal; `==` is left to Python."""
        return self._new(self.build.icmp_unsigned("==", self.value, self._operand(other)))

    def differs(self, other: "Lanes | int") -> "Lanes":
        """Mask of the lanes that are not equal."""
        return self._new(self.build.icmp_unsigned("!=", self.value, self._operand(other)))

    def __lt__(self, other: "Lanes | int") -> "Lanes":
        return self._new(self.build.icmp_unsigned("<", self.value, self._operand(other)))

    def __gt__(self, other: "Lanes | int") -> "Lanes":
        return self._new(self.build.icmp_unsigned(">", self.value, self._operand(other)))

    def __ge__(self, other: "Lanes | int") -> "Lanes":
        return self._new(self.build.icmp_unsigned(">=", self.value, self._operand(other)))

    def to(self, bits: int) -> "Lanes":
        """The same lanes in another width: zero-extended or truncated."""
        kind = ir.VectorType(ir.IntType(bits), self.value.type.count)
        change = self.build.zext if bits > self.value.type.element.width else self.build.trunc
        return self._new(change(self.value, kind))

    def lanes(self, indices: Sequence[int], other: "Lanes | None" = None) -> "Lanes":
        """The lanes of these indices; those of `other` are numbered after one's own."""
        kind = ir.VectorType(ir.IntType(32), len(indices))
        right = ir.Constant(self.value.type, ir.Undefined) if other is None else other.value
        return self._new(self.build.shuffle_vector(self.value, right, ir.Constant(kind, list(indices))))

    def at_least(self, bound: int) -> "Lanes":
        """Raise to `bound` the lanes that are less."""
        return where(self > bound, self, bound)

    def joined_pairs(self) -> "Lanes":
        """Neighbouring lanes as one lane of twice the width, the even one below."""
        kind = self.value.type
        wide = ir.VectorType(ir.IntType(2 * kind.element.width), kind.count // 2)
        return self._new(self.build.bitcast(self.value, wide))

    def maximum(self) -> Value:
        """The largest lane, int64."""
        kind = self.value.type
        function = _llvm_function(self.build, "llvm.vector.reduce.umax", kind, kind.element, [kind])
        return self.build.zext(self.build.call(function, [self.value]), ir.IntType(64))

    def count(self) -> Value:
        """How many lanes of a mask are set, int64."""
        bits = self.build.bitcast(self.value, ir.IntType(self.value.type.count))
        return self.build.zext(self.build.ctpop(bits), ir.IntType(64))


def where(mask: Lanes, yes: Lanes, no: "Lanes | int") -> Lanes:
    """Lanes of `yes` where the mask is set, of `no` elsewhere."""
    return Lanes(mask.build, mask.build.select(mask.value, yes.value, yes._operand(no)))


def splat(build: Builder, scalar: Value, *, lanes: int, bits: int) -> Lanes:
    """A vector that holds the low bits of an int64 in every lane."""
    kind = ir.VectorType(ir.IntType(bits), lanes)
    nothing = ir.Constant(kind, ir.Undefined)
    first = build.insert_element(nothing, build.trunc(scalar, kind.element), ir.Constant(ir.IntType(32), 0))
    return Lanes(build, first).lanes([0] * lanes)


def load(build: Builder, source: Value, *, lanes: int, bits: int) -> Lanes:
    """Read a vector from any byte address."""
    kind = ir.VectorType(ir.IntType(bits), lanes)
    _prefetch(build, source, kind, for_writing=False)
    return Lanes(build, build.load(build.inttoptr(source, kind.as_pointer()), align=1))


def store(target: Value, vector: Lanes) -> None:
    """Write a vector to any byte address."""
    build, kind = vector.build, vector.value.type
    _prefetch(build, target, kind, for_writing=True)
    build.store(vector.value, build.inttoptr(target, kind.as_pointer()), align=1)


def _prefetch(build: Builder, address: Value, kind: ir.VectorType, *, for_writing: bool) -> None:
    """Ask for the cache lines PREFETCH_BYTES ahead; beyond the end of the array that does nothing."""
    byte, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
    function = _declared(build, "llvm.prefetch.p0i8", ir.VoidType(), [byte, flag, flag, flag])
    for offset in range(0, kind.count * kind.element.width // 8, LINE_BYTES):
        ahead = build.add(address, ir.Constant(address.type, PREFETCH_BYTES + offset))
        # Operands: write, into all levels of cache, data.
        build.call(function, [build.inttoptr(ahead, byte), flag(int(for_writing)), flag(3), flag(1)])


def _llvm_function(
    build: Builder, name: str, kind: ir.VectorType, result: ir.Type, arguments: Sequence[ir.Type]
) -> ir.Function:
    """An LLVM intrinsic that is overloaded on the vector type `kind`."""
    return _declared(build, f"{name}.v{kind.count}i{kind.element.width}", result, arguments)


def _declared(build: Builder, name: str, result: ir.Type, arguments: Sequence[ir.Type]) -> ir.Function:
    """A function of the module, declared on first use."""
    known = build.module.globals.get(name)
    return known or ir.Function(build.module, ir.FunctionType(result, arguments), name)


def lane_function(*, results: int) -> Callable[[Callable[..., Any]], Any]:
    """Make a function that emits vector code callable from kernels.

    Args:
        results: how many int64 the calls give; the body returns as many values, in a tuple where there are several.
    """
    tuple_of: Any = types.UniTuple
    kind = types.void if results == 0 else types.int64 if results == 1 else tuple_of(types.int64, results)

    def decorate(body: Callable[..., Any]) -> Any:
        def template(_: Any, *arguments: Any) -> Any:
            def generate(context: Any, build: Builder, signature: Any, values: Sequence[Value]) -> Value:
                result = body(build, *values)
                if results == 0:
                    return context.get_dummy_value()
                return result if results == 1 else context.make_tuple(build, signature.return_type, result)

            return kind(*[types.int64] * len(arguments)), generate

        # numba wants to know the arguments one by one; they are the body's.
        template.__signature__ = inspect.signature(body)  # type: ignore[attr-defined]
        return intrinsic(template)

    return decorate
