"""Checkpoints on the Hugging Face hub: their names, and the download of their files."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import huggingface_hub
import huggingface_hub.constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from vit_ref.errors import CheckpointError

_ID = r"(?!\.)[\w.-]+/[\w.-]+"
_REVISION = r"[\w.-][\w./-]*"


class Name(NamedTuple):
    """Name of a repository on the hub.

    Attributes:
      id: owner/name.
      revision: a branch, a tag or a commit; None for the newest commit of the main branch.
    """

    id: str
    revision: str | None = None

    def __str__(self) -> str:
        """Returns the name in the form that `parse_name` reads."""
        return self.id if self.revision is None else f"{self.id}@{self.revision}"


def parse_name(name: str, revision: str | None = None) -> Name:
    """Reads the name of a repository: ID, ID@REVISION, https://huggingface.co/ID or .../ID/tree/REVISION.

    Args:
      name: the name.
      revision: a revision given apart from the name, or None.

    Raises:
      CheckpointError: it is no name on the hub, or it names another revision.
    """
    if "://" in name:
        parsed = _of_url(name)
    else:
        match = re.fullmatch(rf"({_ID})(?:@({_REVISION}))?", name)
        if not match:
            raise CheckpointError(f"{name}: no such directory or file: correct the path, or give the hub id OWNER/NAME")
        parsed = Name(*match.groups())
    if revision is not None and parsed.revision not in (None, revision):
        raise CheckpointError(f"{name}: it names revision {parsed.revision!r}, and revision is {revision!r}: give one")
    return parsed if revision is None else Name(parsed.id, revision)


def _of_url(url: str) -> Name:
    parts = urlsplit(url)
    hosts = {"huggingface.co", "hf.co", urlsplit(huggingface_hub.constants.ENDPOINT).netloc}
    match = re.fullmatch(rf"/({_ID})(?:/(?:tree|commit)/([^/]+))?/?", parts.path)
    if parts.scheme not in ("http", "https") or parts.netloc.removeprefix("www.") not in hosts or not match:
        raise CheckpointError(
            f"{url}: it is not the URL of a model repository: give a directory, a hub id, or"
            " https://huggingface.co/OWNER/NAME, with /tree/REVISION after it if needed"
        )
    return Name(match[1], unquote(match[2]) if match[2] else None)


def fetch(name: Name, wanted: Callable[[str, Iterable[str] | None], list[str]]) -> Path:
    """Returns the directory of a repository's files in the local cache, after fetching those that are missing.

    Args:
      name: the repository.
      wanted: returns patterns of the files to fetch. Its arguments are the repository's name and its list of files, or
        None in place of the list if there is no network.

    Raises:
      CheckpointError: the hub has no such repository or revision, or cannot be reached.
    """
    try:
        patterns = wanted(str(name), _listed(name))
        return Path(huggingface_hub.snapshot_download(name.id, revision=name.revision, allow_patterns=patterns))
    except LocalEntryNotFoundError:
        raise CheckpointError(
            f"{name}: no such directory exists. As a hub id it is not in the cache, and the hub cannot be reached:"
            " give a directory, or go online"
        ) from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CheckpointError(
            f"{name}: no such directory exists. As a hub id it was refused: {reason}: correct the name, or log in"
        ) from None


def _listed(name: Name) -> list[str] | None:
    try:
        return huggingface_hub.list_repo_files(name.id, revision=name.revision)
    except HfHubHTTPError:
        raise
    except Exception as error:
        # Errors of requests and of offline mode are OSErrors. Those of httpx, which later hub clients use, are not.
        if not isinstance(error, OSError) and type(error).__module__.partition(".")[0] != "httpx":
            raise
        return None


def find_in_cache(path: Path) -> Name | None:
    """Returns the repository and the commit of a directory in the local cache, or None for any other directory."""
    folder = path.parent.parent.name
    if path.parent.name != "snapshots" or not folder.startswith("models--"):
        return None
    return Name(folder.removeprefix("models--").replace("--", "/"), path.name)
