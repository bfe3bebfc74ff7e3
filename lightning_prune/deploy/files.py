"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import gzip
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from lightning_prune.errors import OutputError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def write_whole(path: str | Path, data: bytes) -> Path:
    """Write a file under a temporary name, flush it to the disk, then give it its own name.

    Args:
        path: The file.
        data: Its content.

    Returns:
        The path.

    Raises:
        OutputError: The file cannot be written; an earlier file of that name is untouched.
    """
    with appearing(path) as file:
        file.write(data)
    return Path(path)


@contextmanager
def appearing(path: str | Path) -> Iterator[BinaryIO]:
    """Give a file to write to piece by piece; it appears, whole, when the block ends well.

    Args:
        path: The file.

    Yields:
        Where to write.

    Raises:
        OutputError: The file cannot be written; an earlier file of that name is untouched.
    """
    target = Path(path)
    part = target.with_name(f".{target.name}.part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)
    except OSError as error:
        raise cannot_write(target, error) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def cannot_write(path: str | Path, error: OSError) -> OutputError:
    """Say which path cannot be written, why, and what to do."""
    if error.errno in _FULL:
        remedy = "free some space or choose another dirpath; what was there before is untouched"
    else:
        remedy = "choose a dirpath that this user can write to"
    return OutputError(
        error.errno or errno.EIO, f"cannot write: {error.strerror or error}; {remedy}", str(path)
    )


def check_writable(dirpath: str | Path) -> Path:
    """Create a directory if need be, and prove that a file can be written into it and beside it.

    Args:
        dirpath: The directory.

    Returns:
        Its absolute path.

    Raises:
        OutputError: It is a file, or nothing can be written there.
    """
    path = Path(os.path.abspath(dirpath))  # noqa: PTH100 (resolve() would follow a link that the user chose)
    try:
        path.mkdir(parents=True, exist_ok=True)
        for place in (path, path.parent):
            with tempfile.TemporaryFile(dir=place, prefix=".lightning-prune-") as file:
                file.write(b"\0")
    except OSError as error:
        raise cannot_write(path, error) from error
    return path


@contextmanager
def staged(dirpath: str | Path, last: str = "report.json") -> Iterator[Path]:
    """Give a temporary directory whose files move into `dirpath` only when the block ends well.

    Args:
        dirpath: Where the files go.
        last: The file that moves last, because others read it to find the rest.

    Yields:
        The temporary directory, on the same file system.

    Raises:
        OutputError: The files cannot be written; those that were in `dirpath` are as before.
    """
    target = Path(dirpath)
    try:
        target.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise cannot_write(target, error) from error
    try:
        yield stage
        files = [p.relative_to(stage) for p in sorted(stage.rglob("*")) if p.is_file()]
        # Weights come before the models that name them.
        for name in sorted(files, key=lambda p: (p.name == last, p.suffix != ".data")):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (stage / name).replace(target / name)
    except OutputError:
        raise
    except OSError as error:
        # What the user's own data raises is no fault of the directory.
        at_fault = error.filename is None or str(error.filename).startswith((str(stage), str(target)))
        if error.errno in _FULL or (error.errno is not None and at_fault):
            raise cannot_write(target, error) from error
        raise
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def remove_stale(dirpath: str | Path, names: Iterable[str]) -> None:
    """Remove files that an earlier export left and this one did not write; missing ones are fine."""
    for name in names:
        with contextlib.suppress(OSError):
            (Path(dirpath) / name).unlink()


def compressed_size(*paths: str | Path) -> int:
    """Return how many bytes files have after gzip at its best level.

    Args:
        *paths: The files.

    Returns:
        The size of the gzip stream of one behind the other, in bytes.
    """

    class Count:
        size = 0

        def write(self, data: bytes) -> int:
            self.size += len(data)
            return len(data)

        def flush(self) -> None:
            return None

    count = Count()
    with gzip.GzipFile(filename="", fileobj=count, mode="wb", compresslevel=9, mtime=0) as sink:
        for path in paths:
            with Path(path).open("rb") as source:
                shutil.copyfileobj(source, sink, 1 << 20)
    return count.size
