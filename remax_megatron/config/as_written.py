"""Settings whose type is text keep the text that the user wrote, where YAML or Hydra would read something else in it.

    trainer.experiment_name=2024_10_01       the text, not the number 20241001
    trainer: {experiment_name: 12:30}        the text, not the number 750

`parse_override` does it for the command line, `compose_preset` for presets. null stays null; quotes are not needed, and
do no harm.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import initialize
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.override_parser.overrides_parser import CommonTokenStream, InputStream, create_functions
from hydra.core.override_parser.overrides_visitor import HydraErrorListener, HydraOverrideVisitor
from hydra.core.override_parser.types import Override, QuotedString
from hydra.core.plugins import Plugins
from hydra.grammar.gen.OverrideLexer import OverrideLexer
from hydra.grammar.gen.OverrideParser import OverrideParser
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf._utils import get_yaml_loader

from remax_megatron.config.schema import SETTINGS

HYDRA_VERSION = "1.3"

# How YAML may have read what is a text.
_READ_INTO_TEXT = tuple(f"tag:yaml.org,2002:{name}" for name in ("int", "float", "bool"))


def keeps_text(key: str) -> bool:
    """Whether what is written for `key`, or for one item of it, is a text."""
    return key in SETTINGS and SETTINGS[key].is_text


# The command line ----------------------------------------------------------------------------------------------------


def parse_override(text: str) -> Override:
    """Hydra's reading of the override `text`; `value_as_written` gives its value. HydraException when it has none."""
    lexer = OverrideLexer(InputStream(text))
    lexer.removeErrorListeners()
    lexer.addErrorListener(HydraErrorListener())
    parser = OverrideParser(CommonTokenStream(lexer))
    parser.removeErrorListeners()
    parser.addErrorListener(HydraErrorListener())
    override = _Visitor(create_functions()).visit(parser.override())
    assert isinstance(override, Override)
    override.input_line = text
    override.validate()
    return override


def value_as_written(override: Override) -> Any:
    """The value of an override from `parse_override`, with texts where a setting is one."""
    return _resolved(override.key_or_group, override.value())


@dataclass(frozen=True)
class _Scalar:
    """A number, truth value or null, and how it was written."""

    value: int | float | bool | None
    text: str


class _Visitor(HydraOverrideVisitor):
    """Hydra's reading of overrides, in which what is no text remembers how it was written, outside of functions."""

    _functions_around = 0

    def visitFunction(self, ctx: Any) -> Any:
        self._functions_around += 1
        try:
            return super().visitFunction(ctx)
        finally:
            self._functions_around -= 1

    def visitPrimitive(self, ctx: Any) -> Any:
        value = super().visitPrimitive(ctx)
        if self._functions_around or isinstance(value, (str, QuotedString)):
            return value
        return _Scalar(value, ctx.getText().strip())


def _resolved(key: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _resolved(f"{key}.{name}", part) for name, part in value.items()}
    if isinstance(value, list):
        return [_resolved(key, part) for part in value]
    if isinstance(value, _Scalar):
        return value.text if value.value is not None and keeps_text(key) else value.value
    return value


# Presets -------------------------------------------------------------------------------------------------------------


class PresetSource(FileConfigSource):
    """A folder of presets for Hydra, `preset://FOLDER`."""

    @staticmethod
    def scheme() -> str:
        """Name this kind of folder, for the search path."""
        return "preset"

    def load_config(self, config_path: str) -> ConfigResult:
        """Read a file below the folder. yaml.YAMLError when it is not YAML."""
        file = Path(self.path, self._normalize_file_name(config_path))
        text = file.read_text(encoding="utf-8")
        header = ConfigSource._get_header_dict(text[:512])
        package = header["package"] or "_group_"
        package = package.replace("_group_", str(Path(config_path).parent).replace("/", ".").strip("."))
        content = _read_yaml(text, str(file), package.removeprefix("_global_").strip("."))
        return ConfigResult(
            config=OmegaConf.create(content or {}), path=f"preset://{self.path}", provider=self.provider, header=header
        )


def compose_preset(name: str, folders: Sequence[Path]) -> DictConfig:
    """The preset `name` with its defaults list, looked for in `folders` in their order.

    HydraException, OmegaConfBaseException or yaml.YAMLError when it cannot be read.
    """
    Plugins.instance().register(PresetSource)
    # What hydra.compose does, which takes no folders but plain ones.
    search = ConfigSearchPathImpl()
    search.append("hydra", "pkg://hydra.conf")
    for folder in folders:
        search.append("main", f"preset://{folder}")
    search.append("schema", "structured://")
    with initialize(config_path=None, version_base=HYDRA_VERSION):
        composed = ConfigLoaderImpl(search).load_configuration(name, [], RunMode.RUN, from_shell=False)
    with open_dict(composed):
        del composed["hydra"]
    return composed


def _read_yaml(text: str, name: str, package: str) -> Any:
    """The document `text`, of the file `name`, whose keys lie below the `package`."""
    loader = get_yaml_loader()(text)
    loader.name = name  # for the errors
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        for scalar in _text_scalars(node, package):
            scalar.tag = "tag:yaml.org,2002:str"
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _text_scalars(node: yaml.Node, key: str) -> Iterator[yaml.ScalarNode]:
    """The scalars of `node`, the value of `key`, that were written for a text and read as something else."""
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            merged = name.tag == "tag:yaml.org,2002:merge"
            yield from _text_scalars(value, key if merged else f"{key}.{name.value}".lstrip("."))
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _text_scalars(item, key)
    elif isinstance(node, yaml.ScalarNode) and node.tag in _READ_INTO_TEXT and keeps_text(key):
        yield node
