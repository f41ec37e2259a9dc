"""Messages that say what they are about."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def telling(what: str) -> Iterator[None]:
    """Put `what`, such as "Train: 'vae':", before the text of a ValueError that is raised within."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what} {error}") from error
