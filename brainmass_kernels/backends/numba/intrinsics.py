"""What kernels are written with beside functions of the language: operations of LLVM, memory, packs, C's functions."""

from __future__ import annotations

from .language import PACK, Function, Intrinsic, Value, element, like, llvm_type, several


def _llvm_function(name: str) -> Intrinsic:
    """An LLVM intrinsic on floats of one type, or on several of each."""

    def emit(scope: Function, *values: Value) -> Value | None:
        kind = next((v.type for v in values if several(v.type)), values[0].type)
        of = f"v{several(kind)}f{element(kind)[1:]}" if several(kind) else f"f{kind[1:]}"
        return scope.external(f"llvm.{name}.{of}", kind, [scope.cast(v, kind) for v in values])

    return Intrinsic(emit)


# `fmuladd` is one instruction where the machine has it, and the same two everywhere where not.
fma = _llvm_function("fmuladd")
absolute = _llvm_function("fabs")
copysign = _llvm_function("copysign")
floor = _llvm_function("floor")
ceil = _llvm_function("ceil")
round_even = _llvm_function("rint")
round_away = _llvm_function("round")
sqrt = _llvm_function("sqrt")

_SAME_BITS = {"f32": "i32", "i32": "f32", "u32": "f32", "f64": "i64", "i64": "f64", "u64": "f64"}


@Intrinsic
def bits(scope: Function, x: Value) -> Value:
    """The number of the other kind, integer or float, with the same bits."""
    kind = like(_SAME_BITS[element(x.type)], x.type)
    return scope.op(kind, f"bitcast {llvm_type(x.type)} {x.text} to {llvm_type(kind)}")


def _cells_at(kind: str) -> Intrinsic:
    """Numbers at an address; an index may be any, and is not looked at."""

    def emit(scope: Function, address: Value) -> Value:
        return scope.op(f"cells:{kind}", f"inttoptr i64 {address.text} to ptr")

    return Intrinsic(emit)


f32_at, f64_at, i32_at, i64_at = map(_cells_at, ("f32", "f64", "i32", "i64"))


@Intrinsic
def add_atomically(scope: Function, address: Value, value: Value) -> Value:
    """Add to the int64 at an address, and return what it was."""
    pointer = scope.op("", f"inttoptr i64 {address.text} to ptr")
    return scope.op("i64", f"atomicrmw add ptr {pointer.text}, i64 {value.text} seq_cst")


@Intrinsic
def load_atomically(scope: Function, address: Value) -> Value:
    """The int64 at an address, with all that other threads wrote before they wrote it."""
    pointer = scope.op("", f"inttoptr i64 {address.text} to ptr")
    return scope.op("i64", f"load atomic i64, ptr {pointer.text} acquire, align 8")


def c_function(name: str) -> Intrinsic:
    """A C function of words, by its symbol."""

    def emit(scope: Function, *words: Value) -> Value | None:
        return scope.external(name, "i64", [scope.cast(w, "i64") for w in words])

    return Intrinsic(emit)


@Intrinsic
def zeros(_: Function, like: Value) -> Value:
    """A pack of zeros of the kind of a number."""
    return Value(f"pack:{like.type}", "zeroinitializer")


@Intrinsic
def multiply_add(scope: Function, weight: Value, cells: Value, index: Value, total: Value) -> Value | None:
    """``weight`` times the numbers from a place on, plus a pack."""
    kind, address = scope.cell(cells, index)
    pack, size = llvm_type(total.type), int(kind[1:])
    load = scope.op(total.type, f"load {pack}, ptr {address}, align {size // 8}")
    first = scope.op(total.type, f"insertelement {pack} poison, {llvm_type(kind)} {weight.text}, i32 0")
    spread = scope.op(total.type, f"shufflevector {pack} {first.text}, {pack} poison, <{PACK} x i32> zeroinitializer")
    return scope.external(f"llvm.fmuladd.v{PACK}f{size}", total.type, [spread, load, total])


@Intrinsic
def put(scope: Function, cells: Value, index: Value, pack: Value) -> None:
    """Write a pack from a place on."""
    kind, address = scope.cell(cells, index)
    scope.line(f"store {llvm_type(pack.type)} {pack.text}, ptr {address}, align {int(kind[1:]) // 8}")


def together(count: int) -> Intrinsic:
    """So many numbers as one value; what is left of them repeats the last."""

    def emit(scope: Function, *numbers: Value) -> Value:
        kind = f"{numbers[0].type}x{count}"
        value = Value(kind, "poison")
        for k in range(count):
            one = numbers[min(k, len(numbers) - 1)]
            text = f"insertelement {llvm_type(kind)} {value.text}, {llvm_type(one.type)} {one.text}, i32 {k}"
            value = scope.op(kind, text)
        return value

    return Intrinsic(emit)


together2, together4, together8 = map(together, (2, 4, 8))


@Intrinsic
def one_of(scope: Function, numbers: Value, k: Value) -> Value:
    """One of several numbers."""
    return scope.op(element(numbers.type), f"extractelement {llvm_type(numbers.type)} {numbers.text}, i32 {k.text}")
