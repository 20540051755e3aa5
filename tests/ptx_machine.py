"""A machine that runs the PTX of one kernel on the CPU, in numpy.

The PTX is translated once, to the source of a Python function whose variables are the registers: a numpy scalar where
all threads have the same value, else an array with one value for each thread of the grid. So all threads run in
lockstep: a barrier has nothing to do, and one that is missing is not missed. Each instruction is rounded as NVIDIA
documents it, but for `fma.rn.f32`, which rounds twice by way of float64, and for the approximate functions, which are
better here. What ptxas makes of PTX (it may fuse `mul.f32` with `add.f32`, and order accesses anew) is not seen.

It raises where a kernel reads or writes out of bounds, where threads store different values at one address, where
threads part at a branch that does not merely skip a few instructions, and at an instruction that it does not know.
Outputs, shared and local memory begin as NaN.
"""

from __future__ import annotations

import functools
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any, NamedTuple

import numpy as np

WARP = 32
# What numpy calls the types of PTX.
KINDS = {
    "pred": "?", "b32": "u4", "u32": "u4", "s32": "i4", "f32": "f4", "b64": "u8", "u64": "u8", "s64": "i8", "f64": "f8",
}  # fmt: skip
# Bytes of addresses that each array in memory has for itself.
_ROOM = 1 << 40
# Words of the longest vector that is loaded at once, and what is in a word that was never written.
_VECTOR, _NAN = 4, np.float32(np.nan).view("u4")


class PtxError(Exception):
    """A kernel does what it must not, or what this machine does not know."""


# The text -----------------------------------------------------------------------------------------------------------


class Instruction(NamedTuple):
    """One instruction; a label is one without operands whose name ends in a colon.

    Attributes
    ----------
    guard : the predicate without which it is not executed, with "!" if it is the negated one, or ""
    """

    name: str
    operands: tuple[str, ...] = ()
    guard: str = ""

    @property
    def is_label(self) -> bool:
        return self.name.endswith(":")

    @property
    def results(self) -> tuple[str, ...]:
        if self.name.startswith(("st.", "bra", "bar.", "ret", "fence.")) or self.is_label:
            return ()
        return tuple(re.findall(r"%[\w.]+", self.operands[0]))


class Entry(NamedTuple):
    """The kernel of a PTX module.

    Attributes
    ----------
    threads : of a block
    constants : bytes of the module's arrays
    shared, local : bytes of arrays in shared memory and in that of a thread; 0 where the launch says how many
    """

    params: tuple[str, ...]
    threads: int
    constants: dict[str, bytes]
    shared: dict[str, int]
    local: dict[str, int]
    code: tuple[Instruction, ...]


def parse(ptx: str) -> Entry:
    """The only kernel of a module."""
    text = re.sub(r"//[^\n]*", "", ptx)
    if (kernels := len(re.findall(r"\.entry\b", text))) != 1:
        raise PtxError(f"a module with {kernels} kernels, and this machine runs one")
    match = re.search(r"\.entry\s+\w+\s*\((.*?)\)([^{]*)\{(.*?)^\}", text, re.DOTALL | re.MULTILINE)
    assert match, "a kernel without a body"
    params, about, body = match.groups()
    code = [*_instructions(body)]
    # Labels of the debugger's are no places where a block begins.
    targets = {f"{x.operands[0]}:" for x in code if x.name.startswith("bra")}
    (threads,) = re.findall(r"\.(?:maxntid|reqntid)\s+(\d+)", about)
    arrays = re.findall(r"\.global[^;=]*?\.b8\s+([$\w]+)\[\d+\]\s*=\s*\{([\d,\s]*)\};", text)

    def sizes(space: str) -> dict[str, int]:
        declared = re.findall(rf"^\s*\.{space}[^;=]*?([$\w]+)(?:\[(\d*)\])?;", text, re.MULTILINE)
        return {name: int(size or 0) for name, size in declared}

    return Entry(
        tuple(re.findall(r"(\w+)\s*(?:,|$)", params)),
        int(threads),
        {name: bytes(map(int, values.split(","))) for name, values in arrays},
        sizes("shared"),
        sizes("local"),
        tuple(x for x in code if not x.is_label or x.name in targets),
    )


def _instructions(body: str) -> Iterator[Instruction]:
    # A line of .loc ends without a semicolon, and inline assembly may have braces of its own.
    body = re.sub(r"^\s*(?:\.loc\b.*|[{}])$", "", body, flags=re.MULTILINE)
    scopes = count()

    def opened(match: re.Match) -> str:
        """A block of assembly, with its registers under names that no other block has."""
        names, code = match.groups()
        scope, listed = next(scopes), "|".join(re.split(r"[\s,]+", names.strip()))
        return re.sub(rf"(?<![\w%.$])({listed})\b", rf"%local{scope}_\1", code)

    body = re.sub(r"\{\s*\.reg\s+\.\w+\s+([\w,\s]+);([^{}]*)\}", opened, body)
    for statement in body.split(";"):
        rest = statement.strip()
        while label := re.match(r"([$\w]+:)\s*", rest):
            yield Instruction(label.group(1))
            rest = rest[label.end() :]
        if not rest or rest.startswith("."):
            continue
        match = re.fullmatch(r"(?:@(!?%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", rest, re.DOTALL)
        if not match:
            raise PtxError(f"no instruction: {rest!r}")
        guard, name, operands = match.groups()
        parts = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", operands)
        yield Instruction(name, tuple(re.sub(r"\s", "", part) for part in parts), guard or "")


# Instructions -------------------------------------------------------------------------------------------------------


class Rule(NamedTuple):
    """What an instruction computes.

    Attributes
    ----------
    result : kind of the result
    operands : kinds of the operands
    source : Python, with the operands as {0}, {1}, ...
    """

    result: str
    operands: tuple[str, ...]
    source: str


# Of one kind throughout. Sums and products have the same bits whether their operands have signs or not.
_ALIKE = {
    "add.f32 add.rn.f32 add.f64 add.rn.f64 add.u32 add.u64": "{0} + {1}",
    "sub.f32 sub.rn.f32 sub.f64 sub.rn.f64 sub.u32 sub.u64": "{0} - {1}",
    "mul.f32 mul.rn.f32 mul.f64 mul.rn.f64 mul.lo.u32 mul.lo.u64": "{0} * {1}",
    "mad.lo.u32 mad.lo.u64": "{0} * {1} + {2}",
    "div.full.f32 div.rn.f32 div.rn.f64": "{0} / {1}",
    "fma.rn.f32": "_fma({0}, {1}, {2})",
    "neg.f32 neg.f64 neg.s32 neg.s64": "-{0}",
    "abs.f32 abs.f64 abs.s32": "abs({0})",
    "copysign.f32": "_np.copysign({1}, {0})",
    "min.f32": "_np.fmin({0}, {1})",
    "max.f32": "_np.fmax({0}, {1})",
    "min.NaN.f32 min.u32 min.s32 min.u64 min.s64": "_np.minimum({0}, {1})",
    "max.NaN.f32 max.u32 max.s32 max.u64 max.s64": "_np.maximum({0}, {1})",
    "and.b32 and.b64 and.pred": "{0} & {1}",
    "or.b32 or.b64 or.pred": "{0} | {1}",
    "xor.b32 xor.b64 xor.pred": "{0} ^ {1}",
    "not.b32 not.b64 not.pred": "~{0}",
    "tanh.approx.f32": "_np.tanh({0})",
}  # fmt: skip
# Approximate and correctly rounded ones.
_APPROXIMATE = {
    "ex2": "_np.exp2({0})", "lg2": "_np.log2({0})", "rcp": "1 / {0}", "sqrt": "_np.sqrt({0})",
    "rsqrt": "1 / _np.sqrt({0})", "sin": "_np.sin({0})", "cos": "_np.cos({0})",
}  # fmt: skip
_COMPARED = {
    "eq": "{0} == {1}", "ne": "({0} < {1}) | ({0} > {1})", "lt": "{0} < {1}", "le": "{0} <= {1}", "gt": "{0} > {1}",
    "ge": "{0} >= {1}", "equ": "~(({0} < {1}) | ({0} > {1}))", "neu": "{0} != {1}", "ltu": "~({0} >= {1})",
    "leu": "~({0} > {1})", "gtu": "~({0} <= {1})", "geu": "~({0} < {1})",
    "nan": "({0} != {0}) | ({1} != {1})", "num": "({0} == {0}) & ({1} == {1})",
}  # fmt: skip
# numpy shifts everything out where there are not so many bits, as PTX does.
_OTHERS = {
    "mul.wide.u32": Rule("u8", ("u4", "u4"), "{0}.astype('u8') * {1}"),
    "mul.wide.s32": Rule("i8", ("i4", "i4"), "{0}.astype('i8') * {1}"),
    "mad.wide.u32": Rule("u8", ("u4", "u4", "u8"), "{0}.astype('u8') * {1} + {2}"),
    "mad.wide.s32": Rule("i8", ("i4", "i4", "i8"), "{0}.astype('i8') * {1} + {2}"),
    "mul.hi.u32": Rule("u4", ("u4", "u4"), "({0}.astype('u8') * {1} >> 32).astype('u4')"),
    "shl.b32": Rule("u4", ("u4", "u4"), "{0} << {1}"),
    "shl.b64": Rule("u8", ("u8", "u4"), "{0} << {1}"),
    "shr.u32": Rule("u4", ("u4", "u4"), "{0} >> {1}"),
    "shr.u64": Rule("u8", ("u8", "u4"), "{0} >> {1}"),
    "shr.s32": Rule("i4", ("i4", "i4"), "{0} >> {1}"),
    "shr.s64": Rule("i8", ("i8", "i4"), "{0} >> {1}"),
    "shf.l.wrap.b32": Rule("u4", ("u4", "u4", "u4"), "({1} << ({2} & 31)) | ({0} >> (32 - ({2} & 31)))"),
    "shf.r.wrap.b32": Rule("u4", ("u4", "u4", "u4"), "({0} >> ({2} & 31)) | ({1} << (32 - ({2} & 31)))"),
    "cvt.rni.s32.f32": Rule("i4", ("f4",), "_whole(_np.rint({0}))"),
    "cvt.rzi.s32.f32": Rule("i4", ("f4",), "_whole(_np.trunc({0}))"),
    "cvt.rni.ftz.s32.f32": Rule("i4", ("f4",), "_whole(_np.rint({0}))"),
    "cvt.rni.f32.f32": Rule("f4", ("f4",), "_np.rint({0})"),
    "cvt.rzi.f32.f32": Rule("f4", ("f4",), "_np.trunc({0})"),
    "cvt.rmi.f32.f32": Rule("f4", ("f4",), "_np.floor({0})"),
    "cvt.rpi.f32.f32": Rule("f4", ("f4",), "_np.ceil({0})"),
}
# Conversions that numpy makes in the same way.
_CONVERTED = """
    cvt.u64.u32 cvt.s64.s32 cvt.u32.u64 cvt.rn.f32.s32 cvt.rn.f32.u32 cvt.rn.f32.f64 cvt.rn.f32.s64 cvt.rn.f64.s32
    cvt.rn.f64.s64 cvt.f64.f32
    """.split()
_TINY = np.finfo("f4").tiny


@functools.cache
def rules() -> dict[str, Rule]:
    """Those of all instructions that compute one register from others."""
    found = dict(_OTHERS)
    for names, source in _ALIKE.items():
        for name in names.split():
            kind, operands = KINDS[name.rpartition(".")[2]], set(re.findall(r"\{\d\}", source))
            found[name] = Rule(kind, (kind,) * len(operands), source)
            if kind == "f4":
                # Triton links libdevice in its form without numbers below 2^-126.
                flushed = source.format(*(f"_flushed({operand})" for operand in sorted(operands)))
                found[name.replace(".f32", ".ftz.f32")] = found[name]._replace(source=f"_flushed({flushed})")
    for name, source in _APPROXIMATE.items():
        found[f"{name}.approx.f32"] = Rule("f4", ("f4",), source)
        found[f"{name}.approx.ftz.f32"] = Rule("f4", ("f4",), f"_flushed({source.format('_flushed({0})')})")
    found |= {f"{name}.rn.f32": found[f"{name}.approx.f32"] for name in ("rcp", "sqrt")}
    for name in ("add", "sub", "mul.lo", "mad.lo"):
        found |= {f"{name}.s{bits}": found[f"{name}.u{bits}"] for bits in (32, 64)}
    for name in _CONVERTED:
        to, of = (KINDS[part] for part in name.split(".")[-2:])
        found[name] = Rule(to, (of,), f"{{0}}.astype('{to}')")
    for kind in ("f32", "f64", "b32", "u32", "s32", "b64", "u64", "s64"):
        k = KINDS[kind]
        found[f"selp.{kind}"] = Rule(k, (k, k, "?"), "_chosen({2}, {0}, {1})")
        for how, source in _COMPARED.items():
            found[f"setp.{how}.{kind}"] = Rule("?", (k, k), source)
            flushed = source.format("_flushed({0})", "_flushed({1})")
            found[f"setp.{how}.ftz.{kind}"] = Rule("?", (k, k), flushed)
    return found


def _fma(a, b, c):
    # The product of two float32 is a float64 without rounding.
    return (np.multiply(a, b, dtype="f8") + c).astype("f4")


def _flushed(x):
    """Numbers below 2^-126 as zeros."""
    small = abs(x) < _TINY
    return np.where(small, np.copysign(np.float32(0), x), x)[()] if small.any() else x


def _whole(x):
    """A whole float32 as the nearest int32; NaN is 0."""
    return np.where(x == x, np.clip(x.astype("f8"), -(2.0**31), 2.0**31 - 1), 0.0)[()].astype("i4")


def _chosen(which, a, b):
    return (a if which else b) if which.ndim == 0 else np.where(which, a, b)


def _parted(which) -> bool:
    """Whether some threads have it and others not."""
    return which.ndim > 0 and bool((which != which[0]).any())


def _decided(which) -> bool:
    """What all threads have."""
    if which.ndim == 0:
        return bool(which)
    if _parted(which):
        raise PtxError("threads part at a branch")
    return bool(which[0])


def _elected(threads):
    """Each warp's first thread."""
    return threads % WARP == 0


def _shuffled(how: str, x, by, clamp, mask):
    """The value of another thread of the warp."""
    if int(mask) & 0xFFFFFFFF != 0xFFFFFFFF or int(clamp) != (0 if how == "up" else 31):
        raise PtxError(f"shfl.sync.{how} within a part of a warp")
    if x.ndim == 0:
        return x
    lane = np.arange(WARP)
    sources = {"idx": np.full(WARP, by), "bfly": lane ^ by, "down": lane + by, "up": lane - by}[how].astype(int)
    within = (sources >= 0) & (sources < WARP)
    return x.reshape(-1, WARP)[:, np.where(within, sources, lane)].reshape(-1)


# Memory -------------------------------------------------------------------------------------------------------------


class _Array(NamedTuple):
    """Words of memory; of shared and local memory each block or thread has some for itself.

    Attributes
    ----------
    words, floats : of all of them, two views of the same bits
    own : the first word of each thread, or ``None`` if there is one array
    size : words of one of them
    """

    name: str
    words: np.ndarray
    floats: np.ndarray
    own: np.ndarray | None
    size: int


class Memory:
    """All that a kernel can address; an address has the number of its array above, and the byte within it below."""

    def __init__(self):
        self.arrays: list[_Array] = []

    def add(self, name: str, x, own: np.ndarray | None = None, size: int | None = None) -> np.uint64:
        """The address of a copy of an array, of 32-bit words."""
        words = np.ravel(x).view("u4")
        size = words.size if size is None else size
        words = np.pad(words, (0, -words.size % _VECTOR), constant_values=_NAN)
        self.arrays.append(_Array(name, words, words.view("f4"), own, size))
        return np.uint64(len(self.arrays) * _ROOM)

    def find(self, address, offset: int, threads: Any = slice(None), more: int = 0) -> tuple[_Array, Any]:
        """The array of an address, and the number of the word of each of the threads, or so many more."""
        first = int(address if address.ndim == 0 else address[0]) + offset
        number = (first + _ROOM // 2) // _ROOM - 1
        if not 0 <= number < len(self.arrays):
            raise PtxError(f"the address {first:#x} is of no array")
        array, base = self.arrays[number], (number + 1) * _ROOM
        if address.ndim == 0:
            at, left = divmod(first - base, 4)
            good = left == 0 and 0 <= at < array.size
        else:
            at = address - np.uint64(base - offset)
            # The two lowest bits go to the top: what is no multiple of 4 is out of bounds too.
            at = (at >> 2) | (at << 62)
            good = at.max() < array.size
            at = at.view("i8")
        if not good:
            raise PtxError(f"word {np.min(at)} to {np.max(at)} of {array.name}, which has {array.size}")
        at = at + more if more else at
        return array, at if array.own is None else at + array.own[threads]

    def load(self, address, offset: int, kind: str, place: int = 0, which=None):
        """A 32-bit word, the one of this place in a vector; 0 for threads that ``which`` leaves out.

        The address of a vector is a multiple of its size, so that none crosses a page: where three words of four are
        wanted, LLVM loads the fourth as well, be it beyond the array.
        """
        if which is None or which.all():
            array, at = self.find(address, offset, more=place)
            return (array.floats if kind == "f4" else array.words)[at]
        values = np.zeros(which.shape, kind)
        if which.any():
            threads = np.flatnonzero(which)
            array, at = self.find(address[threads] if address.ndim else address, offset, threads, place)
            values[threads] = (array.floats if kind == "f4" else array.words)[at]
        return values[()]

    def store(self, address, offset: int, value, which=None) -> None:
        """Store 32-bit words, of the threads that ``which`` names, or of all."""
        threads: Any = slice(None)
        if which is not None and which.ndim:
            threads = np.flatnonzero(which)
            address, value = (x[threads] if x.ndim else x for x in (address, value))
        if which is not None and not which.any():
            return
        array, at = self.find(address, offset, threads)
        if np.ndim(at) == 0 and value.ndim:
            at = np.full(value.shape, at)
        array.words[at] = value
        if np.any(array.words[at] != value):
            raise PtxError(f"threads store different values at one place of {array.name}")


# Translation --------------------------------------------------------------------------------------------------------


class _Translator:
    """The source of a Python function ``_run(_memory, _base, tid_x, ctaid_x, ntid_x, nctaid_x)``.

    A register keeps the kind that most instructions take it for; others see its bits as theirs.
    """

    def __init__(self, entry: Entry):
        self.entry = entry
        self.constants: dict[str, Any] = {}
        self.labels = {x.name[:-1]: at for at, x in enumerate(self._labels())}
        self.definitions = Counter(name for x in entry.code for name in x.results)
        votes: dict[str, Counter] = defaultdict(Counter)
        for x in entry.code:
            if rule := rules().get(x.name):
                for operand, kind in zip(x.operands, (rule.result, *rule.operands), strict=True):
                    votes[operand][{"i4": "u4", "i8": "u8"}.get(kind, kind)] += 1
        self.kinds = {name: given.most_common(1)[0][0] for name, given in votes.items() if name.startswith("%")}

    def _labels(self) -> list[Instruction]:
        """The first block begins without one."""
        return [Instruction(":"), *(x for x in self.entry.code if x.is_label)]

    def source(self) -> str:
        lines = ["def _run(_memory, _base, tid_x, ctaid_x, ntid_x, nctaid_x):", " _at = 0", " while True:"]
        code = (Instruction(":"), *self.entry.code)
        for i, x in enumerate(code):
            if x.is_label:
                number = self.labels[x.name[:-1]]
                lines += [f"   _at = {number}", f"  if _at == {number}:"] if i else ["  if _at == 0:"]
                lines.append("   pass")
            elif x.name in ("bra", "bra.uni"):
                lines += [f"   {line}" for line in self._branch(x, self._skipped(code, i))]
            else:
                lines.append(f"   {self._line(x)}")
        return "\n".join(lines)

    def _skipped(self, code, i: int) -> list[Instruction] | None:
        """The instructions that a branch skips, if nothing else leads among them and they have no branch."""
        target = code[i].operands[0]
        for end in range(i + 1, len(code)):
            x = code[end]
            if x.name in (f"{target}:", "bra.uni") and (x.is_label or x.operands[0] == target):
                return list(code[i + 1 : end])
            if x.is_label or x.guard or x.name.startswith(("bra", "ret", "bar.", "shfl.", "elect.")):
                return None
        return None

    def _branch(self, x: Instruction, skipped: list[Instruction] | None) -> Iterator[str]:
        jump = f"_at = {self.labels[x.operands[0]]}; continue"
        if not x.guard:
            yield jump
            return
        if skipped is not None:
            yield f"if _parted({self._guard(x.guard)}):"
            # Threads that part meet again at once: meanwhile the others do nothing.
            other = x.guard[1:] if x.guard.startswith("!") else f"!{x.guard}"
            yield from (f" {self._line(y._replace(guard=other))}" for y in skipped)
            yield f" {jump}"
        yield f"if _decided({self._guard(x.guard)}): {jump}"

    def _line(self, x: Instruction) -> str:
        head = x.name.split(".")[0]
        if rule := rules().get(x.name):
            operands = [self.read(text, kind) for text, kind in zip(x.operands[1:], rule.operands, strict=True)]
            return self.write(x, x.operands[0], rule.source.format(*operands), rule.result)
        if (found := getattr(self, f"_{head}", None)) and (line := found(x)):
            return line
        # A kernel may have instructions for what does not occur, as sin has for numbers beyond 1e5.
        return f"raise _PtxError('this machine does not know {x.name}')"

    # Operands

    def name(self, register: str) -> str:
        return register.lstrip("%").replace(".", "_")

    def _guard(self, guard: str) -> str:
        return f"~{self.name(guard[1:])}" if guard.startswith("!") else self.name(guard)

    def kind(self, register: str) -> str:
        """Of a register; without instructions that tell, whole numbers."""
        prefix = {"%p": "?", "%rd": "u8", "%S": "u8"}.get(re.sub(r"(%p|%rd|%S|%\w).*", r"\1", register), "u4")
        return self.kinds.get(register, prefix)

    def read(self, text: str, kind: str) -> str:
        """An operand as a value of this kind."""
        if text.startswith("%"):
            name, own = self.name(text), self.kind(text)
            # A conversion takes the low word of a register.
            name = f"{name}.astype('u4')" if own == "u8" and kind[1:] == "4" else name
            return name if own == kind else f"{name}.view('{kind}')"
        if text in self.entry.shared or text in self.entry.local or text in self.entry.constants:
            return f"_base[{text!r}]"
        name = f"_c{len(self.constants)}"
        self.constants[name] = _literal(text, kind)
        return name

    def write(self, x: Instruction, register: str, source: str, kind: str) -> str:
        own = self.kind(register)
        value = source if own == kind else f"({source}).view('{own}')"
        name = self.name(register)
        # Where nothing else writes a register, its threads without the guard do not read it.
        if x.guard and self.definitions[register] > 1:
            value = f"_chosen({self._guard(x.guard)}, {value}, {name})"
        return f"{name} = {value}"

    def _address(self, text: str) -> str:
        """The two arguments of a load or store."""
        match = re.fullmatch(r"\[([%$\w]+)(?:\+(-?\d+))?\]", text)
        assert match, text
        base, offset = match.groups()
        return f"{self.read(base, 'u8')}, {int(offset or 0)}"

    # Instructions with rules of their own; `None` for those that are not known

    def _mov(self, x: Instruction) -> str | None:
        if "{" in "".join(x.operands):
            return None
        kind = self.kind(x.operands[0])
        return self.write(x, x.operands[0], self.read(x.operands[1], kind), kind)

    _cvta = _mov

    def _ld(self, x: Instruction) -> str | None:
        if x.name in ("ld.param::entry.b64", "ld.param.b64"):
            return f"{self.name(x.operands[0])} = _base[{x.operands[1].strip('[]')!r}]"
        if not re.fullmatch(r"ld\.(global|shared|local)(\.nc)?(\.v[24])?\.[bf]32", x.name):
            return None
        lines, (base, _, offset) = [], self._address(x.operands[1]).rpartition(", ")
        which = f", {self._guard(x.guard)}" if x.guard else ""
        for i, register in enumerate(x.results):
            kind = self.kind(register)
            source = f"_memory.load({base}, {offset}, '{kind}'{f', {i}' if i or which else ''}{which})"
            lines.append(self.write(x, register, source, kind))
        return "; ".join(lines)

    def _st(self, x: Instruction) -> str | None:
        if not re.fullmatch(r"st\.(global|shared|local)(\.v[24])?\.[bf]32", x.name):
            return None
        base, _, offset = self._address(x.operands[0]).rpartition(", ")
        values = re.findall(r"[%\w]+", x.operands[1])
        which = f", {self._guard(x.guard)}" if x.guard else ""
        return "; ".join(
            f"_memory.store({base}, {int(offset) + 4 * i}, {self.read(value, 'u4')}{which})"
            for i, value in enumerate(values)
        )

    def _shfl(self, x: Instruction) -> str | None:
        match = re.fullmatch(r"shfl\.sync\.(idx|bfly|down|up)\.b32", x.name)
        if not match or x.guard or len(x.results) != 1:
            return None
        value, by, clamp, mask = (self.read(text, "u4") for text in x.operands[1:])
        return self.write(x, x.results[0], f"_shuffled('{match[1]}', {value}, {by}, {clamp}, {mask})", "u4")

    def _elect(self, x: Instruction) -> str:
        register, chosen = map(self.name, x.results)
        return f"{register} = _zero; {chosen} = _elected(tid_x)"

    def _bar(self, x: Instruction) -> str | None:
        return "pass" if x.name == "bar.sync" and not x.guard else None

    def _fence(self, x: Instruction) -> str:
        return "pass"

    def _ret(self, x: Instruction) -> str | None:
        return None if x.guard else "return"


def _literal(text: str, kind: str):
    """A constant of PTX."""
    if kind == "?":
        return np.bool_(int(text) != 0)
    bits = int(text[2:], 16) if re.match(r"0[fd]", text) else int(text, 0)
    size = int(kind[1])
    return np.frombuffer((bits % (1 << 8 * size)).to_bytes(size, "little"), kind)[0]


# The machine --------------------------------------------------------------------------------------------------------


class Program:
    """A kernel that can be run."""

    def __init__(self, ptx: str):
        self.entry = parse(ptx)
        translator = _Translator(self.entry)
        source = translator.source()
        scope = {
            "_np": np, "_fma": _fma, "_flushed": _flushed, "_whole": _whole, "_chosen": _chosen, "_parted": _parted,
            "_decided": _decided, "_elected": _elected, "_shuffled": _shuffled, "_PtxError": PtxError,
            "_zero": np.uint32(0), **translator.constants,
        }  # fmt: skip
        exec(compile(source, "<PTX>", "exec"), scope)
        self._run: Any = scope["_run"]

    def run(
        self, operands: Sequence[np.ndarray], outs: Sequence[Any], blocks: int, shared: int = 0, order=None
    ) -> list[np.ndarray]:
        """Launch the kernel.

        Parameters
        ----------
        operands, outs : arrays, and what has the shape and type of those that are returned; of 32-bit numbers
        blocks : of the grid
        shared : bytes of shared memory whose number PTX does not tell
        order : for each parameter the number of its array; operands and outs, as they come
        """
        entry, memory, base = self.entry, Memory(), {}
        unwritten = [np.full(out.shape, _NAN) for out in outs]
        places = [memory.add(f"array {i}", x) for i, x in enumerate((*operands, *unwritten))]
        order = range(len(places)) if order is None else order
        if len(order) != len(entry.params):
            raise PtxError(f"{len(order)} arrays for a kernel of {len(entry.params)} parameters")
        base |= {name: places[i] for name, i in zip(entry.params, order)}
        for name, x in entry.constants.items():
            base[name] = memory.add(name, np.frombuffer(x.ljust(-(-len(x) // 4) * 4, b"\0"), "u4"))
        threads = np.arange(blocks * entry.threads, dtype="u4")
        block = threads // np.uint32(entry.threads)
        for names, owner in ((entry.shared, block), (entry.local, threads)):
            for name, size in names.items():
                words = -(-(size or shared) // 4)
                everywhere = np.full(words * (int(owner[-1]) + 1), _NAN)
                own = owner.astype("i8") * words if owner[-1] else None
                base[name] = memory.add(name, everywhere, own, words)
        with np.errstate(all="ignore"):
            self._run(
                memory, base, threads % np.uint32(entry.threads), block if blocks > 1 else np.uint32(0),
                np.uint32(entry.threads), np.uint32(blocks),
            )  # fmt: skip
        results = memory.arrays[len(operands) :]
        return [x.words[: x.size].view(out.dtype).reshape(out.shape) for x, out in zip(results, outs)]
