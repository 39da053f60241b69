"""What lies in the place of a model's file when a download or a clone went wrong."""

from __future__ import annotations

from pathlib import Path

LFS = b"version https://git-lfs"
PAGES = (b"<!doctype", b"<html", b"<?xml")
PICKLES = (b"PK\x03\x04", b"\x80\x02")  # what torch.save writes, new and old


def failed_download(path: str | Path) -> str | None:
    """What the file at `path` is instead of a model's file and what to do about it, for a message; None when it does
    not look like a failed download, or cannot be read."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            start = file.read(256)
    except OSError:
        return None
    folder = path.parent
    if not start:
        return "is empty; copy or download it again"
    if start.startswith(LFS):
        return f"is a Git LFS pointer and not the file itself; run `git lfs install && git lfs pull` in {folder}"
    if start.lstrip().lower().startswith(PAGES):
        return "is a web page (an error or a login page that was saved under its name); copy or download it again"
    if path.suffix == ".safetensors" and start.startswith(PICKLES):
        return "is a file of torch.save under another name; convert the weights to safetensors"
    return None
