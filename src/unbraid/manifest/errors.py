"""The two errors that reach a person: one sentence that names the thing and says what to do."""

from __future__ import annotations


class UserError(Exception):
    """The user's mistake: a file, field or option that has to change. The command line exits with code 2."""


class IntegrityError(Exception):
    """An artifact is not what its manifest says. The command line exits with code 1."""
