"""The one family of errors that means "this input cannot be used".

Whatever derives from `InputError` says in one line what is wrong, where, and what to do about it. Command lines turn it
into exit code 2; a defect of the library itself is any other exception.
"""

from __future__ import annotations


class InputError(ValueError):
    """Something that the person gave cannot be used."""


class ConfigError(InputError):
    """A configuration names something unknown or contradicts itself."""


class CheckpointError(InputError):
    """A checkpoint cannot be found, read or trusted."""
