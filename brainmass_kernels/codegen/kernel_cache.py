"""Modules of emitted source, which live in memory, and compiled kernels and programs, which are also on disk.

A kernel is one file, written under another name and then renamed, with a checksum. What is read from it is executed:
it counts only where its folder and itself belong to this user, or to root, and nobody else may write to them. Any file
that cannot be used is as if it were not there. Where a kernel cannot be kept, a folder for temporary files takes its
place, and one warning says so.
"""

from __future__ import annotations

import functools
import hashlib
import linecache
import os
import platform
import stat
import sys
import tempfile
import threading
import types
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..notices import warn

VARIABLE = "BRAINMASS_KERNELS_CACHE"
_MAGIC = b"brainmass_kernels 1\n"
_LOCK = threading.Lock()


def kernel_module(kind: str, template: str, runtime: tuple[Path, ...], **parts: str | int) -> types.ModuleType:
    """The module of an emitted kernel, executed once in a process.

    Its name ends in a digest of its text, and its text holds one of the functions that the kernel calls.

    Parameters
    ----------
    kind : the beginning of its name, such as ``"numba_forward"``
    template : format of its text, with ``{name}``, ``{runtime}`` and what ``parts`` are called
    runtime : files of the functions that the kernel calls
    """
    with _LOCK:
        return _kernel_module(kind, template, runtime, tuple(parts.items()))


@functools.lru_cache(maxsize=1024)
def _kernel_module(kind, template, runtime, parts):
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in runtime)).hexdigest()[:16]
    text = functools.partial(template.format, runtime=digest, **dict(parts))
    name = f"brainmass_kernels_{kind}_{hashlib.sha256(text(name='').encode()).hexdigest()[:24]}"
    return module(name, text(name=name))


def module(name: str, text: str) -> types.ModuleType:
    """The module of a source. No file is written or read: compilers find the text as tracebacks do."""
    result = types.ModuleType(name)
    result.__file__ = f"<{name}>"
    linecache.cache[result.__file__] = (len(text), None, text.splitlines(keepends=True), result.__file__)
    # Compilers find a function's module by its name.
    sys.modules[name] = result
    exec(compile(text, result.__file__, "exec"), result.__dict__)
    return result


def load(name: str) -> bytes | None:
    """What was kept under a name, or ``None``."""
    data = _read(_usual, name)
    if data is None:
        data = _read(_temporary, name)
        if data is not None:
            _move_home(name, data)
    return data


def keep(name: str, data: bytes) -> None:
    """Keep bytes under a name, for other processes and later ones. Never an error: at worst they compile it again."""
    try:
        _write(_usual, name, data)
    except OSError as usual:
        try:
            place = _write(_temporary, name, data)
        except OSError as temporary:
            _warn(usual, f"Nor in a folder for temporary files: {temporary}. Each process compiles its own")
        else:
            _warn(usual, f"They are kept in {place}")


def usual() -> Path:
    """Where compiled kernels are kept: ``$BRAINMASS_KERNELS_CACHE``, or the user's folder for caches.

    Raises
    ------
    OSError : nobody knows where this user's home is
    """
    try:
        if folder := os.environ.get(VARIABLE):
            return Path(folder).expanduser()
        if sys.platform == "darwin":
            return Path.home() / "Library" / "Caches" / "brainmass_kernels"
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "brainmass_kernels"
    except RuntimeError as error:
        raise FileNotFoundError(str(error)) from error


def temporary() -> Path:
    """Where they are kept if not there; the same in all processes of a user, and lost when the machine starts anew."""
    return Path(tempfile.gettempdir()) / f"brainmass_kernels-{os.geteuid()}"


def programs() -> Path | None:
    """A folder for what XLA compiled on this kind of processor, or ``None`` where none can be kept.

    What lies in it is executed, so it is refused as a kernel's folder is.
    """
    place = usual() / f"xla-{_processor()}"
    try:
        with _opened(usual(), make=True), _opened(place, make=True):
            return place
    except OSError as error:
        _warn(error, "Each process compiles its programs anew")
        return None


def _processor() -> str:
    """A digest of the processor's kind: another may lack instructions of this one."""
    about = [platform.machine(), platform.processor()]
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        about += sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    return hashlib.sha256("\n".join(about).encode()).hexdigest()[:12]


# Folders and files ---------------------------------------------------------------------------------------------------


@contextmanager
def _usual(make: bool) -> Iterator[tuple[Path, int]]:
    with _opened(usual(), make) as folder:
        yield folder


@contextmanager
def _temporary(make: bool) -> Iterator[tuple[Path, int]]:
    # All users write to the folder around it: a link may be another's.
    with _opened(temporary(), make, os.O_NOFOLLOW) as folder:
        yield folder


@contextmanager
def _opened(path: Path, make: bool, flags: int = 0) -> Iterator[tuple[Path, int]]:
    """A folder and its descriptor, through which its files are reached: it cannot be exchanged after the check."""
    if make:
        os.makedirs(path, mode=0o700, exist_ok=True)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | flags)
    try:
        _refuse_others(os.fstat(descriptor), path)
        yield path, descriptor
    finally:
        os.close(descriptor)


def _refuse_others(status: os.stat_result, path) -> None:
    """Raise unless nobody but this user and root could have written it."""
    if status.st_uid not in (os.geteuid(), 0):
        raise PermissionError(f"{path} belongs to another user (number {status.st_uid}), so it is not read")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        mode = stat.S_IMODE(status.st_mode)
        raise PermissionError(f"others can write to {path} (mode {mode:o}), so it is not read: chmod go-w")


def _read(place, name: str) -> bytes | None:
    try:
        with place(make=False) as (path, folder):
            descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
            with open(descriptor, "rb") as file:
                _refuse_others(os.fstat(descriptor), path / name)
                content = file.read()
    except OSError:
        # Not there, or as good as not there; if that is lasting, `keep` meets it again and says so.
        return None
    data = content[len(_seal(name, b"")) :]
    return data if content.startswith(_seal(name, data)) else None


def _write(place, name: str, data: bytes) -> Path:
    """Write a file that other processes see whole or not at all; the folder that it is in."""
    with place(make=True) as (path, folder):
        part = f"{name}.{uuid.uuid4().hex}.part"
        try:
            descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=folder)
            with open(descriptor, "wb") as file:
                file.write(_seal(name, data))
                file.write(data)
            os.replace(part, name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            with suppress(OSError):
                os.unlink(part, dir_fd=folder)
            raise
        return path


def _seal(name: str, data: bytes) -> bytes:
    """What stands before the bytes that are kept under a name: their checksum."""
    return _MAGIC + hashlib.sha256(name.encode() + b"\n" + data).digest()


# Warnings ------------------------------------------------------------------------------------------------------------

_warned = False


def _move_home(name: str, data: bytes) -> None:
    """Copy what only the temporary folder had to where it belongs."""
    try:
        _write(_usual, name, data)
    except OSError as error:
        _warn(error, f"They are kept in {temporary()}")


def _warn(error: OSError, instead: str) -> None:
    """Say once in a process why compiled kernels are not where they belong."""
    global _warned
    if not _warned:
        _warned = True
        warn(f"compiled kernels cannot be kept where they belong: {error}. {instead}. ${VARIABLE} names another folder")
