"""Compact index of the records of a log: 20 bytes per key, in memory and in a file next to the log."""

import contextlib
from array import array
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from xxhash import xxh3_64_digest

from ..data.files import replacing

_SAMPLES = 16  # entries of a stored index that are compared with the log


def digest(key: bytes) -> bytes:
    """Return a digest of 8 bytes of a key in UTF-8."""
    return xxh3_64_digest(key)


class KeyIndex:
    """
    Offsets of the records of a log, in the order in which their keys were first appended.

    A key is found by its digest. Since two keys may have the same digest, it is then compared with the key in the log.

    Args:
        key_at (`Callable[[int], str]`):
            Function that reads the key of the record at an offset.

    Attributes:
        offsets (`array`): Offset of the last record of each key. Those at the end may not be indexed yet.
    """

    def __init__(self, key_at: Callable[[int], str]) -> None:
        self.offsets = array("q")
        self._key_at = key_at
        self._digests: Sequence[int] = ()  # sorted
        self._positions: Sequence[int] = ()  # in `offsets`, in the order of the digests

    def find(self, key: str) -> int | None:
        """Return the position of an indexed key in `offsets`, or `None`."""
        wanted = int.from_bytes(digest(key.encode()), "big")
        for place in range(bisect_left(self._digests, wanted), len(self._digests)):
            if self._digests[place] != wanted:
                break
            position = self._positions[place]
            if self._key_at(self.offsets[position]) == key:
                return position
        return None

    def add(self, digests: bytes | bytearray) -> None:
        """
        Index the records at the end of `offsets`. Of several records of a key, the last offset is kept.

        Args:
            digests (`bytes`):
                Digests of the keys of these records, as returned by [`digest`].
        """
        if not digests:
            return
        import numpy as np

        old = len(self._positions)
        # Old entries come first, so that a stable sort keeps records of the same digest in the order of the log
        merged: Any = np.concatenate([np.asarray(self._digests, np.uint64), np.frombuffer(digests, ">u8")])
        new = np.arange(old, len(self.offsets), dtype=np.uint32)
        positions: Any = np.concatenate([np.asarray(self._positions, np.uint32), new])
        order = np.argsort(merged, kind="stable")
        merged, positions = merged[order], positions[order]
        equal: Any = np.flatnonzero(merged[1:] == merged[:-1])
        if len(equal):
            kept = np.ones(len(positions), bool)
            kept[self._replaced(merged, positions, equal)] = False
            merged, positions = merged[kept[positions]], positions[kept[positions]]
            positions = (np.cumsum(kept, dtype=np.uint32) - 1)[positions]
            self.offsets = array("q", np.frombuffer(self.offsets, np.int64)[kept].tobytes())
        self._digests, self._positions = memoryview(merged), memoryview(positions.astype(np.uint32))

    def _replaced(self, digests: Sequence[int], positions: Sequence[int], equal: Sequence[int]) -> list[int]:
        """Keep the last offset of each key at its first position, and return its other positions."""
        replaced: list[int] = []
        # Consecutive places belong to the same or to neighboring digests, which the keys keep apart
        for _, run in groupby(enumerate(equal), lambda entry: int(entry[1]) - entry[0]):
            places = [int(place) for _, place in run]
            first: dict[str, int] = {}
            for position in sorted(int(positions[place]) for place in (*places, places[-1] + 1)):
                kept = first.setdefault(self._key_at(self.offsets[position]), position)
                if kept != position:
                    self.offsets[kept] = self.offsets[position]
                    replaced.append(position)
        return replaced

    def save(self, path: Path, size: int, tail: bytes) -> None:
        """
        Write the index to a file. Without space for it, there is no file, and the log is read again next time.

        Args:
            path (`Path`):
                The file.
            size (`int`):
                Number of bytes of the log that are indexed.
            tail (`bytes`):
                Digest of the last ones of these bytes.
        """
        import numpy as np

        with contextlib.suppress(OSError), replacing(path) as partial, partial.open("wb") as file:
            np.savez(
                file,
                offsets=np.array(self.offsets, np.int64),
                digests=np.asarray(self._digests, np.uint64),
                positions=np.asarray(self._positions, np.uint32),
                size=np.array(size),
                tail=np.frombuffer(tail, np.uint8),
            )

    def load(self, path: Path, size: int, tail: Callable[[int], bytes]) -> int:
        """
        Read the index from a file, if it fits the log.

        Args:
            path (`Path`):
                The file.
            size (`int`):
                Size of the log in bytes.
            tail (`Callable[[int], bytes]`):
                Function that returns the digest of the last bytes before an offset in the log.

        Returns:
            `int`: Number of bytes of the log that are indexed. 0 if the file is missing, damaged, or does not fit.
        """
        if not path.exists():
            return 0
        import numpy as np

        try:
            with np.load(path, allow_pickle=False) as stored:
                indexed = int(stored["size"])
                if indexed > size or stored["tail"].tobytes() != tail(indexed):
                    return 0
                self.offsets = array("q", stored["offsets"].tobytes())
                self._digests, self._positions = memoryview(stored["digests"]), memoryview(stored["positions"])
            count = len(self.offsets)
            for place in range(0, count, max(1, count // _SAMPLES)):
                key = self._key_at(self.offsets[self._positions[place]])
                if digest(key.encode()) != self._digests[place].to_bytes(8, "big"):
                    raise ValueError("the log has changed")
        except Exception:  # the file may be damaged in any way
            self.offsets, self._digests, self._positions = array("q"), (), ()
            return 0
        return indexed
