"""Tests, in folders as the package has them; `run/` holds the modules beside the folders and whole runs."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
