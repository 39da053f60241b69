"""What a rank has learned of the shapes that operators give, for the ranks after it: half of a small rank's time.

FakeTensorMode keeps the result's shape of every operator and arguments that it has seen. A process that ends can hand
that to its parent, whose later children then know it.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode, _DispatchCacheKey


def known() -> set:
    return set(FakeTensorMode.cache)


def pack(before: set) -> bytes:
    """All that is known now and was not `before`."""
    new = [(key.key, entry) for key, entry in FakeTensorMode.cache.items() if key not in before]
    file = io.BytesIO()
    _Pickler(file).dump(new)
    return file.getvalue()


def unpack(packed: bytes) -> None:
    """Know it in this process, too."""
    for key, entry in _Unpickler(io.BytesIO(packed)).load():
        FakeTensorMode.cache[_DispatchCacheKey(key)] = entry


class _Pickler(pickle.Pickler):
    """Operators by their names."""

    def persistent_id(self, thing: Any) -> tuple[str, str] | None:
        return (thing._schema.name, thing._overloadname) if isinstance(thing, OpOverload) else None


class _Unpickler(pickle.Unpickler):
    def persistent_load(self, names: tuple[str, str]) -> OpOverload:
        namespace, name = names[0].split("::")
        return getattr(getattr(getattr(torch.ops, namespace), name), names[1])
