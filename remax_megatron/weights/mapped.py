"""Files mapped into memory, and stretches of bytes in them. Nothing here knows what the bytes mean.

A stretch is brought in and let go again by `read` and `release`, so that the memory of a process that walks through
a hundred gigabytes stays at a few megabytes.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

MADV_POPULATE_READ = 22  # Linux 5.14: maps a stretch at once, and fails where touching it would be a SIGBUS


@dataclass(frozen=True)
class Extent:
    """`num_bytes` bytes of the file `path` from `offset` on."""

    path: str
    offset: int
    num_bytes: int


class MappedFiles:
    """Read-only maps of files, opened at first use; threads may share one."""

    def __init__(self) -> None:
        self._maps: dict[str, tuple[mmap.mmap, int]] = {}
        self._lock = threading.Lock()

    def prefetch(self, extent: Extent) -> None:
        """Start reading `extent` from the disk; does not wait. `read` holds Python's lock while it waits."""
        os.posix_fadvise(self._map(extent.path)[1], extent.offset, extent.num_bytes, os.POSIX_FADV_WILLNEED)

    def read(self, extent: Extent) -> memoryview:
        """The bytes of `extent`, mapped. OSError when the file has become too short."""
        opened, handle = self._map(extent.path)
        if extent.offset + extent.num_bytes > os.fstat(handle).st_size:  # a map of its last page would read zeros
            raise OSError(errno.EIO, "the file is too short", extent.path)
        start = extent.offset // mmap.PAGESIZE * mmap.PAGESIZE
        try:
            opened.madvise(MADV_POPULATE_READ, start, extent.offset + extent.num_bytes - start)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a kernel that does not know it: pages come when they are touched
                raise OSError(error.errno, os.strerror(error.errno or errno.EIO), extent.path) from error
        return memoryview(opened)[extent.offset : extent.offset + extent.num_bytes]

    def release(self, extent: Extent) -> None:
        """Give the memory of `extent` back; the file's pages stay in the system's cache."""
        opened, _ = self._map(extent.path)
        start = extent.offset // mmap.PAGESIZE * mmap.PAGESIZE
        opened.madvise(mmap.MADV_DONTNEED, start, min(extent.offset + extent.num_bytes, len(opened)) - start)

    def equal(self, a: Extent, b: Extent) -> bool:
        """Whether two stretches hold the same bytes."""
        same = self.read(a) == self.read(b)
        self.release(a)
        self.release(b)
        return same

    def close(self) -> None:
        """Unmap and close all files; no view of them may be left."""
        with self._lock:
            while self._maps:
                opened, handle = self._maps.popitem()[1]
                opened.close()
                os.close(handle)

    def __del__(self) -> None:
        for _, handle in self._maps.values():  # a map closes itself when its last view is gone
            os.close(handle)

    def _map(self, path: str) -> tuple[mmap.mmap, int]:
        """The map of the file, and its descriptor."""
        with self._lock:
            if path not in self._maps:
                handle = os.open(path, os.O_RDONLY)
                self._maps[path] = mmap.mmap(handle, 0, access=mmap.ACCESS_READ), handle
            return self._maps[path]


def blocks(extents: Iterable[Extent], num_bytes: int) -> Iterator[list[Extent]]:
    """The extents in order, cut and grouped into lists of at most `num_bytes` bytes."""
    group: list[Extent] = []
    room = num_bytes
    for extent in extents:
        offset, left = extent.offset, extent.num_bytes
        while left:
            take = min(left, room)
            group.append(Extent(extent.path, offset, take))
            offset, left, room = offset + take, left - take, room - take
            if not room:
                yield group
                group, room = [], num_bytes
    if group:
        yield group
