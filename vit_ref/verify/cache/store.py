"""Entries in one directory: sealed, bounded in size, safe under several processes and a kill at any moment.

An entry is one file. It begins with a digest of its own name and its content, which is compared at each reading. So an
entry that was damaged, cut or renamed is never used. A writer gives its file another name until it is whole. There is
no lock: two writers of the same entry write the same content, and the last one wins.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from vit_ref.errors import InputError
from vit_ref.files import replacing
from vit_ref.verify.cache.place import DEFAULT_LIMIT, LIMIT_VARIABLE, VARIABLE, parse_size, show_size
from vit_ref.verify.cache.sealed import SEAL, read_sealed, write_sealed

_LOG = logging.getLogger("vit_ref")
# The kinds of entries, with what they hold.
KINDS = {
    "programs": "compiled programs",
    "traces": "values and gradients of references",
    "errors": "errors of references",
    "facts": "names of references",
}
_NAME = re.compile(rf"({'|'.join(KINDS)})-[0-9a-f]{{64}}")
_TEMPORARY = "writing-"
_IS_TEMPORARY = re.compile(rf"{_TEMPORARY}[a-z0-9_]{{8}}")  # as tempfile names its files
# A writer that was killed leaves its temporary file. A file that nobody has written to for so long belongs to no one.
_ABANDONED_AFTER_S = 3600.0
# An entry may take one part in so many of the bound. The values of a run, and the gradients of three objectives, then
# fit together. Larger ones would remove each other, and each run would write them in vain.
_SHARE = 6
_ENTRIES, _LIMIT = "entries", "limit"
_ANOTHER = f"name another directory in {VARIABLE}"


class Entry(NamedTuple):
    """One file of the cache: its kind, its size in bytes, and the time of its last use."""

    path: Path
    kind: str
    size: int
    used: float


def require_directory(root: Path) -> None:
    """Makes the directory of entries.

    Args:
      root: the directory of the cache.

    Raises:
      InputError: it cannot be made, it belongs to another user, or others may write there.
    """
    directory = root / _ENTRIES
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = os.stat(directory)
    except OSError as error:
        raise InputError(f"{root}: the cache cannot be used ({error.strerror}): {_ANOTHER}") from None
    # Compiled programs are code that this process runs.
    if status.st_uid != os.geteuid():
        raise InputError(f"{directory}: the cache cannot be used (it belongs to another user): {_ANOTHER}")
    if status.st_mode & 0o022:
        raise InputError(
            f"{directory}: the cache cannot be used (others may write there): make it yours alone, or {_ANOTHER}"
        )


class Store:
    """The entries below one directory. No reading or writing of them fails: a note says what could not be done.

    Args:
      root: the directory of the cache. It and the directory of entries are made at once.

    Attributes:
      root: the directory.
    """

    def __init__(self, root: Path):
        self.root = root
        self._directory = root / _ENTRIES
        self._noted = False
        self._since_trimmed = 0
        self._limit: int | None = None
        try:
            require_directory(root)
            self._usable = True
        except InputError as error:
            self._usable = False
            self.note(f"{error}. This run goes on without it")
        self._writes = self._usable

    def note(self, line: str) -> None:
        """Prints a note, one for each run."""
        if not self._noted:
            self._noted = True
            _LOG.warning(line)

    @property
    def limit(self) -> int:
        """The bound of the size in bytes: the environment's, or that of `vit-ref cache --limit`, or the default.

        Raises:
          InputError: the environment's is no size.
        """
        if self._limit is None:
            if given := os.environ.get(LIMIT_VARIABLE):
                self._limit = parse_size(given, LIMIT_VARIABLE)
            else:
                self._limit = DEFAULT_LIMIT
                with contextlib.suppress(OSError, InputError):
                    written = self._written_limit()
                    self._limit = DEFAULT_LIMIT if written is None else written
        return self._limit

    def set_limit(self, size: int) -> None:
        """Writes the bound for later runs, and removes what is beyond it.

        Args:
          size: the bound in bytes.

        Raises:
          InputError: it cannot be written, or a file of that name holds something else.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._written_limit()
            with replacing(self.root / _LIMIT) as staged:
                staged.write_text(f"{size}\n", "ascii")
        except OSError as error:
            raise InputError(f"{self.root}: the bound cannot be written there ({error.strerror})") from None
        self._limit = None
        self.trim()

    def _written_limit(self) -> int | None:
        """Returns the bound that `set_limit` wrote, or None if there is none.

        Raises:
          InputError: a file of that name holds something else.
          OSError: it cannot be read.
        """
        path = self.root / _LIMIT
        if not os.path.lexists(path):
            return None
        try:
            return parse_size(path.read_text("ascii"), "")
        except ValueError:
            raise InputError(f"{path}: it holds no size, so it is not of the cache: move it, or {_ANOTHER}") from None

    def read(self, kind: str, key: str) -> memoryview | None:
        """Returns the content of an entry, or None if there is none. A damaged entry is removed.

        Args:
          kind: one of `KINDS`.
          key: 64 hexadecimal digits.
        """
        name = f"{kind}-{key}"
        path = self._directory / name
        if not self._usable:
            return None
        try:
            with path.open("rb") as file:
                content = read_sealed(file.fileno(), name)
        except (OSError, MemoryError):
            return None
        with contextlib.suppress(OSError):
            if content is None:
                path.unlink()
            else:
                os.utime(path)  # the last use
        return content

    def remove(self, kind: str, key: str) -> None:
        """Removes an entry, if there is one."""
        with contextlib.suppress(OSError):
            (self._directory / f"{kind}-{key}").unlink()

    def has(self, kind: str, key: str) -> bool:
        """Says whether there is an entry, damaged or not."""
        return self._usable and os.path.exists(self._directory / f"{kind}-{key}")

    def write(self, kind: str, key: str, parts: Iterable[bytes | memoryview]) -> None:
        """Writes an entry, unless it alone takes a large part of the bound.

        Args:
          kind: one of `KINDS`.
          key: 64 hexadecimal digits.
          parts: the parts of the content, in order.
        """
        parts = list(parts)
        size = SEAL + sum(len(part) for part in parts)
        if not self._writes or size > self.limit // _SHARE:
            return
        name = f"{kind}-{key}"
        temporary = ""
        try:
            handle, temporary = tempfile.mkstemp(prefix=_TEMPORARY, dir=self._directory)
            try:
                write_sealed(handle, name, parts)
            finally:
                os.close(handle)
            os.replace(temporary, self._directory / name)
        except OSError as error:
            self._writes = False
            self.note(f"{self.root}: nothing more is written to the cache ({error.strerror}), and this run goes on")
            if temporary:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
            return
        self._since_trimmed += size
        if self._since_trimmed > self.limit // 16:
            self.trim()

    def entries(self) -> list[Entry]:
        """Returns all entries, the least recently used first."""
        found = []
        for each in self._scan():
            if _NAME.fullmatch(each.name):
                with contextlib.suppress(OSError):  # another process may remove it meanwhile
                    status = each.stat()
                    kind = each.name.partition("-")[0]
                    found.append(Entry(Path(each.path), kind, status.st_size, status.st_mtime))
        return sorted(found, key=lambda entry: (entry.used, entry.path))

    def trim(self) -> None:
        """Removes what writers that were killed left, and the least recently used entries beyond the bound."""
        self._since_trimmed = 0
        for each in self._scan():
            if _IS_TEMPORARY.fullmatch(each.name):
                with contextlib.suppress(OSError):
                    if time.time() - each.stat().st_mtime > _ABANDONED_AFTER_S:
                        os.unlink(each.path)
        entries = self.entries()
        size = sum(entry.size for entry in entries)
        for entry in entries:
            if size <= self.limit:
                break
            with contextlib.suppress(OSError):
                entry.path.unlink()
            size -= entry.size

    def clear(self) -> tuple[int, int]:
        """Removes every file of the cache, and no other. Returns how many entries it removed, and their bytes."""
        count = size = 0
        for entry in self.entries():
            with contextlib.suppress(OSError):
                entry.path.unlink()
                count, size = count + 1, size + entry.size
        for each in self._scan():
            if _IS_TEMPORARY.fullmatch(each.name):
                with contextlib.suppress(OSError):
                    os.unlink(each.path)
        return count, size

    def _scan(self) -> Iterator[os.DirEntry[str]]:
        if not self._usable:
            return
        with contextlib.suppress(OSError), os.scandir(self._directory) as found:
            yield from found

    def __str__(self) -> str:
        return f"{self.root} (at most {show_size(self.limit)})"
