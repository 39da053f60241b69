"""Writing a checkpoint with `megatron.core.dist_checkpointing`: aside, then renamed; at once or beside the training.

A save has three parts. `begin` plans it (collective) and takes the state as it is; the files are written by each rank
for itself, in `begin` or in a thread; `finish` (collective) gathers what was written, adds state.json and the manifest,
renames the folder and prunes. Whatever fails on any rank ends the run on all of them, with the folder removed and the
checkpoints before it untouched.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import queue
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from remax_megatron.atomic import fsync_path, replacing
from remax_megatron.checkpoint.folders import (
    file_record,
    iteration_folder,
    partial_folder,
    prune,
    remove_leftovers,
    write_manifest,
    write_tracker,
)
from remax_megatron.checkpoint.state import STATE, CheckpointError, RunState
from remax_megatron.parallel.first_rank import from_first_rank
from remax_megatron.parallel.layout import Layout
from remax_megatron.policy.training_state import TrainingState

ZIP_WRITER = "inline_container.cc"
# The writer of megatron-core itself, where there is another: from 0.17 on the default is nvidia-resiliency-ext.
HAS_STRATEGIES = "async_strategy" in inspect.signature(dist_checkpointing.save).parameters
OWN_STRATEGY = {"async_strategy": "mcore"} if HAS_STRATEGIES else {}
MAKE_QUEUE = "get_write_results_queue" if HAS_STRATEGIES else "_get_write_results_queue"
ROOM_FOR_INDEX = 64 * 2**20  # bytes beside the tensors: index, manifest, rounding

log = logging.getLogger(__name__)


class _InThisProcess(TorchDistSaveShardedStrategy):
    """Megatron's strategy, but the files are written by the caller's thread and not by processes that it starts.

    Those cost seconds per save, and a fork of a process that holds a GPU, an engine and threads. megatron-core 0.16.1;
    0.19.2 has threads instead, but still makes a process to hold a queue, and adds the argument `async_strategy`.
    """

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any, *strategy: str) -> AsyncRequest:
        request = super()._get_save_and_finalize_callbacks(writer, save_state_dict_ret, *strategy)
        if request.async_fn is None:  # nothing to write on this rank
            return request
        _, buckets, results = request.async_fn_args
        transforms = [writer.transforms] if hasattr(writer, "transforms") else []
        write = functools.partial(_write_buckets, transforms)
        # Megatron would copy through page-locked memory, in blocks of a power of two, which torch keeps to the end.
        preload = functools.partial(writer.preload_tensors, buckets, False)
        return AsyncRequest(write, (results, buckets), request.finalize_fns, preload_fn=preload)


def _write_buckets(transforms: list, results: queue.Queue, buckets: list) -> None:
    """Write one file per bucket; `results` gets what Megatron's finalisation asks for. Raises what went wrong."""
    written: dict[int, Any] = {}
    one: queue.Queue = queue.Queue()
    busy: queue.Queue = queue.Queue()
    for number, bucket in enumerate(buckets):
        busy.put(number)
        filesystem_async.FileSystemWriterAsync.write_preloaded_data(transforms, number, bucket, one, busy, True)
        _, outcome = one.get()
        if isinstance(outcome, Exception):
            raise outcome
        written[number] = outcome
    results.put(written)


@dataclass
class _Pending:
    """A save between its `begin` and its `finish`."""

    state: RunState
    more_files: dict[str, bytes]  # of rank 0
    request: AsyncRequest
    buckets: list  # the files that this rank writes, their tensors on the CPU
    writing: Future[None] | None = None  # in the background
    records: dict[str, dict[str, Any]] = field(default_factory=dict)  # of the files that this rank wrote
    error: str | None = None  # what kept it from writing them

    def write(self) -> None:
        """Write this rank's files and take their digests; keeps the error instead of raising it."""
        if self.request.async_fn is None:
            return
        results, _ = self.request.async_fn_args
        try:
            self.request.async_fn(results, self.buckets)
            self.records |= {name: file_record(Path(path)) for path, name, _ in self.buckets}
        except (OSError, RuntimeError) as error:  # torch's zip writer makes RuntimeErrors of a full disk
            self.error = f"rank {dist.get_rank()}: {self.buckets[0][0]}: {error}"


class Saver:
    """Writes the checkpoints of a run into `root`. All methods but `is_writing` are collective over the world."""

    def __init__(
        self,
        root: str | Path,
        training_states: Sequence[TrainingState],
        layout: Layout,
        side_files: dict[str, bytes],
        *,
        keep: int,
        in_background: bool,
    ):
        """`training_states` are saved, by each rank of `layout`, into `root`; `side_files` are what makes that a
        model's folder; `keep` and `in_background` are trainer.max_ckpt_to_keep and trainer.async_save."""
        self.root, self._training_states, self._layout = Path(root), training_states, layout
        self._side_files, self._keep, self._in_background = side_files, keep, in_background
        self._pending: _Pending | None = None
        # One thread for all saves: glibc gives each new thread another memory arena, up to 8 per core, and what a
        # save's buffers took stays in it.
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")

    def save(
        self, state: RunState, more_files: Mapping[str, bytes] | None = None, *, in_background: bool | None = None
    ) -> None:
        """Write the checkpoint of `state.step`; with `in_background` (None: as the run is set) only begin to.
        `more_files` are those of rank 0 that belong into its folder.

        CheckpointError, on every rank, when there is no room, or a file cannot be written.
        """
        self.finish()
        background = self._in_background if in_background is None else in_background
        blocks = {name: block for state in self._training_states for name, block in state.sharded().items()}
        tensors = [block for block in blocks.values() if isinstance(block, ShardedTensor)]
        more = dict(more_files or {})
        num_bytes = sum(block.data.numel() * block.data.element_size() for block in tensors)
        num_bytes = self._total(num_bytes + sum(map(len, more.values())))
        folder = partial_folder(self.root, state.step)
        from_first_rank(lambda: self._make_room(folder, num_bytes), CheckpointError)
        if background:
            for block in tensors:
                block.data = block.data.to("cpu", copy=True)
        with self._giving_up(state.step):
            self._pending = self._begin(state, more, blocks, folder, background)
        if not background:
            self.finish()

    def poll(self) -> None:
        """Finish a save in the background once every rank has written its files. To be called at every step."""
        if self._pending is not None and self._total(int(self.is_writing)) == 0:
            self.finish()

    @property
    def is_writing(self) -> bool:
        """Whether this rank still writes."""
        pending = self._pending
        return pending is not None and pending.writing is not None and not pending.writing.done()

    def finish(self) -> None:
        """Wait for the save in the background, if there is one, and complete it. CheckpointError as `save`."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        if pending.writing is not None:
            pending.writing.result()
        gathered: list = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (pending.records, pending.error))
        if errors := [error for _, error in gathered if error is not None]:
            from_first_rank(lambda: self._give_up(pending.state.step, errors[0]), CheckpointError)
        with self._giving_up(pending.state.step):
            for finalize in pending.request.finalize_fns:  # writes .metadata and metadata.json
                finalize()
        records = {name: record for part, _ in gathered for name, record in part.items()}
        from_first_rank(lambda: self._complete(pending.state, pending.more_files, records), CheckpointError)

    def any_rank(self, answer: bool) -> bool:
        """Whether any rank says yes."""
        return self._total(int(answer)) > 0

    # -- the parts -------------------------------------------------------------------------------------------------

    def _begin(self, state: RunState, more: dict[str, bytes], blocks: dict, folder: Path, background: bool) -> _Pending:
        make_queue = getattr(filesystem_async, MAKE_QUEUE)
        setattr(filesystem_async, MAKE_QUEUE, queue.Queue)  # else a process of its own, to hold a queue
        try:
            request = dist_checkpointing.save(
                blocks,
                str(folder),
                sharded_strategy=_InThisProcess("torch_dist", 1, thread_count=1),
                validate_access_integrity=False,  # blocks of no regular grid; the reader checks that they cover all
                async_sharded_save=True,
                content_metadata={"singleton_local_shards": False},
                **OWN_STRATEGY,
            )
        finally:
            setattr(filesystem_async, MAKE_QUEUE, make_queue)
        assert request is not None
        # On this thread: on a GPU it waits for the device, and a new thread's device is another one.
        buckets = request.preload_fn() if request.preload_fn is not None else []
        pending = _Pending(state, more, request, buckets)
        if background:
            pending.writing = self._writer.submit(pending.write)
        else:
            pending.write()
        return pending

    def _make_room(self, folder: Path, num_bytes: int) -> None:
        remove_leftovers(self.root)
        self.root.mkdir(parents=True, exist_ok=True)
        needed = num_bytes + ROOM_FOR_INDEX
        if needed > shutil.disk_usage(self.root).free:
            prune(self.root, self._keep)  # there are more than that when the setting was lowered
        free = shutil.disk_usage(self.root).free
        if needed > free:
            raise CheckpointError(
                f"trainer.default_local_dir: {self.root} has {free / 1e9:.2f} GB free, and a checkpoint needs "
                f"{needed / 1e9:.2f} GB; make room (previous-N/ beside it may hold checkpoints of earlier runs), or "
                f"set trainer.max_ckpt_to_keep lower than {self._keep}"
            )
        folder.mkdir()

    def _give_up(self, step: int, error: str) -> None:
        shutil.rmtree(partial_folder(self.root, step), ignore_errors=True)
        raise CheckpointError(
            f"trainer.default_local_dir: the checkpoint of step {step} could not be written ({error}); make room or "
            "fix the disk: the checkpoints before it are whole, and trainer.resume_mode=auto resumes from the last one"
        )

    @contextlib.contextmanager
    def _giving_up(self, step: int) -> Iterator[None]:
        """Rank 0, which writes the small files, reports disk errors as CheckpointError, on every rank."""
        try:
            yield
        except (OSError, RuntimeError) as error:
            if self._layout.rank != 0 or not (isinstance(error, OSError) or ZIP_WRITER in str(error)):
                raise  # a RuntimeError is a broken collective, unless torch.save says so of a file
            self._give_up(step, f"{type(error).__name__}: {error}")

    def _complete(self, state: RunState, more: dict[str, bytes], records: dict[str, dict[str, Any]]) -> None:
        folder, final = partial_folder(self.root, state.step), iteration_folder(self.root, state.step)
        try:
            self._check_written(folder, records)
            self._seal(folder, {**more, STATE: state.to_json().encode()}, records)
        except OSError as error:
            self._give_up(state.step, str(error))
        for name, content in self._side_files.items():
            if not (self.root / name).exists():
                with replacing(self.root / name) as path:
                    path.write_bytes(content)
        shutil.rmtree(final, ignore_errors=True)
        folder.rename(final)
        fsync_path(self.root)
        write_tracker(self.root, state.step)
        removed = prune(self.root, self._keep)
        gone = f"; removed those of steps {removed}" if removed else ""
        log.info("Checkpoint: %s, %.2f GB%s", final, sum(r["bytes"] for r in records.values()) / 1e9, gone)

    def _check_written(self, folder: Path, records: dict[str, dict[str, Any]]) -> None:
        """CheckpointError when rank 0 does not see what the other ranks have written."""
        for name, record in records.items():
            if not (folder / name).is_file() or (folder / name).stat().st_size != record["bytes"]:
                raise CheckpointError(
                    f"trainer.default_local_dir: rank 0 does not see {folder / name} as another rank wrote it; set it "
                    "to a folder that all nodes share"
                )

    def _seal(self, folder: Path, files: dict[str, bytes], records: dict[str, dict[str, Any]]) -> None:
        """Add the `files` that no other rank has, and bring all to the disk."""
        for name, content in files.items():
            (folder / name).write_bytes(content)
        for path in folder.iterdir():
            if path.name not in records:
                records[path.name] = file_record(path)
        write_manifest(folder, records)
        for path in (*folder.iterdir(), folder):
            fsync_path(path)

    # -- all ranks together ------------------------------------------------------------------------------------------

    def _total(self, number: int) -> int:
        """The sum over all ranks."""
        total = torch.tensor(number, dtype=torch.int64, device=self._layout.device)
        dist.all_reduce(total)
        return int(total)
