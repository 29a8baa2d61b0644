"""Reading the records of a run folder, which people may edit. Standard library only."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..runs.run_directory import RunError


@contextmanager
def reading(record: str, path: Path, fix: str) -> Iterator[None]:
    """
    Raise a `RunError` if a record has other fields or values than this package writes.

    Args:
        record (`str`):
            Name of the record, such as `"The verdict of 'p/1'"`.
        path (`Path`):
            File or folder that holds it.
        fix (`str`):
            How to fix it.

    Raises:
        RunError: If the code in the context raises an error that such a record causes.
    """
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        lacks = isinstance(error, KeyError)
        reason = f"it lacks {error}" if lacks else str(error)
        raise RunError(f"{record} in {path} cannot be used: {reason}. {fix}") from error
