"""Writes docs/settings.md, the table of all settings, from the facts that the schema declares, and that of verl's keys.

Imports no torch.

python -m remax_megatron.config.docs [FILE]       default: docs/settings.md of the repository
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from remax_megatron.config.schema import SETTINGS, Config
from remax_megatron.config.setting import Setting, type_words, value_of
from remax_megatron.config.verl import TABLE

PAGE = Path(__file__).resolve().parents[2] / "docs" / "settings.md"
HEAD = """\
# All settings

<!-- Written by `python -m remax_megatron.config.docs` from remax_megatron/config/schema.py. Do not edit. -->

A setting is written `key=value` on the command line, or in a preset (YAML, see `conf/`). The columns:

- **default**: the value that it has in no preset. `--cfg job` prints what a preset makes of it.
- **legal**: its type, and the values or numbers that are allowed; in a path a leading `~` is expanded. Rules between
  settings are checked before a run starts, and `python -m remax_megatron.config.cli --config-name NAME key=value ...`
  checks them without a run.
- **on resume**: whether the value `may change` when a run is resumed from a checkpoint, or `must match` the value that
  the run was started with, because it says what is computed.

Keys of verl that are not among them are at the end, under [Coming from verl](#coming-from-verl).
"""
VERL = """\
## Coming from verl

Settings have verl's names, and these are verl's keys that are not here: one is read as another, has no effect, or is
refused. The first two say so in a note when the run starts; a key ending in `.*` stands for all below it.

Some settings of the same name mean something else: `lr_warmup_steps` and `lr_decay_steps` of an optimizer count
optimizer steps, not batches; `trainer.critic_warmup` counts the steps in which only the critic learns, of which verl
has one fewer; `trainer.logger` leaves `file` out, because `metrics.jsonl` is always written; and
`actor_rollout_ref.actor.use_dynamic_bsz` is on unless it is set to False.
"""


def page() -> str:
    """The text of docs/settings.md."""
    groups: dict[str, list[Setting]] = {}
    for setting in SETTINGS.values():
        groups.setdefault(setting.key.rpartition(".")[0], []).append(setting)
    return "\n".join([HEAD, *(_section(name, settings) for name, settings in groups.items()), VERL, _verl_table()])


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page."""
    arguments = sys.argv[1:] if argv is None else argv
    file = Path(arguments[0]) if arguments else PAGE
    file.write_text(page(), encoding="utf-8")
    print(f"{file}: {len(SETTINGS)} settings")
    return 0


def _section(name: str, settings: list[Setting]) -> str:
    about = " ".join((type(value_of(Config(), name)).__doc__ or "").split())
    head = _row(["setting", "default", "what it does", "legal", "on resume"])
    rows = [_row([f"`{_name(s)}`", _default(s), s.help, _legal(s), s.on_resume or ""]) for s in settings]
    return "\n".join([f"## `{name}`", "", about, "", head, _row(["---"] * 5), *rows, ""])


def _verl_table() -> str:
    rows = [_row([", ".join(f"`{key}`" for key in keys), fate.words]) for keys, fate in TABLE.items()]
    return "\n".join([_row(["verl's key", "here"]), _row(["---"] * 2), *rows, ""])


def _name(setting: Setting) -> str:
    return setting.key.rpartition(".")[2]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _default(setting: Setting) -> str:
    return f"has to be set: {setting.example}" if setting.example else f"`{_yaml(setting.default)}`"


def _legal(setting: Setting) -> str:
    if setting.alias_of:
        return f"stands for `{setting.alias_of}`"
    if setting.choices is not None:
        legal = ", ".join(f"`{_yaml(choice)}`" for choice in setting.choices)
    else:
        legal = type_words(setting.kind)
    if setting.path:
        legal = legal.replace("a text", "a path").replace("a value or a list", "a path or a list of paths")
    return legal if setting.limits is None else f"{legal}: {setting.limits.words}"


def _yaml(value: Any) -> str:
    """A value as a user writes it on the command line."""
    if isinstance(value, list):
        return f"[{','.join(map(_yaml, value))}]"
    return "null" if value is None else str(value)


if __name__ == "__main__":
    sys.exit(main())
