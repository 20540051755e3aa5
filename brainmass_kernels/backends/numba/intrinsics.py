"""What kernels are written with beside functions of the language: operations of LLVM, memory, packs, C's functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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


@Intrinsic
def pack_at(scope: Function, cells: Value, index: Value) -> Value:
    """The numbers from a place on."""
    kind, address = scope.cell(cells, index)
    kind = f"pack:{kind}"
    return scope.op(kind, f"load {llvm_type(kind)}, ptr {address}, align {int(kind[6:]) // 8}")


def _two_masks(first: Callable[[int], Sequence[int]], others: Callable[[int], Sequence[int]]) -> list[str]:
    """How two packs make two others: for each quarter of a pack the places in both, those of the second from `PACK`."""
    every = ([k for q in range(0, PACK, PACK // 4) for k in of(q)] for of in (first, others))
    return [f"<{PACK} x i32> <{', '.join(f'i32 {k}' for k in places)}>" for places in every]


def _quarter(k: int, pack: int = 0) -> range:
    return range(PACK * pack + 4 * k, PACK * pack + 4 * k + 4)


# A tile is turned in four rounds of shuffles, each of two packs into two. In the first two all quarters of the packs do
# the same, turning four rows by four columns; the others move whole quarters. Most are one instruction of SIMD.
_ROUNDS = [
    _two_masks(lambda q: (q, PACK + q, q + 1, PACK + q + 1), lambda q: (q + 2, PACK + q + 2, q + 3, PACK + q + 3)),
    _two_masks(lambda q: (q, q + 1, PACK + q, PACK + q + 1), lambda q: (q + 2, q + 3, PACK + q + 2, PACK + q + 3)),
    _two_masks(lambda q: _quarter(q // 4 % 2, q // 8), lambda q: _quarter(2 + q // 4 % 2, q // 8)),
    _two_masks(lambda q: _quarter(2 * (q // 4 % 2), q // 8), lambda q: _quarter(1 + 2 * (q // 4 % 2), q // 8)),
]


@Intrinsic
def turn_tile(
    scope: Function, source: Value, first: Value, step: Value, target: Value, place: Value, stride: Value
) -> None:
    """Write what stands in `PACK` rows of `PACK` numbers, which begin every ``step`` numbers, as columns to rows."""
    kind = source.type.removeprefix("cells:")
    pack, size = llvm_type(f"pack:{kind}"), int(kind[1:]) // 8

    def each(cells: Value, begin: Value, apart: Value) -> list[str]:
        starts = [scope.cast(begin, "i64")]
        for _ in range(PACK - 1):
            starts.append(scope.op("i64", f"add i64 {starts[-1].text}, {scope.cast(apart, 'i64').text}"))
        return [scope.cell(cells, start)[1] for start in starts]

    def shuffled(a: Value, b: Value, number: int) -> list[Value]:
        return [scope.op(a.type, f"shufflevector {pack} {a.text}, {pack} {b.text}, {mask}") for mask in _ROUNDS[number]]

    rows = [scope.op(f"pack:{kind}", f"load {pack}, ptr {at}, align {size}") for at in each(source, first, step)]
    # Of each four rows four packs, the columns of one number in each quarter.
    fours = []
    for a, b, c, d in zip(*[iter(rows)] * 4, strict=True):
        low, high = zip(shuffled(a, b, 0), shuffled(c, d, 0), strict=True)
        fours.append(shuffled(*low, 1) + shuffled(*high, 1))
    columns: list[Value] = [rows[0]] * PACK
    for k, (a, b, c, d) in enumerate(zip(*fours, strict=True)):
        front, back = zip(shuffled(a, b, 2), shuffled(c, d, 2), strict=True)
        columns[k], columns[k + 4] = shuffled(*front, 3)
        columns[k + 8], columns[k + 12] = shuffled(*back, 3)
    for column, at in zip(columns, each(target, place, stride), strict=True):
        scope.line(f"store {pack} {column.text}, ptr {at}, align {size}")


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


#: How many numbers a function may be called with at once.
WIDTHS = (2, 4, 8)
together2, together4, together8 = map(together, WIDTHS)


@Intrinsic
def one_of(scope: Function, numbers: Value, k: Value) -> Value:
    """One of several numbers."""
    return scope.op(element(numbers.type), f"extractelement {llvm_type(numbers.type)} {numbers.text}, i32 {k.text}")
