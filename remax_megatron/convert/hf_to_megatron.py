"""Hugging Face folder -> Megatron distributed checkpoint.

    python convert/hf_to_megatron.py --hf DIR --output DIR [--dtype bf16|fp32] [--workers N] [--resume]

The checkpoint is of no particular layout: every layer's tensors are stored whole, and Megatron cuts them for the
TP x PP x DP it loads them at. No tensor is ever held in memory: between the two formats rows only change places, so
bytes are copied from file to file (with --dtype, block by block).
"""

from __future__ import annotations

import argparse
import threading
import time
from pathlib import Path
from typing import Any

import torch

from remax_megatron.convert.command import Command, run_command
from remax_megatron.convert.copying import Cast, Job, OutputFile, Piece, Report, write_folder
from remax_megatron.convert.partial_folder import ConversionError
from remax_megatron.model_facts import ModelFacts
from remax_megatron.weights.hf_folder import (
    HF_EMBEDDING,
    INDEX,
    HfLayout,
    HfWeights,
    check_folder,
    expected_shapes,
    side_files,
)
from remax_megatron.weights.megatron_folder import TRACKER
from remax_megatron.weights.shards import RowRun, row_runs
from remax_megatron.weights.tensor_manifest import write_manifest
from remax_megatron.weights.torch_dist import saved_key
from remax_megatron.weights.torch_dist_writer import (
    ITEM_ALIGNMENT,
    Item,
    common_files,
    extra_state_keys,
    import_metadata_classes,
    item_wrapper,
    metadata,
    object_item,
)
from remax_megatron.weights.weight_table import WeightEntry, padded_vocab_size, weight_table

ITERATION_FOLDER = "iter_0000000"
MAX_FILE_BYTES = 2 * 10**9
MAX_CHUNK_BYTES = 128 * 2**20  # what a rank that loads a part of the embedding has to read at once
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def convert(
    hf: str | Path,
    output: str | Path,
    *,
    dtype: torch.dtype | None = None,
    workers: int | None = None,
    resume: bool = False,
) -> Report:
    """Write the model in `hf` as the new checkpoint folder `output`, in `dtype` (None: as stored).

    UserError (FolderError, ConfigError, ConversionError), with `output` absent, when that cannot be done.
    """
    started = time.perf_counter()
    hf, output = Path(hf), Path(output)
    facts = ModelFacts.from_folder(hf, setting="--hf")
    weights = HfWeights(hf)
    check_folder(weights, facts)
    if output.resolve().is_relative_to(hf.resolve()):
        raise ConversionError(f"--output {output} lies in the folder --hf {hf}; choose one outside of it")
    shapes = expected_shapes(facts)
    types = {name: weights.dtype(name) for name in shapes}
    stored = set(types.values())
    if dtype is None and len(stored) > 1:
        raise ConversionError(
            f"--hf {hf} holds tensors of types {', '.join(sorted(map(str, stored)))}; give the one type that the "
            f"checkpoint is to have: --dtype {' or '.join(DTYPES)}"
        )
    target = dtype or types[HF_EMBEDDING]
    threading.Thread(target=import_metadata_classes, daemon=True).start()  # takes seconds; copying takes no less
    plan = _Plan(facts, weights, target)

    def finish(folder: Path, digests: dict[str, str]) -> None:
        checkpoint = folder / ITERATION_FOLDER
        for name, content in common_files().items():
            (checkpoint / name).write_bytes(content)
        (checkpoint / ".metadata").write_bytes(metadata(plan.items, plan.objects, target))
        for name, content in side_files(hf, target if stored != {target} else None).items():
            (folder / name).write_bytes(content)
        more: dict[str, Any] = {}
        as_stored = weights.names == set(shapes) and not weights.renamed and stored == {target}
        if as_stored and HfLayout(weights.files, None).is_sound():
            index = hf / INDEX
            more["hf_files"] = {name: file.header for name, file in weights.files.items()}
            more["hf_index"] = index.read_bytes().decode() if index.exists() else None
        write_manifest(checkpoint, shapes, target, digests, **more)
        (folder / TRACKER).write_text("0\n")

    return write_folder(
        output,
        plan.files,
        plan.jobs,
        inputs=[hf / name for name in weights.files],
        started=started,
        finish=finish,
        cast=None if stored == {target} else Cast(types, target),
        workers=workers,
        resume=resume,
        title="Hugging Face -> Megatron",
    )


class _Plan:
    """Where every chunk of the checkpoint goes and which bytes it is made of. Files are relative to the output."""

    def __init__(self, facts: ModelFacts, weights: HfWeights, target: torch.dtype):
        self.items: list[Item] = []
        self.objects: list[tuple[str, str, int, int]] = []
        self.jobs: list[Job] = []
        self.files: list[OutputFile] = []
        self._target = target
        self._name, self._size, self._literals = self._next_name(), 0, []
        for entry in weight_table(facts):
            if self._size > MAX_FILE_BYTES:
                self._close_file()
            self.jobs.append(self._job(entry, weights, facts))
        empty = object_item(None)
        for key in extra_state_keys(facts):
            start = self._reserve(len(empty))
            self._literals.append((start, empty))
            self.objects.append((key, self._in_checkpoint(), start, len(empty)))
        self._close_file()

    def _job(self, entry: WeightEntry, weights: HfWeights, facts: ModelFacts) -> Job:
        first, *rest = entry.hf_shapes[0]
        rows = padded_vocab_size(first, 1) if entry.kind == "vocab" else sum(s[0] for s in entry.hf_shapes)
        layers = () if entry.layer is None else (facts.num_layers,)
        at_layer = () if entry.layer is None else (entry.layer,)
        row_bytes = torch.Size(rest).numel() * self._target.itemsize
        chunk_rows = max(1, MAX_CHUNK_BYTES // row_bytes) if entry.kind == "vocab" else rows
        runs = row_runs(entry, facts)
        pieces = []
        for top in range(0, rows, chunk_rows):
            count = min(chunk_rows, rows - top)
            shape = (*(1 for _ in layers), count, *rest)
            before, after = item_wrapper(shape, self._target)
            start = self._reserve(len(before) + count * row_bytes + len(after))
            data = start + len(before)
            end = data + count * row_bytes + len(after)
            self._literals += [(start, before), (end - len(after), after)]
            self.items.append(
                Item(
                    saved_key(entry),
                    (*layers, rows, *rest),
                    (*at_layer, top, *(0 for _ in rest)),
                    shape,
                    self._in_checkpoint(),
                    start,
                    end,
                )
            )
            parts = [
                (run.hf_name, extent)
                for run in _within(runs, top, top + count)
                for extent in weights.extents(run.hf_name, run.hf_row, run.num_rows)
            ]
            if parts:  # a chunk of nothing but padding stays a hole of zeros
                pieces.append(Piece(data, parts))
        num_bytes = sum(extent.num_bytes for piece in pieces for _, extent in piece.parts)
        return Job(f"{entry.layer}:{entry.megatron_name}", self._name, num_bytes, lambda: pieces)

    def _reserve(self, num_bytes: int) -> int:
        start = -(-self._size // ITEM_ALIGNMENT) * ITEM_ALIGNMENT
        self._size = start + num_bytes
        return start

    def _close_file(self) -> None:
        self.files.append(OutputFile(self._name, self._size, self._literals))
        self._name, self._size, self._literals = self._next_name(), 0, []

    def _in_checkpoint(self) -> str:
        """The current file as .metadata names it: relative to the checkpoint's own folder."""
        return self._name.removeprefix(ITERATION_FOLDER + "/")

    def _next_name(self) -> str:
        return f"{ITERATION_FOLDER}/__0_{len(self.files)}.distcp"


def _within(runs: list[RowRun], start: int, stop: int) -> list[RowRun]:
    """The parts of `runs` that are Megatron's rows `start` to `stop`."""
    cut = []
    for run in runs:
        first = max(run.megatron_row, start)
        count = min(run.megatron_row + run.num_rows, stop) - first
        if count > 0:
            cut.append(RowRun(run.hf_name, run.hf_row + first - run.megatron_row, first, count))
    return cut


def main(argv: list[str] | None = None) -> int:
    """Convert a Hugging Face folder, as the command line says; returns the exit code."""
    command = Command("convert/hf_to_megatron.py", __doc__)
    command.add("--hf", required=True, metavar="DIR", help="Hugging Face folder: config.json and safetensors")
    command.add("--output", required=True, metavar="DIR", help="new folder for the Megatron checkpoint")
    command.add("--dtype", choices=DTYPES, help="type of the checkpoint's weights (default: as stored)")
    command.add_writing_options()

    def body(options: argparse.Namespace) -> int:
        dtype = DTYPES.get(options.dtype)
        if note := ModelFacts.from_folder(options.hf, setting="--hf").note_on_unknown_keys():
            print(f"note: {note}")
        report = convert(options.hf, options.output, dtype=dtype, workers=options.workers, resume=options.resume)
        print(f"{options.output}: {report}")
        return 0

    return run_command(command, argv, body)
