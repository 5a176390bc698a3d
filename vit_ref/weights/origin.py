"""What a report says of a checkpoint: its name, the digest of its bytes, and what a cut keeps of it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

from vit_ref.errors import CheckpointError
from vit_ref.weights import hub
from vit_ref.weights.checkpoint import Checkpoint


class Origin(NamedTuple):
    """Origin of a checkpoint, and a digest of its weights.

    Attributes:
      name: name in reports: the last two parts of the path, or the hub id with the beginning of the commit.
      path: full path of the directory or file on this machine.
      sha256: digest of the file of weights, as `sha256sum` prints it and the hub shows it. For several files it is the
        digest of the lines that `sha256sum` prints for them, in the order of their names.
      revision: commit on the hub, or None if the checkpoint is not in the hub's cache.
    """

    name: str
    path: str
    sha256: str
    revision: str | None

    @property
    def said(self) -> str:
        """The digest and the commit, in one line of text."""
        return f"sha256 {self.sha256}" + (f", commit {self.revision}" if self.revision else "")


class Extent(NamedTuple):
    """What a cut keeps of a checkpoint.

    Attributes:
      blocks: the numbers that the cut's blocks have in the checkpoint, in order.
      grid: rows and columns of patches.
      image_size: height and width of images.
      tensors: how many tensors of the model it has.
    """

    blocks: tuple[int, ...]
    grid: tuple[int, int]
    image_size: tuple[int, int]
    tensors: int


def find_origin(source: Checkpoint) -> Origin:
    """Returns the origin of a checkpoint that was read from files.

    Raises:
      CheckpointError: a file cannot be read any more.
    """
    directory = source.path if source.path.is_dir() else source.path.parent
    directory = directory.resolve()
    path = directory if source.path.is_dir() else directory / source.path.name
    cached = hub.find_in_cache(directory)
    if cached is not None:
        name = f"{cached.id}@{str(cached.revision)[:7]}" + (f"/{path.name}" if path != directory else "")
    else:
        name = "/".join(path.parts[-2:]).replace("//", "/")
    return Origin(name, str(path), _sha256(source.files), cached and cached.revision)


# Files of weights, by their suffix.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".npz", ".npy", ".msgpack", ".h5", ".ckpt", ".onnx")


def find_origin_of(path: Path) -> Origin:
    """Returns the origin of a directory or file of any kind. Its digest covers the files of weights, told by suffix.

    Args:
      path: the directory or file.

    Raises:
      CheckpointError: there is no file of weights, or one cannot be read.
    """
    files = (path,) if path.is_file() else tuple(sorted(file for file in path.rglob("*") if file.suffix in _WEIGHTS))
    if not files:
        raise CheckpointError(f"{path}: no weights in it ({', '.join(_WEIGHTS)}): name a file, or another directory")
    whole = path.resolve()
    return Origin("/".join(whole.parts[-2:]).replace("//", "/"), str(whole), _sha256(files), None)


def _sha256(files: tuple[Path, ...]) -> str:
    digests = {}
    for file in files:
        try:
            with file.open("rb") as stream:
                digests[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise CheckpointError(f"{file}: it cannot be read any more ({error.strerror}): run this again") from None
    if len(digests) == 1:
        return next(iter(digests.values()))
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()
