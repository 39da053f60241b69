"""Compare two checkpoints of either kind tensor by tensor, or one with its own manifest.

    python convert/verify.py DIR_A DIR_B [--logits] [--tolerance 1e-4] [--json FILE] [--workers N]
    python convert/verify.py DIR

Names, shapes, types and bytes must be equal; every tensor gets a digest, and digests that a folder's manifest
holds must be those of its tensors. With --logits the two models also answer a few prompts, layer by layer in float32,
so that a 32B model needs the memory of one layer; Megatron's fused tensors are taken apart by their definition, not by
the converters' table.

Exit code 0: equal; 1: not; 2: a folder cannot be read.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tqdm import tqdm

from remax_megatron.atomic import replacing
from remax_megatron.convert.command import EXIT_DIFFERENT, Command, run_command
from remax_megatron.convert.copying import BLOCK_BYTES, default_workers, digest, peak_gib
from remax_megatron.convert.logits import max_logit_difference
from remax_megatron.weights.hf_folder import FolderError, expected_shapes
from remax_megatron.weights.mapped import MappedFiles, blocks
from remax_megatron.weights.megatron_folder import open_model, weights_folder
from remax_megatron.weights.tensor_manifest import MANIFEST, manifest_path, read_manifest

SHOWN = 10  # differences that are printed one by one


@dataclass(frozen=True)
class Tensor:
    """What two equal tensors share."""

    dtype: str
    shape: tuple[int, ...]
    digest: str


@dataclass
class Verdict:
    """What was compared and what is not equal, one sentence each."""

    tensors: dict[str, Tensor]
    differences: list[str] = field(default_factory=list)
    max_logit_difference: float | None = None


def read_tensors(folder: str | Path, workers: int | None = None) -> dict[str, Tensor]:
    """Every tensor of the checkpoint in `folder`, under its Hugging Face name, with the digest of its bytes."""
    weights, facts = open_model(folder)
    shapes = expected_shapes(facts)
    maps = MappedFiles()
    total = sum(extent.num_bytes for name in shapes for extent in weights.extents(name))
    with tqdm(total=total, unit="B", unit_scale=True, desc=str(folder), file=sys.stderr, mininterval=0.5) as bar:

        def views(name: str) -> Iterator[memoryview]:
            for extent in weights.extents(name):
                maps.prefetch(extent)
            for block in blocks(weights.extents(name), BLOCK_BYTES):
                for extent in block:
                    yield maps.read(extent)
                    maps.release(extent)
                bar.update(sum(extent.num_bytes for extent in block))

        def read(name: str) -> Tensor:
            try:
                dtype = str(weights.dtype(name)).removeprefix("torch.")
                return Tensor(dtype, shapes[name], digest(views(name)))
            except OSError as error:
                raise FolderError(f"{folder}: {name} cannot be read: {error}") from error

        with ThreadPoolExecutor(workers or default_workers()) as pool:
            return dict(zip(shapes, pool.map(read, shapes), strict=True))


def compare(a: str | Path, b: str | Path | None = None, *, workers: int | None = None) -> Verdict:
    """Compare the checkpoints in `a` and `b`, and each with its own manifest. FolderError when `a` alone has none."""
    found = {str(folder): read_tensors(folder, workers) for folder in (a, b) if folder is not None}
    verdict = Verdict(found[str(a)])
    for folder, tensors in found.items():
        manifest = read_manifest(weights_folder(folder))
        if manifest is None and b is None:
            raise FolderError(f"{folder} has no {MANIFEST} to be compared with; name a second folder")
        said = {} if manifest is None else manifest["tensors"]
        for name in said.keys() | tensors.keys() if manifest is not None else ():
            is_there = {} if name not in tensors else asdict(tensors[name])
            if json.loads(json.dumps(is_there)) != said.get(name):
                verdict.differences.append(
                    f"{name}: {folder} is not what its {manifest_path(weights_folder(folder)).name} says"
                )
    if b is not None:
        mine, other = found[str(a)], found[str(b)]
        for name in mine.keys() | other.keys():
            if name not in mine or name not in other:
                verdict.differences.append(f"{name}: only in {a if name in mine else b}")
                continue
            for what in ("shape", "dtype", "digest"):
                left, right = getattr(mine[name], what), getattr(other[name], what)
                if left != right:
                    verdict.differences.append(f"{name}: the {what} is {left} in {a} and {right} in {b}")
                    break
    verdict.differences.sort()
    return verdict


def main(argv: list[str] | None = None) -> int:
    """Verify a converted folder, as the command line says; returns the exit code."""
    command = Command("convert/verify.py", __doc__)
    command.add("folders", nargs="+", metavar="DIR", help="Hugging Face folder or Megatron checkpoint; one or two")
    command.add("--logits", action="store_true", help="also compare what the two models answer to a few prompts")
    command.add("--tolerance", type=float, default=1e-4, metavar="X", help="largest difference of a logit (1e-4)")
    command.add("--json", metavar="FILE", help="write the digest of every tensor, and the differences, to FILE")
    command.add_workers()

    def body(options: argparse.Namespace) -> int:
        if len(options.folders) > 2 or (options.logits and len(options.folders) != 2):
            raise FolderError("give two folders, or one to compare with its own manifest (without --logits)")
        verdict = compare(options.folders[0], *options.folders[1:], workers=options.workers)
        if options.logits:
            verdict.max_logit_difference = max_logit_difference(*options.folders)
        return report(verdict, options.tolerance, options.json)

    return run_command(command, argv, body)


def report(verdict: Verdict, tolerance: float = 0.0, json_file: str | None = None) -> int:
    """Print the verdict; returns the exit code."""
    if json_file:
        try:
            with replacing(json_file) as path:
                path.write_text(json.dumps(asdict(verdict), indent=1) + "\n")
        except OSError as error:
            raise FolderError(f"--json {json_file} cannot be written: {error}") from error
    for difference in verdict.differences[:SHOWN]:
        print(difference)
    if len(verdict.differences) > SHOWN:
        print(f"... and {len(verdict.differences) - SHOWN} more")
    far = verdict.max_logit_difference
    if far is not None:
        print(f"largest difference of a logit: {far:.3g} (tolerance {tolerance:g})")
    count = len(verdict.differences)
    print(f"{len(verdict.tensors)} tensors, {count or 'no'} differences; peak memory {peak_gib():.2f} GiB")
    return EXIT_DIFFERENT if count or (far is not None and not far <= tolerance) else 0
