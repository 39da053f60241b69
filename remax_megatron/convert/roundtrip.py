"""Hugging Face folder -> Megatron checkpoint -> Hugging Face folder, and compare the two ends.

    python convert/roundtrip.py DIR [--work DIR] [--keep] [--workers N]

Needs room for twice the model in --work (default: the system's folder for temporary files). Exit code 0: every tensor
has equal bytes, and every file is equal to the one it came from; 1: not; 2: it could not be tried.
"""

from __future__ import annotations

import argparse
import filecmp
import tempfile
from pathlib import Path

from remax_megatron.convert import hf_to_megatron, megatron_to_hf
from remax_megatron.convert.command import Command, run_command
from remax_megatron.convert.partial_folder import ConversionError
from remax_megatron.convert.verify import Verdict, compare, report
from remax_megatron.weights.hf_folder import INDEX, SIDE_FILES, HfWeights


def roundtrip(folder: str | Path, work: Path, workers: int | None = None) -> Verdict:
    """Convert `folder` there and back inside `work`; differences of tensors, and of files that should be the same."""
    folder = Path(folder)
    print(f"there: {hf_to_megatron.convert(folder, work / 'megatron', workers=workers)}")
    print(f"back:  {megatron_to_hf.convert(work / 'megatron', work / 'hf', workers=workers)}")
    verdict = compare(folder, work / "hf", workers=workers)
    weights = HfWeights(folder)
    if weights.names == set(verdict.tensors) and not weights.renamed:  # so the files can be the same
        names = [*weights.files, *(name for name in (INDEX, *SIDE_FILES) if (folder / name).is_file())]
        unequal = filecmp.cmpfiles(folder, work / "hf", names, shallow=False)
        verdict.differences += [f"{name}: the file is not the one it came from" for name in unequal[1] + unequal[2]]
    return verdict


def main(argv: list[str] | None = None) -> int:
    """Convert there and back, compare bytes; returns the exit code."""
    command = Command("convert/roundtrip.py", __doc__)
    command.add("folder", metavar="DIR", help="Hugging Face folder")
    command.add("--work", metavar="DIR", help="folder for the copies")
    command.add("--keep", action="store_true", help="leave the copies in --work")
    command.add_workers()

    def body(options: argparse.Namespace) -> int:
        if options.work and not Path(options.work).is_dir():
            raise ConversionError(f"--work {options.work}: there is no such folder")
        if options.keep and not options.work:
            raise ConversionError("--keep needs --work, the folder to leave the copies in")
        if options.keep:
            return report(roundtrip(options.folder, Path(options.work), options.workers))
        try:
            with tempfile.TemporaryDirectory(prefix="roundtrip-", dir=options.work) as work:
                return report(roundtrip(options.folder, Path(work), options.workers))
        except OSError as error:
            raise ConversionError(f"--work {options.work}: {error}") from error

    return run_command(command, argv, body)
