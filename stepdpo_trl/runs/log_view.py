"""Mappings whose values stay on disk."""

from collections.abc import Callable, ItemsView, Iterator, Mapping, ValuesView
from typing import Any, TypeVar

T = TypeVar("T")


class StreamedMapping(Mapping[str, T]):
    """Mapping whose values are not in memory: its `items` and `values` are iterated in one pass over their source."""

    def stream(self) -> Iterator[tuple[str, T]]:
        """Yield all keys and values."""
        raise NotImplementedError

    def items(self) -> ItemsView[str, T]:
        """Return a view of keys and values."""
        return _Items(self)

    def values(self) -> ValuesView[T]:
        """Return a view of values."""
        return _Values(self)


class _Items(ItemsView[str, T]):
    _mapping: StreamedMapping[T]

    def __iter__(self) -> Iterator[tuple[str, T]]:
        return self._mapping.stream()


class _Values(ValuesView[T]):
    _mapping: StreamedMapping[T]

    def __iter__(self) -> Iterator[T]:
        return (value for _, value in self._mapping.stream())


class LogView(StreamedMapping[T]):
    """
    Records of a log as objects, which are made when they are used.

    Args:
        log (`Mapping`):
            The log.
        make (`Callable[[str, dict], T]`):
            Function that makes an object of a key and a record.
    """

    def __init__(self, log: Mapping[str, dict[str, Any]], make: Callable[[str, dict[str, Any]], T]) -> None:
        self._log, self._make = log, make

    def __getitem__(self, key: str) -> T:
        return self._make(key, self._log[key])

    def __contains__(self, key: object) -> bool:
        return key in self._log

    def __iter__(self) -> Iterator[str]:
        return iter(self._log)

    def __len__(self) -> int:
        return len(self._log)

    def stream(self) -> Iterator[tuple[str, T]]:
        """Yield all keys and objects."""
        return ((key, self._make(key, record)) for key, record in self._log.items())
