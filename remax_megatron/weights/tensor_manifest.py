"""tensor_manifest.json: the tensors of a folder with a digest of each, and how the Hugging Face files were laid out.

    {"digest": "xxh3_128", "tensors": {NAME: {"dtype", "shape", "digest"}}, "hf_files": {FILE: HEAD}, "hf_index": TEXT}

Names are Hugging Face's in both kinds of folder, and a digest covers the tensor's bytes in row-major order, so that
equal tensors have equal digests wherever they lie. `hf_files` and `hf_index` are there when the checkpoint came from
Hugging Face files without a change of type: with them the files can be made again byte for byte.

The files of a run's checkpoint are in `file_manifest.json` (checkpoint/folders.py). In version 0.1.0 both were called
`manifest.json`; folders of that time are read as before.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from remax_megatron.weights.hf_folder import FolderError, HfLayout

MANIFEST = "tensor_manifest.json"
OLD_MANIFEST = "manifest.json"


def write_manifest(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, digests: Mapping[str, str], **more: Any
) -> None:
    """Write the digests of a converted folder's tensors and files beside them."""
    tensors = {
        name: {"dtype": str(dtype).removeprefix("torch."), "shape": list(shape), "digest": digests[name]}
        for name, shape in shapes.items()
    }
    content = {"digest": "xxh3_128", "tensors": tensors} | more
    (folder / MANIFEST).write_text(json.dumps(content, indent=1) + "\n")


def manifest_path(folder: Path) -> Path:
    """Where the manifest of `folder` lies, or would lie."""
    old = folder / OLD_MANIFEST
    return old if old.is_file() and not (folder / MANIFEST).is_file() else folder / MANIFEST


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of `folder`, None when it has none. FolderError when it is damaged."""
    path = manifest_path(folder)
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
        if path.name == OLD_MANIFEST and "files" in content:  # of a run's checkpoint: it says nothing of tensors
            return None
        if all(isinstance(entry["digest"], str) for entry in content["tensors"].values()):
            return content
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FolderError(f"{path} is damaged ({type(error).__name__}: {error}); remove it to do without") from error
    raise FolderError(f"{path} is damaged; remove it to do without")


def check_digests(folder: Path, digests: Mapping[str, str]) -> None:
    """FolderError when tensors of the checkpoint in `folder` are not what its manifest, if it has one, says."""
    manifest = manifest_path(folder).name
    for name, entry in (read_manifest(folder) or {"tensors": {}})["tensors"].items():
        if name in digests and digests[name] != entry["digest"]:
            raise FolderError(
                f"{folder}: {name} is not what {manifest} says, so it was damaged or changed since it was written; "
                f"copy the checkpoint again, or remove {manifest} if the change was meant"
            )


def recorded_layout(folder: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> HfLayout | None:
    """The layout of the files that the checkpoint in `folder` was made from, when its manifest has it.

    FolderError when that layout does not hold exactly the tensors of `shapes` in type `dtype`.
    """
    content = read_manifest(folder)
    if content is None or "hf_files" not in content:
        return None
    try:
        layout = HfLayout.recorded(content["hf_files"], content["hf_index"])
        fits = layout.shapes() == dict(shapes) and layout.dtypes() == {dtype} and layout.is_sound()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FolderError(f"{manifest_path(folder)} is damaged ({type(error).__name__}: {error}); remove it") from error
    if not fits:
        raise FolderError(f"{manifest_path(folder)}: its hf_files are not those of this checkpoint; remove it")
    return layout
