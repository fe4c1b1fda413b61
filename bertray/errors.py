"""The errors a user can act on: one line that says what is wrong, where, and what to do."""

import traceback


class BertrayError(Exception):
    """Base of every error that bertray raises on purpose. The command line turns it into exit code 2."""


class SpecError(BertrayError):
    """The spec is wrong. The message holds one line for every mistake in it."""


class SourceError(BertrayError):
    """Rows cannot be read, or are not what the spec says they are."""


class CheckpointError(BertrayError):
    """An encoder cannot be had, or is not a BERT that can do what is asked."""


class StoreError(BertrayError):
    """A vector store is missing, incomplete or damaged."""


class BundleError(BertrayError):
    """A bundle is missing, damaged, or belongs to another encoder."""


class ClusterError(BertrayError):
    """The Ray cluster cannot be reached or has not what the spec asks for."""


ERRORS = {
    kind.__name__: kind
    for kind in (BertrayError, SpecError, SourceError, CheckpointError, StoreError, BundleError, ClusterError)
}


def where(error: Exception) -> str:
    """Which error was raised where, without what it says: that may be a user's text."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {place.filename}, line {place.lineno}"
