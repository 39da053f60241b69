"""Megatron distributed checkpoint -> Hugging Face folder.

    python convert/megatron_to_hf.py --megatron DIR --output DIR [--hf-template DIR] [--max-shard-size 5GB]
                                     [--workers N] [--resume]

Takes what hf_to_megatron.py wrote, and what Megatron saved at any TP x PP x DP (--ckpt-format torch_dist). config.json
and the tokenizer come from beside the checkpoint, or from --hf-template. A checkpoint that came from Hugging Face
files, unchanged in type, becomes the same files byte for byte, unless --max-shard-size asks for others.
"""

from __future__ import annotations

import argparse
import re
import time
from functools import partial
from pathlib import Path

import torch

from remax_megatron.convert.command import Command, run_command
from remax_megatron.convert.copying import Job, OutputFile, Piece, Report, write_folder
from remax_megatron.convert.partial_folder import ConversionError
from remax_megatron.model_facts import ModelFacts
from remax_megatron.weights.hf_folder import DTYPE_NAMES, INDEX, MAX_SHARD_BYTES, HfLayout, expected_shapes, side_files
from remax_megatron.weights.megatron_folder import MegatronWeights, is_megatron_folder, model_folder, weights_folder
from remax_megatron.weights.tensor_manifest import check_digests, recorded_layout, write_manifest

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def convert(
    megatron: str | Path,
    output: str | Path,
    *,
    hf_template: str | Path | None = None,
    max_shard_bytes: int | None = None,
    workers: int | None = None,
    resume: bool = False,
) -> Report:
    """Write the model in the checkpoint `megatron` as the new Hugging Face folder `output`.

    hf_template      folder with config.json and tokenizer, None: they lie beside the checkpoint
    max_shard_bytes  of a file, None: the files the checkpoint came from, or files of up to 5 GB
    workers          threads, None: one per processor, at most 8
    resume           whether an interrupted conversion is continued

    UserError (FolderError, ConfigError, ConversionError), with `output` absent, when that cannot be done.
    """
    started = time.perf_counter()
    megatron, output = Path(megatron), Path(output)
    template, weights, facts = _checked(megatron, output, hf_template)
    shapes, dtype = expected_shapes(facts), _only_dtype(megatron, weights, facts)
    layout = None if max_shard_bytes else recorded_layout(weights_folder(megatron), shapes, dtype)
    layout = layout or HfLayout.planned(facts, dtype, max_shard_bytes or MAX_SHARD_BYTES)
    files = [OutputFile(name, file.num_bytes, [(0, file.head)]) for name, file in layout.files.items()]
    jobs = []
    for name in shapes:
        file, offset = layout.place(name)
        size = torch.Size(shapes[name]).numel() * dtype.itemsize
        jobs.append(Job(name, file, size, partial(_piece, weights, name, offset)))

    def finish(folder: Path, digests: dict[str, str]) -> None:
        check_digests(weights_folder(megatron), digests)
        for name, content in side_files(template, dtype).items():
            (folder / name).write_bytes(content)
        if layout.index is not None:
            (folder / INDEX).write_bytes(layout.index.encode())
        write_manifest(folder, shapes, dtype, digests)

    return write_folder(
        output,
        files,
        jobs,
        inputs=weights.files,
        started=started,
        finish=finish,
        workers=workers,
        resume=resume,
        title="Megatron -> Hugging Face",
    )


def _checked(megatron: Path, output: Path, hf_template: str | Path | None) -> tuple[Path, MegatronWeights, ModelFacts]:
    """(folder of config.json and tokenizer, the checkpoint's weights, its model's facts). UserError as `convert`."""
    if not is_megatron_folder(megatron):
        raise ConversionError(
            f"--megatron {megatron} is not a Megatron checkpoint: no such folder, or no .metadata in it; name one"
        )
    if output.resolve().is_relative_to(megatron.resolve()):
        raise ConversionError(f"--output {output} lies in the folder --megatron {megatron}; choose one outside of it")
    template = model_folder(megatron) if hf_template is None else Path(hf_template)
    if hf_template is None and not (template / "config.json").is_file():
        raise ConversionError(
            f"--megatron {megatron} has no config.json beside it; name a folder with the model's config.json and "
            "tokenizer by --hf-template"
        )
    facts = ModelFacts.from_folder(template, setting="--megatron" if hf_template is None else "--hf-template")
    weights = MegatronWeights(megatron, facts)
    weights.check_items()
    return template, weights, facts


def _only_dtype(megatron: Path, weights: MegatronWeights, facts: ModelFacts) -> torch.dtype:
    """The type of all tensors. ConversionError when there are several, or one that folders do not have."""
    stored = {weights.dtype(name) for name in expected_shapes(facts)}
    if len(stored) > 1 or not stored <= DTYPE_NAMES.keys():
        raise ConversionError(
            f"--megatron {megatron} holds tensors of types {sorted(map(str, stored))}; expected one of "
            f"{', '.join(map(str, DTYPE_NAMES))} for all"
        )
    return stored.pop()


def _piece(weights: MegatronWeights, name: str, offset: int) -> list[Piece]:
    return [Piece(offset, [(name, extent) for extent in weights.extents(name)])]


def shard_size(text: str) -> int:
    """Bytes of "5GB", "500MB", "2GiB" or a plain number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]?I?B|)", text.strip().upper())
    size = int(float(match[1]) * UNITS[match[2]]) if match and match[2] in UNITS else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a size such as 5GB, 500MB or 2GiB")
    return size


def main(argv: list[str] | None = None) -> int:
    """Convert a Megatron checkpoint, as the command line says; returns the exit code."""
    command = Command("convert/megatron_to_hf.py", __doc__)
    command.add(
        "--megatron", required=True, metavar="DIR", help="Megatron checkpoint: the folder with the tracker file"
    )
    command.add("--output", required=True, metavar="DIR", help="new Hugging Face folder")
    command.add(
        "--hf-template", metavar="DIR", help="folder with config.json and tokenizer (default: the checkpoint's)"
    )
    command.add(
        "--max-shard-size",
        type=shard_size,
        metavar="SIZE",
        help="of a safetensors file (default: as the files it came from, or 5GB)",
    )
    command.add_writing_options()

    def body(options: argparse.Namespace) -> int:
        report = convert(
            options.megatron,
            options.output,
            hf_template=options.hf_template,
            max_shard_bytes=options.max_shard_size,
            workers=options.workers,
            resume=options.resume,
        )
        print(f"{options.output}: {report}")
        return 0

    return run_command(command, argv, body)
