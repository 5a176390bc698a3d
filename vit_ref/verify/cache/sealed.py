"""Sealed files: content behind a digest of itself and of the file's name.

A trace takes a gigabyte. So several threads read, write and digest its chunks, each in one go.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_MAGIC = b"vit-ref cache 1\n"
SEAL = len(_MAGIC) + 32
_CHUNK = 1 << 22

T = TypeVar("T")


def read_sealed(descriptor: int, name: str) -> memoryview | None:
    """Returns the content of an open file, or None if the file is not what was written under this name.

    The content is copied. Another process may remove the file, or a network may lose it.

    Args:
      descriptor: the open file.
      name: the file's name.

    Raises:
      OSError: the file cannot be read.
    """
    size = os.fstat(descriptor).st_size - SEAL
    if size < 1:
        return None
    # Memory that is not filled with zeros first, and begins at a page.
    content = memoryview(mmap.mmap(-1, size))

    def read(start: int) -> bytes:
        part = content[start : start + _CHUNK]
        done = 0
        while done < len(part):
            count = os.preadv(descriptor, [part[done:]], SEAL + start + done)
            if not count:
                return b""  # cut while it is read
            done += count
        return hashlib.sha256(part).digest()

    seal = os.pread(descriptor, SEAL, 0)
    return content if seal == _seal(name, size, _each(read, range(0, size, _CHUNK))) else None


def write_sealed(descriptor: int, name: str, parts: Iterable[bytes | memoryview]) -> None:
    """Writes content to an open file.

    Args:
      descriptor: the open file, which is empty.
      name: the file's name when it is whole.
      parts: the parts of the content, in order.

    Raises:
      OSError: the file cannot be written.
    """
    chunks = list(_chunks(parts))

    def write(k: int) -> bytes:
        digest, place = hashlib.sha256(), SEAL + k * _CHUNK
        for piece in chunks[k]:
            digest.update(piece)
            while piece:
                count = os.pwrite(descriptor, piece, place)
                piece, place = piece[count:], place + count
        return digest.digest()

    digests = _each(write, range(len(chunks)))
    size = sum(len(piece) for chunk in chunks for piece in chunk)
    os.pwrite(descriptor, _seal(name, size, digests), 0)


def _seal(name: str, size: int, digests: Iterable[bytes]) -> bytes:
    digest = hashlib.sha256(f"{name}\n{size}\n".encode())
    for each in digests:
        digest.update(each)
    return _MAGIC + digest.digest()


def _each(function: Callable[[int], T], over: range) -> list[T]:
    if len(over) < 2:
        return [function(each) for each in over]
    with ThreadPoolExecutor(min(len(over), os.cpu_count() or 1, 8)) as threads:
        return list(threads.map(function, over))


def _chunks(parts: Iterable[bytes | memoryview]) -> Iterator[list[memoryview]]:
    """Yields the pieces of each chunk."""
    chunk, room = list[memoryview](), _CHUNK
    for part in parts:
        rest = memoryview(part)
        while rest:
            chunk.append(rest[:room])
            room -= len(chunk[-1])
            rest = rest[len(chunk[-1]) :]
            if not room:
                yield chunk
                chunk, room = [], _CHUNK
    if chunk:
        yield chunk
