"""One setting is one dataclass field, which carries all that is known about it: `setting()` declares it.

    lr: float = setting(1e-6, limits=POSITIVE, help="Learning rate of Adam, reached after the warmup.")
    trainer: Trainer = group(Trainer, on_resume=MAY_CHANGE)

The facts lie in the field's metadata, where OmegaConf leaves them alone. `settings_of` walks over a schema and returns
them by dotted key: the loader, the rules, the resume of a run and docs/settings.md all read them there.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

# What a resumed run may do with a setting: change it, since it says where, how fast or how long the run computes, or
# not, since it says what is computed.
MAY_CHANGE = "may change"
MUST_MATCH = "must match"

TYPE_NAMES = {
    int: "an integer",
    float: "a number",
    bool: "True or False",
    str: "a text",
    type(None): "null",
    Any: "a value or a list",
    dict[str, Any]: "a mapping {name: value}",
}


@dataclass(frozen=True)
class Limits:
    """Which numbers are legal, and the words that ask for them ("set it to ...")."""

    hold: Callable[[float], bool]
    words: str


POSITIVE = Limits(lambda number: 0 < number < math.inf, "greater than 0")
NOT_NEGATIVE = Limits(lambda number: 0 <= number < math.inf, "0 or greater")
POSITIVE_OR_NONE = Limits(lambda number: -1 <= number < math.inf, "a positive number, or -1 for none")
POSITIVE_OR_ALL = Limits(lambda number: number == -1 or 0 < number < math.inf, "a positive number, or -1 for all")
POSITIVE_OR_UNLIMITED = Limits(lambda number: -1 <= number < math.inf, "a positive number, or -1 or 0 for no limit")
SHARE = Limits(lambda number: 0 <= number <= 1, "between 0 and 1")
POSITIVE_SHARE = Limits(lambda number: 0 < number <= 1, "greater than 0 and at most 1")
BELOW_1 = Limits(lambda number: 0 <= number < 1, "at least 0 and below 1")
POSITIVE_BELOW_1 = Limits(lambda number: 0 < number < 1, "greater than 0 and below 1")
ABOVE_1 = Limits(lambda number: number > 1, "above 1")


@dataclass(frozen=True)
class Setting:
    """The facts of one setting. `setting` describes those that a field declares; `settings_of` adds the others."""

    help: str
    choices: tuple[Any, ...] | None
    limits: Limits | None
    why: str
    path: bool
    mapping: bool
    alias_of: str | None
    example: str | None
    on_resume: str | None
    key: str = ""  # dotted
    kind: Any = None  # the field's type
    default: Any = None  # OmegaConf's MISSING for a setting that has to be given

    @property
    def is_text(self) -> bool:
        """Whether its value, or each item of it, is a text."""
        return self.path or self.kind is str or str in typing.get_args(self.kind)


def setting(
    default: Any,
    *,
    help: str,
    choices: tuple[Any, ...] | None = None,
    limits: Limits | None = None,
    why: str = "",
    path: bool = False,
    mapping: bool = False,
    alias_of: str | None = None,
    example: str | None = None,
    on_resume: str | None = None,
) -> Any:
    """A dataclass field for one setting.

    default: its value; OmegaConf's MISSING, with an `example`, when the user has to give one.
    help: sentences on what it does, with its unit.
    choices: all legal values, None among them where null is one.
    limits: legal numbers; null is legal where the type allows it.
    why: the reason for `choices` or `limits`, for the message that refuses another value.
    path: a path or a list of paths, in which a leading ~ is expanded.
    mapping: the setting holds names and values of the user's own, to any depth; every key below it is legal.
    alias_of: the key that this one stands for; its value is moved there with a note.
    example: what a user may write for a setting that has no default.
    on_resume: MAY_CHANGE or MUST_MATCH; None takes the group's.
    """
    facts = Setting(help, choices, limits, why, path, mapping, alias_of, example, on_resume)
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata={"setting": facts})
    return dataclasses.field(default=default, metadata={"setting": facts})


def group(kind: type, *, on_resume: str | None = None) -> Any:
    """A dataclass field for a group of settings; `on_resume` is for those in it that say nothing themselves."""
    return dataclasses.field(default_factory=kind, metadata={"on_resume": on_resume})


def settings_of(schema: type) -> dict[str, Setting]:
    """Dotted key -> setting, for every setting of the dataclass `schema`, in the order of its fields.

    What neither a setting nor one of its groups says about resuming is MUST_MATCH.
    """
    return {found.key: found for found in _walk(schema(), "", MUST_MATCH)}


def value_of(config: Any, key: str) -> Any:
    """The value under the dotted `key`."""
    for name in key.split("."):
        config = getattr(config, name)
    return config


def set_value(config: Any, key: str, value: Any) -> None:
    """Give the setting `key` of `config` the `value`."""
    group, _, name = key.rpartition(".")
    setattr(value_of(config, group), name, value)


def type_words(kind: Any) -> str:
    """A setting's type for people: "an integer or null"."""
    if isinstance(kind, types.UnionType):
        return " or ".join(type_words(part) for part in typing.get_args(kind))
    return TYPE_NAMES[kind]


def _walk(defaults: Any, prefix: str, on_resume: str) -> Iterator[Setting]:
    kinds = typing.get_type_hints(type(defaults))
    for field in dataclasses.fields(defaults):
        key, default = f"{prefix}{field.name}", getattr(defaults, field.name)
        if dataclasses.is_dataclass(default):
            yield from _walk(default, f"{key}.", field.metadata["on_resume"] or on_resume)
        else:
            facts: Setting = field.metadata["setting"]
            kind = kinds[field.name]
            yield replace(facts, key=key, kind=kind, default=default, on_resume=facts.on_resume or on_resume)
