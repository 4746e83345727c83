"""Files on any file system that pyarrow can open: local paths, hdfs:, s3:, gs:, abfs:, and the mounts of a notebook.

What a crash leaves behind is decided here: whoever writes a file under one name and renames it to another has it complete
or absent under the second, because every call returns only when its work is on the disk.

              LocalFolder: disks, /dbfs, /Volumes        SystemFolder: all else
    write     open, write, fsync, close, fsync folder    stream, close
    rename    rename, fsync folder                       move; on an object store a copy, which appears at once
    delete    unlink, fsync folder                       delete

Nothing here appends, seeks or renames a folder: mounts and object stores cannot.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Iterable
from typing import NamedTuple, Protocol

from pyarrow import fs

from bigdl_lite.errors import RecipeError

_CHUNK = 1 << 26  # bytes of one write: Linux takes 2 GiB at most, and Ctrl-C waits for one
_NO_SUCH_CALL = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)  # a mount without fsync


class Entry(NamedTuple):
    nbytes: int
    changed: float  # seconds since 1970, by the clock of the file system


class Folder(Protocol):
    """The files of one folder. Errors are OSError; names have no slash."""

    path: str

    def entries(self) -> dict[str, Entry]:
        """The files, by name; none where the folder does not exist."""
        ...

    def create(self) -> None: ...

    def write(self, name: str, parts: Iterable[bytes | memoryview]) -> None:
        """Writes a file. A crash may leave a part of it: take a name that nobody reads, then rename."""
        ...

    def rename(self, old: str, new: str) -> None:
        """Under `new` there is what was there before, or the whole of `old`."""
        ...

    def read(self, name: str, most: int) -> bytes:
        """The first `most` bytes."""
        ...

    def delete(self, *names: str) -> None:
        """In this order; what is absent is skipped."""
        ...

    def free(self) -> int | None:
        """Bytes free, where the file system tells."""
        ...


class LocalFolder:
    def __init__(self, path: str) -> None:
        self.path = os.path.abspath(path)

    def entries(self) -> dict[str, Entry]:
        found = {}
        try:
            with os.scandir(self.path) as listed:
                for item in listed:
                    with contextlib.suppress(FileNotFoundError):  # deleted since
                        if item.is_file():
                            found[item.name] = Entry(item.stat().st_size, item.stat().st_mtime)
        except FileNotFoundError:
            pass
        return found

    def create(self) -> None:
        missing, path = [], self.path
        while not os.path.isdir(path):
            missing.append(path)
            path = os.path.dirname(path)
        for folder in reversed(missing):
            try:
                os.mkdir(folder)
            except FileExistsError:
                if not os.path.isdir(folder):
                    raise
            _sync_folder(os.path.dirname(folder))

    def write(self, name: str, parts: Iterable[bytes | memoryview]) -> None:
        out = os.open(os.path.join(self.path, name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            for part in parts:
                view = memoryview(part)
                while len(view):
                    view = view[os.write(out, view[:_CHUNK]) :]
            _sync(out)
        finally:
            os.close(out)
        _sync_folder(self.path)

    def rename(self, old: str, new: str) -> None:
        os.replace(os.path.join(self.path, old), os.path.join(self.path, new))
        _sync_folder(self.path)

    def read(self, name: str, most: int) -> bytes:
        with open(os.path.join(self.path, name), "rb") as source:
            return source.read(min(most, os.fstat(source.fileno()).st_size))

    def delete(self, *names: str) -> None:
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(self.path, name))
                _sync_folder(self.path)  # the next is not gone before this one is

    def free(self) -> int | None:
        path = self.path
        while not os.path.isdir(path):
            path = os.path.dirname(path)
        return shutil.disk_usage(path).free


def _sync(handle: int) -> None:
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_SUCH_CALL:
            raise


def _sync_folder(path: str) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _sync(handle)
    finally:
        os.close(handle)


class SystemFolder:
    def __init__(self, system: fs.FileSystem, path: str) -> None:
        self.system, self.path = system, path.rstrip("/")

    def entries(self) -> dict[str, Entry]:
        found = self.system.get_file_info(fs.FileSelector(self.path, allow_not_found=True))
        now = time.time()  # where the system tells no time, nothing is old
        return {
            info.base_name: Entry(info.size, now if info.mtime_ns is None else info.mtime_ns / 1e9)
            for info in found
            if info.type == fs.FileType.File
        }

    def create(self) -> None:
        self.system.create_dir(self.path, recursive=True)

    def write(self, name: str, parts: Iterable[bytes | memoryview]) -> None:
        with self.system.open_output_stream(f"{self.path}/{name}") as out:
            for part in parts:
                out.write(part)

    def rename(self, old: str, new: str) -> None:
        try:
            self.system.move(f"{self.path}/{old}", f"{self.path}/{new}")
        except NotImplementedError:  # Azure without a hierarchical namespace
            self.system.copy_file(f"{self.path}/{old}", f"{self.path}/{new}")
            self.delete(old)

    def read(self, name: str, most: int) -> bytes:
        with self.system.open_input_stream(f"{self.path}/{name}") as source:
            return source.read(most)

    def delete(self, *names: str) -> None:
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                self.system.delete_file(f"{self.path}/{name}")

    def free(self) -> int | None:
        return None


def open_system(path: str) -> tuple[fs.FileSystem, str]:
    """The file system of a path or URI, and the path inside it. dbfs:/x is read through its mount, /dbfs/x."""
    if path.startswith("dbfs:/"):
        path = "/dbfs/" + path.removeprefix("dbfs:/").lstrip("/")
    if "://" not in path and not path.startswith("file:"):
        return fs.LocalFileSystem(), path
    if path.startswith("file:"):
        return fs.LocalFileSystem(), "/" + path.removeprefix("file:").lstrip("/")
    try:
        return fs.FileSystem.from_uri(path)
    except Exception as error:
        raise RecipeError(f"{path!r} cannot be opened through pyarrow: {error}; save to a mounted path instead") from error


def open_folder(path: str, *below: str) -> Folder:
    """The folder at path/below/... Nothing is touched yet."""
    system, inside = open_system(path)
    inside = "/".join([inside.rstrip("/"), *below]) if below else inside
    return LocalFolder(inside) if isinstance(system, fs.LocalFileSystem) else SystemFolder(system, inside)


def write(path: str, data: bytes | memoryview) -> None:
    """Writes one file, complete or absent, and makes its folder where there is none."""
    above, _, name = path.rpartition("/")
    folder = open_folder(above or ("/" if path.startswith("/") else "."))
    folder.create()
    aside = f"{name}.part"
    try:
        folder.write(aside, [data])
        folder.rename(aside, name)
    except BaseException:
        with contextlib.suppress(OSError):
            folder.delete(aside)
        raise


def exists(path: str) -> bool:
    system, inside = open_system(path)
    return bool(system.get_file_info(inside).type != fs.FileType.NotFound)


def remove(path: str) -> None:
    """A file, or a folder with all that is in it; nothing where there is none."""
    system, inside = open_system(path)
    kind = system.get_file_info(inside).type
    if kind == fs.FileType.Directory:
        system.delete_dir(inside)
    elif kind != fs.FileType.NotFound:
        system.delete_file(inside)


def read(path: str) -> bytes:
    system, inside = open_system(path)
    with system.open_input_stream(inside) as source:
        return source.read()
