"""Interrupts: no Ctrl-C is lost or crashes a running call, and the command line ends on one at once."""

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

from . import _program

#: Seconds from a signal to the end of a command line whose current call cannot be interrupted.
GRACE = 1.0
#: Seconds until an interrupt that was not raised, or was lost, is raised again.
_RETRY = 0.05
#: Functions that no exception leaves: Python drops it there, or C++ turns it into another.
_SWALLOWING = {"__del__", "__hash__", "__eq__", "_xla_gc_callback"}
#: Packages whose code may lose an interrupt, but never handles one.
_WITHOUT_HANDLERS = {"blackjax", "brainmass_kernels", "brainunit", "jax", "jaxlib", "llvmlite", "numba", "numpy"}
_WITHOUT_HANDLERS |= {"optax"}
_interrupted = False


def interruptible(function: Callable) -> Callable:
    """Make an interrupt of a function raise KeyboardInterrupt, soon and surely, wherever the main thread is.

    Python raises it where the main thread happens to be. In a finaliser or the callback of a weak reference Python
    prints and drops it, and a bare ``except:`` swallows it. In XLA's compiler it leaves the caller, but the compiler
    continues in another thread with a module that is then freed, and the process crashes. Here it is raised after such
    a place, and again until it leaves the function. Python's default handler is replaced during the call, as in
    `asyncio.run`; a handler that the user has set stays.
    """

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return _Guard().call(function, args, kwargs) if _replaceable() else function(*args, **kwargs)

    return wrapper


def _replaceable() -> bool:
    main = threading.current_thread() is threading.main_thread()
    return main and signal.getsignal(signal.SIGINT) is signal.default_int_handler


class _Guard:
    """One interruptible call; an interrupt is ``pending`` until it is on its way to the caller."""

    def __init__(self):
        self.pending, self.active, self.retrying, self.lock = False, True, False, threading.Lock()
        #: The error that the caller is handling, which may be an earlier interrupt.
        self.before = sys.exc_info()[1]

    def call(self, function: Callable, args, kwargs):
        global _interrupted
        hook = sys.unraisablehook
        try:
            signal.signal(signal.SIGINT, self.handle)
            sys.unraisablehook = functools.partial(self.drop, hook)
            result = function(*args, **kwargs)
        except KeyboardInterrupt:
            self.pending, _interrupted = False, True
            raise
        except BaseException as error:
            if self.pending:
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
        if self.pending:
            raise KeyboardInterrupt
        return result

    def handle(self, number: int, frame: FrameType | None) -> None:
        self.pending = True
        if not self.active:
            return
        if _swallows(frame) or _is_unwinding(sys.exc_info()[1], self.before):
            return self.retry()
        if _reaches_caller(frame):
            self.retry()
        else:
            # User code may handle it.
            self.pending = False
        signal.default_int_handler(number, frame)

    def drop(self, hook: Callable, dropped: Any) -> None:
        """Python's hook for dropped exceptions, except for an interrupt, which is raised again."""
        if issubclass(dropped.exc_type, KeyboardInterrupt):
            self.pending = True
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
            time.sleep(_RETRY)
            with self.lock:
                if not (self.active and self.pending):
                    self.retrying = False
                    return
                _thread.interrupt_main()


def _callers(frame: FrameType | None) -> Iterator[FrameType]:
    """Frames from the innermost to the interruptible call."""
    while frame is not None and frame.f_code is not _Guard.call.__code__:
        yield frame
        frame = frame.f_back


def _swallows(frame: FrameType | None) -> bool:
    """Whether an exception raised here would not reach the caller, or must not be raised."""
    return any(at.f_code.co_name in _SWALLOWING or _compiles(at) or _links(at) for at in _callers(frame))


def _compiles(frame: FrameType) -> bool:
    """Whether a frame waits for XLA's compiler."""
    return frame.f_code.co_name.startswith("backend_compile") and frame.f_globals.get("__name__", "").startswith("jax.")


def _links(frame: FrameType) -> bool:
    """Whether a frame passes LLVM modules on: interrupted midway, a module has two owners and is freed twice."""
    return frame.f_globals.get("__name__", "").startswith("llvmlite.")


def _reaches_caller(frame: FrameType | None) -> bool:
    """Whether no code between a frame and the interruptible call handles interrupts."""
    packages = {at.f_globals.get("__name__", "").partition(".")[0] for at in _callers(frame)}
    return packages <= _WITHOUT_HANDLERS | sys.stdlib_module_names - {"__main__"}


def _is_unwinding(error: BaseException | None, before: BaseException | None) -> bool:
    """Whether an interrupt is on its way to the caller, through an `except` or a `finally` that runs now."""
    while error is not None and error is not before:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__context__
    return False


@atexit.register
def _abandon_runs() -> None:
    """Keep JAX's clients after an interrupt, so that the process ends without waiting for runs that it left."""
    if "jax" in sys.modules and (_interrupted or isinstance(getattr(sys, "last_value", None), KeyboardInterrupt)):
        from . import _jax

        for client in _jax.clients():
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(client))


# The command line ---------------------------------------------------------------------------------------------------


class Ending:
    """Ends a command line on SIGINT and SIGTERM; ``status`` is 128 plus the number of the first signal."""

    def __init__(self, message: str):
        self.message, self.status, self._left = message, 0, threading.Lock()

    def stop(self, number: int, frame: FrameType | None) -> None:
        first, self.status = not self.status, 128 + number
        if first and not _swallows(frame):
            raise KeyboardInterrupt

    def watch(self, signals: socket.socket, numbers: set[int]) -> None:
        """Leave after a second signal, or `GRACE` after the first, which the main thread may not get or may lose."""
        with signals:
            first = _next(signals, numbers)
            if first:
                signals.settimeout(GRACE)
                _next(signals, numbers)
                self.status = 128 + first
                self.leave()

    def finish(self, status: int) -> None:
        """End the process, whose work is done; during Python's and XLA's clean-up a signal would still kill it."""
        _flush()
        os._exit(status)

    def leave(self) -> None:
        """End the process without Python's and XLA's clean-up, which would wait for running calls."""
        if self._left.acquire(blocking=False):
            cursor = "\x1b[?25h" if os.isatty(2) else ""
            with contextlib.suppress(OSError):
                os.write(2, f"{cursor}{self.message}\n".encode())
        else:
            # The other thread is about to end the process.
            time.sleep(_RETRY)
        os._exit(self.status)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


def _next(signals: socket.socket, numbers: set[int]) -> int:
    """The next of these signals; 0 if none comes in time or the other end is closed."""
    with contextlib.suppress(TimeoutError):
        while byte := signals.recv(1):
            if byte[0] in numbers:
                return byte[0]
    return 0


@contextlib.contextmanager
def ending(message: str) -> Iterator[Ending]:
    """A context in which SIGINT and SIGTERM end the process, with status 130 and 143; for a program's main thread.

    The first signal raises KeyboardInterrupt, so that files are closed as after an error. A second one ends the
    process at once, and so does the first after `GRACE`. A signal that the process ignores stays ignored.
    """
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    handlers = {number: signal.getsignal(number) for number in usual}
    handlers = {number: handler for number, handler in handlers.items() if handler in (usual[number], _program.stop)}
    signals, wakeup = socket.socketpair()
    wakeup.setblocking(False)
    end, hook = Ending(message), sys.unraisablehook
    before = signal.set_wakeup_fd(wakeup.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=end.watch, args=(signals, set(map(int, handlers))), daemon=True).start()
    for number in handlers:
        signal.signal(number, end.stop)
    sys.unraisablehook = lambda dropped: None if issubclass(dropped.exc_type, KeyboardInterrupt) else hook(dropped)
    try:
        yield end
    finally:
        if end.status:
            _flush()
            end.leave()
        sys.unraisablehook = hook
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(before)
        wakeup.close()
