"""This machine's compiler: LLVM's assembly to machine code, which is kept on disk, and its addresses in memory."""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import hashlib
import threading
from collections.abc import Callable

import llvmlite
import llvmlite.binding as llvm

from ..._version import __version__
from ...codegen import kernel_cache

_LOCK = threading.RLock()
_ADDRESSES: dict[str, int] = {}
#: How far LLVM goes.
LEVEL = 3
#: From C's library, for kernels that call it.
_FROM_C = (
    "pthread_create pthread_join sched_yield madvise " + " ".join(f"{name} {name}f" for name in (
        "sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh exp exp2 expm1 log log1p erf erfc pow atan2 cbrt "
        "fmod nextafter floor ceil rint round").split())
).split()  # fmt: skip

# x[i] = x[i] * x[i] for i < 4096.
_LOOP = """
define void @loop(ptr %x) {
entry:
  br label %next
next:
  %i = phi i64 [ 0, %entry ], [ %after, %next ]
  %at = getelementptr float, ptr %x, i64 %i
  %old = load float, ptr %at
  %new = fmul float %old, %old
  store float %new, ptr %at
  %after = add nsw i64 %i, 1
  %more = icmp slt i64 %after, 4096
  br i1 %more, label %next, label %end
end:
  ret void
}
"""


class Machine:
    """LLVM for this processor; one in a process."""

    def __init__(self) -> None:
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        target = llvm.Target.from_triple(llvm.get_process_triple())
        self.processor, self.features = llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()
        self.triple = target.triple
        # LLVM's code for memory that it lays out itself: static on x86, as nothing of it moves.
        reloc = "static" if self.triple.startswith(("x86", "i386", "i686")) else "default"
        self.target = target.create_target_machine(
            cpu=self.processor, features=self.features, opt=LEVEL, reloc=reloc, codemodel="jitdefault", jit=True
        )
        empty = llvm.parse_assembly("")
        empty.triple = self.triple
        self.engine = llvm.create_mcjit_compiler(empty, self.target)
        mathematics = ctypes.util.find_library("m")
        libraries = [ctypes.CDLL(None), *([ctypes.CDLL(mathematics)] if mathematics else [])]
        for name in _FROM_C:
            found = next((f for library in libraries if (f := getattr(library, name, None))), None)
            if found:
                llvm.add_symbol(name, ctypes.cast(found, ctypes.c_void_p).value)

    @functools.cached_property
    def vector_bytes(self) -> int:
        """Of the vectors that LLVM makes of a loop here: it may have wider ones that it does not take unasked."""
        text = self.target.emit_assembly(self._optimised(_LOOP))
        return next((size for size, register in ((64, "%zmm"), (32, "%ymm")) if register in text), 16)

    def compile(self, assembly: str) -> bytes:
        """The machine code of a module, as an object file."""
        return self.target.emit_object(self._optimised(assembly))

    def _optimised(self, assembly: str) -> llvm.ModuleRef:
        module = llvm.parse_assembly(assembly)
        module.triple, module.data_layout = self.triple, str(self.engine.target_data)
        module.verify()
        options = llvm.create_pipeline_tuning_options(speed_level=LEVEL)
        options.loop_vectorization, options.slp_vectorization = True, False
        passes = llvm.create_pass_builder(self.target, options)
        passes.getModulePassManager().run(module, passes)
        return module

    def load(self, name: str, code: bytes) -> int:
        """The address in memory of a function of an object file."""
        self.engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        self.engine.finalize_object()
        return self.engine.get_function_address(name)


@functools.cache
def machine() -> Machine:
    return Machine()


def function(name: str, assembly: Callable[[], str]) -> int:
    """The address of a function of this name, compiled now from its assembly, or before."""
    with _LOCK:
        if name not in _ADDRESSES:
            file = f"{name}-{_surroundings()}.kernel"
            code = kernel_cache.load(file)
            if code is None:
                code = machine().compile(assembly())
                kernel_cache.keep(file, code)
            _ADDRESSES[name] = machine().load(name, code)
        return _ADDRESSES[name]


def _surroundings() -> str:
    """What machine code depends on besides its source: the machine, and the versions of all that had a part in it."""
    this = machine()
    of = (__version__, llvmlite.__version__, llvm.llvm_version_info, this.triple, this.processor, this.features, LEVEL)
    return hashlib.sha256(repr(of).encode()).hexdigest()[:16]
