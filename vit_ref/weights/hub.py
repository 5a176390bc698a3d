"""Checkpoints on the Hugging Face hub: what a name means, and how its files come here."""

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
    """A repository of the hub.

    Attributes:
      id: owner/name.
      revision: a branch, a tag or a commit; None for the newest commit of the main branch.
    """

    id: str
    revision: str | None = None

    def __str__(self) -> str:
        """As `parse_name` takes it."""
        return self.id if self.revision is None else f"{self.id}@{self.revision}"


def parse_name(name: str, revision: str | None = None) -> Name:
    """The repository that a person names, as ID, ID@REVISION, https://huggingface.co/ID or .../ID/tree/REVISION.

    Args:
      name: what the person gave.
      revision: what the person gave apart from it.

    Raises:
      CheckpointError: it is no name on the hub, or names another revision.
    """
    if "://" in name:
        found = _of_url(name)
    else:
        match = re.fullmatch(rf"({_ID})(?:@({_REVISION}))?", name)
        if not match:
            raise CheckpointError(f"{name}: no such directory or file")
        found = Name(*match.groups())
    if revision is not None and found.revision not in (None, revision):
        raise CheckpointError(f"{name}: names revision {found.revision!r}, and revision is {revision!r}: give one")
    return found if revision is None else Name(found.id, revision)


def _of_url(url: str) -> Name:
    parts = urlsplit(url)
    hosts = {"huggingface.co", "hf.co", urlsplit(huggingface_hub.constants.ENDPOINT).netloc}
    match = re.fullmatch(rf"/({_ID})(?:/(?:tree|commit)/([^/]+))?/?", parts.path)
    if parts.scheme not in ("http", "https") or parts.netloc.removeprefix("www.") not in hosts or not match:
        raise CheckpointError(
            f"{url}: is no URL of a repository of models: give a directory, a hub id, or"
            " https://huggingface.co/OWNER/NAME, with /tree/REVISION after it if need be"
        )
    return Name(match[1], unquote(match[2]) if match[2] else None)


def fetch(name: Name, wanted: Callable[[str, Iterable[str] | None], list[str]]) -> Path:
    """The directory of a repository's files in the local cache, where they are fetched to if need be.

    Args:
      name: which.
      wanted: patterns of the files to fetch, by the repository's name and its list of files; None in place of the list
        without a network.

    Raises:
      CheckpointError: the hub has no such repository or revision, or there is no way to it.
    """
    try:
        patterns = wanted(str(name), _listed(name))
        return Path(huggingface_hub.snapshot_download(name.id, revision=name.revision, allow_patterns=patterns))
    except LocalEntryNotFoundError:
        raise CheckpointError(
            f"{name}: no such directory, and as a hub id it is neither in the cache nor can the hub be reached:"
            " give a directory, or go online"
        ) from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CheckpointError(f"{name}: no such directory, and the hub refuses it as an id: {reason}") from None


def _listed(name: Name) -> list[str] | None:
    try:
        return huggingface_hub.list_repo_files(name.id, revision=name.revision)
    except HfHubHTTPError:
        raise
    except Exception as error:
        # requests' errors are OSErrors, as the one of offline mode is; those of httpx, which later hubs take, are none.
        if not isinstance(error, OSError) and type(error).__module__.partition(".")[0] != "httpx":
            raise
        return None


def find_in_cache(path: Path) -> Name | None:
    """The repository and the commit whose files a directory of the local cache holds; None of any other directory."""
    folder = path.parent.parent.name
    if path.parent.name != "snapshots" or not folder.startswith("models--"):
        return None
    return Name(folder.removeprefix("models--").replace("--", "/"), path.name)
