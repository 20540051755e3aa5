"""Interrupts: no Ctrl-C is lost or crashes while the package is at work, and the command line ends on one at once."""

from __future__ import annotations

import _thread
import atexit
import contextlib
import ctypes
import functools
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from . import _jax, _program

#: Seconds from a signal to the end of a command line that is in the midst of a call that cannot be interrupted.
GRACE = 1.0
#: Seconds until an interrupt that was not raised, or was lost, is tried again.
_AGAIN = 0.05
#: Functions that no exception leaves: Python drops it there, or C++ makes another of it.
_DEAF = {"__del__", "__hash__", "__eq__", "_xla_gc_callback"}
#: Packages whose code may lose an interrupt, but never handles one.
_THROUGH = {"brainmass_kernels", "brainunit", "jax", "jaxlib", "llvmlite", "numba", "numpy", "optax"}
_interrupted = False


def heard(function: Callable) -> Callable:
    """Let an interrupt of a function raise KeyboardInterrupt, soon and surely, wherever the main thread is.

    Python raises it where the main thread happens to be. In a finaliser or the callback of a weak reference it is
    printed and dropped, and a bare ``except:`` passes over it; in XLA's compiler the caller is left, but the compiler
    goes on in another thread with a module that is then freed, and the process crashes. Here it is raised when such a
    place was left, and again until it is out. Python's own handler is replaced for the length of the call, as
    `asyncio.run` does; a handler of the user's stays.
    """

    @functools.wraps(function)
    def guarded(*args, **kwargs):
        return _Guard().call(function, args, kwargs) if _replaceable() else function(*args, **kwargs)

    return guarded


def _replaceable() -> bool:
    main = threading.current_thread() is threading.main_thread()
    return main and signal.getsignal(signal.SIGINT) is signal.default_int_handler


class _Guard:
    """One call under guard; ``wanted`` from an interrupt until it is on its way to the caller."""

    def __init__(self):
        self.wanted, self.active, self.retrying, self.lock = False, True, False, threading.Lock()
        #: The error that the caller is dealing with, which may be an earlier interrupt.
        self.before = sys.exc_info()[1]

    def call(self, function: Callable, args, kwargs):
        global _interrupted
        hook = sys.unraisablehook
        try:
            signal.signal(signal.SIGINT, self.handle)
            sys.unraisablehook = functools.partial(self.drop, hook)
            found = function(*args, **kwargs)
        except KeyboardInterrupt:
            self.wanted, _interrupted = False, True
            raise
        except BaseException as error:
            if self.wanted:
                raise KeyboardInterrupt from error
            raise
        finally:
            with self.lock:
                self.active = False
            last = signal.signal(signal.SIGINT, signal.default_int_handler)
            if last != self.handle:
                # The function set another.
                signal.signal(signal.SIGINT, last)
            sys.unraisablehook = hook
        if self.wanted:
            raise KeyboardInterrupt
        return found

    def handle(self, number: int, frame: FrameType | None) -> None:
        self.wanted = True
        if not self.active:
            return
        if _deaf(frame) or _handled(sys.exc_info()[1], self.before):
            return self.retry()
        if _through(frame):
            self.retry()
        else:
            # Code of the user's may handle it.
            self.wanted = False
        signal.default_int_handler(number, frame)

    def drop(self, hook: Callable, dropped: Any) -> None:
        """Of what Python drops, an interrupt is not told: it comes again."""
        if issubclass(dropped.exc_type, KeyboardInterrupt):
            self.wanted = True
            self.retry()
        else:
            hook(dropped)

    def retry(self) -> None:
        if not self.retrying:
            self.retrying = True
            # A bare thread: those of `threading` take locks, which the interrupted code may hold.
            _thread.start_new_thread(self.interrupt, ())

    def interrupt(self) -> None:
        while True:
            time.sleep(_AGAIN)
            with self.lock:
                if not (self.active and self.wanted):
                    self.retrying = False
                    return
                _thread.interrupt_main()


def _callers(frame: FrameType | None) -> Iterator[FrameType]:
    """Frames from the innermost to the guarded call."""
    while frame is not None and frame.f_code is not _Guard.call.__code__:
        yield frame
        frame = frame.f_back


def _deaf(frame: FrameType | None) -> bool:
    return any(at.f_code.co_name in _DEAF or _jax.compiles(at) or _links(at) for at in _callers(frame))


def _links(frame: FrameType) -> bool:
    """Whether a frame hands LLVM's modules over: left midway, a module has two owners and is freed twice."""
    return frame.f_globals.get("__name__", "").startswith(("llvmlite.", "numba.core.codegen"))


def _through(frame: FrameType | None) -> bool:
    """Whether only code that never handles an interrupt is between it and the guarded call."""
    packages = {at.f_globals.get("__name__", "").partition(".")[0] for at in _callers(frame)}
    return packages <= _THROUGH | sys.stdlib_module_names - {"__main__"}


def _handled(error: BaseException | None, before: BaseException | None) -> bool:
    """Whether an interrupt is on its way, and what runs is an `except` or a `finally` that it passes."""
    while error is not None and error is not before:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__context__
    return False


@atexit.register
def _leave_runs() -> None:
    """After an interrupt the process does not wait, as it ends, for the runs that it left: JAX's clients stay."""
    if _interrupted or isinstance(getattr(sys, "last_value", None), KeyboardInterrupt):
        for client in _jax.clients():
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(client))


# The command line ---------------------------------------------------------------------------------------------------


class Ending:
    """What ends a command line on SIGINT and SIGTERM: ``status`` is 128 and the signal's number once one came."""

    def __init__(self, message: str):
        self.message, self.status, self._left = message, 0, threading.Lock()

    def stop(self, number: int, frame: FrameType | None) -> None:
        first, self.status = not self.status, 128 + number
        if first and not _deaf(frame):
            raise KeyboardInterrupt

    def watch(self, told: socket.socket, numbers: set[int]) -> None:
        """Leave after a second signal, or a while after the first: the main thread may hear of none, or lose it."""
        with told:
            first = _next(told, numbers)
            if first:
                told.settimeout(GRACE)
                _next(told, numbers)
                self.status = 128 + first
                self.leave()

    def leave(self) -> None:
        """End the process without what Python and XLA do at their end, which would wait for what is under way."""
        if self._left.acquire(blocking=False):
            cursor = "\x1b[?25h" if os.isatty(2) else ""
            with contextlib.suppress(OSError):
                os.write(2, f"{cursor}{self.message}\n".encode())
        else:
            # The other thread is about to.
            time.sleep(_AGAIN)
        os._exit(self.status)


def _next(told: socket.socket, numbers: set[int]) -> int:
    """The next of these signals, or 0 where none came in time or the other end was closed."""
    with contextlib.suppress(TimeoutError):
        while got := told.recv(1):
            if got[0] in numbers:
                return got[0]
    return 0


@contextlib.contextmanager
def ending(message: str) -> Iterator[Ending]:
    """Within, SIGINT and SIGTERM end the process, with status 130 and 143; for a program's main thread.

    The first one raises KeyboardInterrupt, so that files are closed as after an error; a second ends at once, and so
    does the first where `GRACE` has passed. A signal that the process was told to ignore stays ignored.
    """
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    taken = {number: signal.getsignal(number) for number in usual}
    taken = {number: handler for number, handler in taken.items() if handler in (usual[number], _program.stop)}
    told, tell = socket.socketpair()
    tell.setblocking(False)
    end, hook = Ending(message), sys.unraisablehook
    before = signal.set_wakeup_fd(tell.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=end.watch, args=(told, set(map(int, taken))), daemon=True).start()
    for number in taken:
        signal.signal(number, end.stop)
    sys.unraisablehook = lambda dropped: None if issubclass(dropped.exc_type, KeyboardInterrupt) else hook(dropped)
    try:
        yield end
    finally:
        if end.status:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
            end.leave()
        sys.unraisablehook = hook
        for number, handler in taken.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(before)
        tell.close()
