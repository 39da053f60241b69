"""Writing a folder of large files from stretches of other files: in parallel, resumable, whole or not at all.

The folder and its journal are partial_folder.py's. With `resume` what the journal names is read back, its digests are
compared, and the rest is done. Bytes go from map to file in blocks that stay in the processor's cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import torch
import xxhash
from tqdm import tqdm

from remax_megatron.convert.partial_folder import JOURNAL, Journal, partial_folder
from remax_megatron.weights.mapped import Extent, MappedFiles, blocks

BLOCK_BYTES = 2**20  # fits the second-level cache: a block is hashed and written while it is there
MAX_VECTORS = 1024  # of one pwritev (Linux IOV_MAX)


@dataclass(frozen=True)
class Piece:
    """Bytes to put at `offset` of the output file: parts of tensors, each with the tensor's name, in order."""

    offset: int
    parts: list[tuple[str, Extent]]


@dataclass(frozen=True)
class Job:
    """What one worker writes in one go. Parts of a tensor appear in the tensor's own order, in one job only.

    `num_bytes` are those read. `pieces` is called when the job runs: a tensor that Megatron has cut into columns is
    made of hundreds of thousands of stretches.
    """

    name: str
    file: str
    num_bytes: int
    pieces: Callable[[], list[Piece]]


@dataclass(frozen=True)
class OutputFile:
    """A file to be written: its size, and the bytes that are no tensor's as (offset, bytes)."""

    name: str
    num_bytes: int
    literals: list[tuple[int, bytes]] = field(default_factory=list)


@dataclass(frozen=True)
class Cast:
    """Change of the tensors' types, by name, to one on the way."""

    sources: Mapping[str, torch.dtype]
    target: torch.dtype

    def __call__(self, name: str, view: memoryview) -> memoryview:
        if self.sources[name] == self.target:
            return view
        tensor = torch.frombuffer(bytearray(view), dtype=self.sources[name]).to(self.target)
        return tensor.view(torch.uint8).numpy().data

    def written_bytes(self, name: str, num_bytes: int) -> int:
        """Count the bytes that `num_bytes` of the tensor `name` become."""
        return num_bytes // self.sources[name].itemsize * self.target.itemsize


@dataclass(frozen=True)
class Report:
    """What a conversion took. `num_bytes` is what was written; `seconds` includes flushing to disk."""

    num_bytes: int
    seconds: float
    digests: dict[str, str]

    def __str__(self) -> str:
        rate = self.num_bytes / 1e9 / self.seconds
        return (
            f"{self.num_bytes / 1e9:.2f} GB in {self.seconds:.2f} s ({rate:.2f} GB/s), peak memory {peak_gib():.2f} GiB"
        )


def default_workers() -> int:
    """Return how many processes copy by default."""
    return min(8, os.cpu_count() or 1)


def peak_gib() -> float:
    """Largest resident memory of this process so far, in GiB, files mapped into it included."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


def digest(views: Iterable[memoryview]) -> str:
    """xxh3-128 of the bytes in hexadecimal: finds damage, not forgery."""
    state = xxhash.xxh3_128()
    for view in views:
        state.update(view)
    return state.hexdigest()


def write_folder(
    output: str | Path,
    files: Sequence[OutputFile],
    jobs: Sequence[Job],
    *,
    inputs: Iterable[Path],
    started: float,
    finish: Callable[[Path, dict[str, str]], None],
    cast: Cast | None = None,
    workers: int | None = None,
    resume: bool = False,
    title: str = "converting",
) -> Report:
    """Write `files` in the new folder `output`; `finish(folder, digests)` then adds the small files.

    jobs     the tensors that fill the files
    inputs   files that are read
    started  when the conversion began (time.perf_counter), for the report
    cast     how elements are converted, None: they are copied
    workers  threads, None: `default_workers`
    resume   whether an interrupted conversion is continued
    title    of the progress bar

    ConversionError when `output` exists or cannot be written, the disk is full, or an interrupted conversion to
    `output` was left behind (without `resume`) or was started from other input (with it).
    """
    output = Path(output)
    size = sum(file.num_bytes for file in files)
    with partial_folder(output, size, _fingerprint(inputs, jobs, cast), resume) as (partial, journal):
        writer = _Writer(partial, files, cast)
        try:
            writer.write_literals()
            digests = _run(writer, jobs, journal, workers or default_workers(), title)
            writer.sync()
        finally:
            writer.close()
        finish(partial, digests)
        num_bytes = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file() and path.name != JOURNAL)
    return Report(num_bytes, time.perf_counter() - started, digests)


class _Writer:
    """The open output files of one conversion, and how a job's bytes get into them."""

    def __init__(self, folder: Path, files: Sequence[OutputFile], cast: Cast | None):
        self.files, self.cast, self.maps = files, cast, MappedFiles()
        self.handles: dict[str, int] = {}
        for file in files:
            path = folder / file.name
            path.parent.mkdir(parents=True, exist_ok=True)
            self.handles[file.name] = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            os.ftruncate(self.handles[file.name], file.num_bytes)

    def write_literals(self) -> None:
        for file in self.files:
            for offset, data in file.literals:
                _write_at(self.handles[file.name], [memoryview(data)], offset)

    def write(self, job: Job, progress: Callable[[int], object]) -> dict[str, str]:
        """Copy the job's bytes; returns the digest of every tensor written."""
        states: dict[str, xxhash.xxh3_128] = {}
        for piece in job.pieces():
            for _, extent in piece.parts:
                self.maps.prefetch(extent)
            offset = piece.offset
            names = iter(piece.parts)
            name, left = "", 0
            for block in blocks((extent for _, extent in piece.parts), BLOCK_BYTES):
                views = []
                for extent in block:
                    if not left:
                        name, whole = next(names)
                        left = whole.num_bytes
                    left -= extent.num_bytes
                    view = self.maps.read(extent)
                    views.append(self.cast(name, view) if self.cast else view)
                    states.setdefault(name, xxhash.xxh3_128()).update(views[-1])
                _write_at(self.handles[job.file], views, offset)
                offset += sum(view.nbytes for view in views)
                for extent in block:
                    self.maps.release(extent)
                progress(sum(extent.num_bytes for extent in block))
        return {name: state.hexdigest() for name, state in states.items()}

    def read_back(self, job: Job) -> dict[str, str]:
        """The digests of what the job wrote, from the file."""
        states: dict[str, xxhash.xxh3_128] = {}
        for piece in job.pieces():
            offset = piece.offset
            for name, extent in piece.parts:
                size = self.cast.written_bytes(name, extent.num_bytes) if self.cast else extent.num_bytes
                end = offset + size
                while offset < end:
                    data = os.pread(self.handles[job.file], min(BLOCK_BYTES, end - offset), offset)
                    states.setdefault(name, xxhash.xxh3_128()).update(data)
                    offset += len(data)
        return {name: state.hexdigest() for name, state in states.items()}

    def sync(self) -> None:
        for handle in self.handles.values():
            os.fsync(handle)

    def close(self) -> None:
        with contextlib.suppress(BufferError):  # an exception on its way out still holds a view
            self.maps.close()
        for handle in self.handles.values():
            os.close(handle)


def _write_at(handle: int, views: list[memoryview], offset: int) -> None:
    """All of `views`, one after the other, at `offset` of the file."""
    for first in range(0, len(views), MAX_VECTORS):
        group = views[first : first + MAX_VECTORS]
        size = sum(view.nbytes for view in group)
        written = os.pwritev(handle, group, offset)
        if written < size:  # a signal or a nearly full disk cut it short
            rest = memoryview(b"".join(group))[written:]
            while rest:
                count = os.pwrite(handle, rest, offset + size - len(rest))
                rest = rest[count:]
        offset += size


def _run(writer: _Writer, jobs: Sequence[Job], journal: Journal, workers: int, title: str) -> dict[str, str]:
    """Do the jobs that are not done, the largest first; returns all digests."""
    digests: dict[str, str] = {}
    lock, stop = threading.Lock(), threading.Event()
    total = sum(job.num_bytes for job in jobs)
    with tqdm(total=total, unit="B", unit_scale=True, desc=title, file=sys.stderr, mininterval=0.5) as bar:

        def progress(num_bytes: int) -> None:
            if stop.is_set():
                raise KeyboardInterrupt
            with lock:
                bar.update(num_bytes)

        def do(job: Job) -> dict[str, str]:
            earlier = journal.done.get(job.name)
            if earlier is not None and writer.read_back(job) == earlier:
                progress(job.num_bytes)
                return earlier
            written = writer.write(job, progress)
            journal.record(job.name, written)
            return written

        with ThreadPoolExecutor(workers) as pool:
            futures = [pool.submit(do, job) for job in sorted(jobs, key=lambda job: -job.num_bytes)]
            try:
                for future in as_completed(futures):
                    digests |= future.result()
            except BaseException:
                stop.set()
                pool.shutdown(cancel_futures=True)
                raise
    return digests


def _fingerprint(inputs: Iterable[Path], jobs: Sequence[Job], cast: Cast | None) -> str:
    """Changes with the input files (size, time of change), the plan of what goes where, and the cast."""
    state = hashlib.sha256(repr(cast).encode())
    for job in jobs:
        state.update(repr((job.name, job.file, job.num_bytes)).encode())
    for path in sorted(inputs):
        stat = os.stat(path)
        state.update(repr((str(path), stat.st_size, stat.st_mtime_ns)).encode())
    return state.hexdigest()
