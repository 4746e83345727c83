"""Files on any file system that pyarrow can open: local paths, hdfs:, s3:, gs:, abfs:, and the mounts of a notebook."""

from __future__ import annotations

from pyarrow import fs

from bigdl_lite.errors import RecipeError


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


def write(path: str, data: bytes | memoryview) -> None:
    """Writes one file; where the file system can rename, it is complete or absent."""
    system, inside = open_system(path)
    system.create_dir(inside.rsplit("/", 1)[0], recursive=True)
    aside = f"{inside}.part"
    with system.open_output_stream(aside) as out:
        out.write(data)
    system.move(aside, inside)


def read(path: str) -> bytes:
    system, inside = open_system(path)
    with system.open_input_stream(inside) as source:
        return source.read()
