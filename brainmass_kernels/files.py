"""Files that are written whole or not at all, and whose damage is noticed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

#: The key of a document's own checksum.
CHECKSUM = "checksum"
# Errors of file systems without locks.
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


def absolute(path: str | os.PathLike, argument: str, folder: bool = False) -> Path:
    """A path that stays valid when the working directory changes.

    Parameters
    ----------
    folder : whether a folder is to be written rather than a file

    Raises
    ------
    ValueError : nothing can be written at that path
    """
    absolute = Path(os.path.abspath(path))
    target, got = Path(os.path.realpath(absolute)), f"'{argument}' got {os.fspath(path)}"
    for place in (absolute.parent, target.parent):
        if not place.is_dir():
            raise ValueError(f"{got}, but there is no folder {place}")
        if not os.access(place, os.W_OK | os.X_OK):
            raise ValueError(f"{got}, but the folder {place} cannot be written")
    if target.is_dir() and not folder:
        raise ValueError(f"{got}, which is a folder")
    if target.exists() and not os.access(target, os.W_OK):
        raise ValueError(f"{got}, which cannot be written")
    return absolute


@contextlib.contextmanager
def replacing(path: str | os.PathLike, folder: bool = False) -> Iterator[Path]:
    """A new file or folder to be written, which replaces ``path`` when the block ends without an error.

    It lies beside what it replaces. On any error it is removed, and the old file stays. A link stays a link: its
    target is replaced. A new file has the mode of the umask, a replaced one keeps its mode.
    """
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "there is no such folder", os.fspath(target.parent))
    if target.exists() and not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, "the file cannot be written", os.fspath(path))
    aside = beside(target)
    try:
        if folder:
            os.mkdir(aside)
        else:
            os.close(os.open(aside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        yield aside
        _flush_all(aside)
        if target.exists():
            shutil.copymode(target, aside)
        move(aside, target)
    except BaseException:
        remove(aside)
        raise
    flush(target.parent)


def beside(target: Path, ending: str | None = None) -> Path:
    """A hidden name beside a file's that no other process takes; ``ending`` replaces the suffix."""
    host = re.sub(r"[^\w-]", "_", socket.gethostname())[:32]
    suffix = target.suffix if ending is None else ending
    return target.with_name(f".{target.stem[:32]}.{host}.{os.getpid()}.{os.urandom(4).hex()}{suffix}")


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file, whole or not at all."""
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8")


def remove(path: Path) -> None:
    """Remove a file or a folder, if it exists; another process may remove it, or move one there, at the same time."""
    while True:
        with contextlib.suppress(FileNotFoundError, IsADirectoryError):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            path.unlink(missing_ok=True)
            return


def move(source: Path, target: Path) -> None:
    """Give a file or a folder the name of another, which it replaces; on any error the other stays.

    Raises
    ------
    FileNotFoundError : there is no source, such as where another process has moved it
    """
    if not (source.is_dir() and target.is_dir()):
        os.replace(source, target)
        return
    # A folder that is not empty cannot be replaced in one step.
    old = beside(target, ".old")
    os.replace(target, old)
    try:
        os.replace(source, target)
    except BaseException:
        os.replace(old, target)
        raise
    remove(old)


def _flush_all(path: Path) -> None:
    """Flush a file, or everything in a folder, to the disk."""
    if path.is_dir():
        for inner in path.rglob("*"):
            flush(inner)
    flush(path)


def flush(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders.
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# One writer a folder ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def exclusive(folder: Path, part: str | None = None) -> Iterator[None]:
    """Make a folder, and lock it against other processes and threads while the block runs.

    On a file system without locks two may write at once, each file whole.

    Parameters
    ----------
    part : lock only this part of the folder: others write their parts at the same time, and nobody the whole

    Raises
    ------
    ValueError : another process writes there
    """
    if fcntl is None:
        folder.mkdir(exist_ok=True)
        yield
        return
    with contextlib.ExitStack() as held:
        held.callback(os.close, _lock(folder, "lock", fcntl.LOCK_EX if part is None else fcntl.LOCK_SH))
        if part is not None:
            held.callback(os.close, _lock(folder, f"{part}.lock", fcntl.LOCK_EX))
        yield


def _lock(folder: Path, name: str, kind: int) -> int:
    assert fcntl is not None
    path = folder / name
    while True:
        folder.mkdir(exist_ok=True)
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
        except FileNotFoundError:
            continue  # Its owner has just moved the folder away.
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return descriptor
            os.close(descriptor)
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise ValueError(
                f"{folder} is being written by another run: wait until that has ended, or give another name"
            ) from None
        if _leads_to(path, descriptor):
            return descriptor
        os.close(descriptor)  # The lock of a folder that was moved away meanwhile.


def _leads_to(path: Path, descriptor: int) -> bool:
    """Whether a path still leads to an open file."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


# Documents with checksums -----------------------------------------------------------------------------------------


def write_document(path: str | os.PathLike, document: Mapping[str, Any]) -> None:
    """Write a document as JSON, with its checksum."""
    write_text(path, json.dumps({CHECKSUM: checksum(document), **document}, allow_nan=False) + "\n")


def read_document(path: str | os.PathLike) -> dict[str, Any]:
    """Read what `write_document` wrote, or a file of an earlier version without a checksum.

    Raises
    ------
    FileNotFoundError, ValueError : there is no such file, or it is damaged
    """
    document = json.loads(Path(path).read_bytes())
    if not isinstance(document, dict):
        raise ValueError(f"it holds a {type(document).__name__}")
    expected = document.pop(CHECKSUM, None)
    if expected is not None and expected != checksum(document):
        raise ValueError("its checksum is that of other contents")
    return document


def checksum(document: Mapping[str, Any]) -> str:
    """Of a document that is ready for JSON."""
    return hashlib.sha256(json.dumps(document, sort_keys=True, allow_nan=False).encode()).hexdigest()


@contextlib.contextmanager
def damaged(path: str | os.PathLike, what: str, remedy: str) -> Iterator[None]:
    """Raise any error in reading a file as one ValueError with its name.

    Parameters
    ----------
    path : of the file
    what : the file should be, such as "a saved fit"
    remedy : what the user can do
    """
    try:
        yield
    except (FileNotFoundError, PermissionError, ImportError):
        raise
    except Exception as error:
        reason = str(error) if type(error) is ValueError and str(error) else repr(error)
        raise ValueError(f"{os.path.basename(path)}: not {what}, or damaged ({reason}); {remedy}") from error
