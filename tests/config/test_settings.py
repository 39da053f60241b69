"""The facts of settings, the registration of rules, and the page of all settings."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from remax_megatron.config import docs, rules
from remax_megatron.config.rules.registry import MODEL_RULES, REMARKS, RULES
from remax_megatron.config.schema import SETTINGS, Config
from remax_megatron.config.setting import (
    ABOVE_1,
    BELOW_1,
    MAY_CHANGE,
    MUST_MATCH,
    NOT_NEGATIVE,
    POSITIVE,
    POSITIVE_BELOW_1,
    POSITIVE_OR_ALL,
    POSITIVE_OR_NONE,
    POSITIVE_OR_UNLIMITED,
    POSITIVE_SHARE,
    SHARE,
    group,
    set_value,
    setting,
    settings_of,
    type_words,
    value_of,
)

PACKAGE = Path(rules.__file__).parents[2]


@dataclass
class Inner:
    """A group."""

    size: int = setting(2, limits=POSITIVE, help="A size.")
    name: str | None = setting(None, choices=(None, "a"), help="A name.", on_resume=MUST_MATCH)


@dataclass
class Outer:
    """A schema."""

    inner: Inner = group(Inner, on_resume=MAY_CHANGE)
    files: list[str] = setting(["x"], path=True, help="Files.")


def test_facts_are_found_by_key_and_a_group_speaks_for_its_settings():
    found = settings_of(Outer)
    assert list(found) == ["inner.size", "inner.name", "files"]
    size, name, files = found.values()
    assert (size.key, size.kind, size.default, size.limits) == ("inner.size", int, 2, POSITIVE)
    assert [s.on_resume for s in (size, name, files)] == [MAY_CHANGE, MUST_MATCH, MUST_MATCH]
    assert name.choices == (None, "a") and type_words(name.kind) == "a text or null"
    assert Outer().files == ["x"] and Outer().files is not Outer().files
    changed = Outer()
    set_value(changed, "inner.size", 5)
    assert value_of(changed, "inner.size") == 5 and value_of(Outer(), "inner.size") == 2


def test_omegaconf_reads_a_schema_whose_fields_carry_facts():
    merged = OmegaConf.merge(OmegaConf.structured(Outer), {"inner": {"size": "7"}})
    assert OmegaConf.to_object(merged) == Outer(inner=Inner(size=7))


@pytest.mark.parametrize(
    ("limits", "legal", "illegal"),
    [
        (POSITIVE, [1e-9, 5], [0, -1]),
        (NOT_NEGATIVE, [0, 5], [-1e-9]),
        (POSITIVE_OR_NONE, [-1, 0, 5], [-2]),
        (POSITIVE_OR_UNLIMITED, [-1, 0, 5], [-2]),
        (POSITIVE_OR_ALL, [-1, 5], [-2, 0]),
        (SHARE, [0, 0.5, 1], [-0.1, 1.1]),
        (POSITIVE_SHARE, [0.5, 1], [0, 1.1]),
        (BELOW_1, [0, 0.5], [-0.1, 1]),
        (POSITIVE_BELOW_1, [0.5], [0, 1]),
        (ABOVE_1, [1.1, float("inf")], [1]),
    ],
)
def test_limits(limits, legal, illegal):
    assert [limits.hold(number) for number in legal] == [True] * len(legal)
    assert [limits.hold(number) for number in [*illegal, float("nan")]] == [False] * (len(illegal) + 1)


def test_every_setting_is_described_and_its_default_is_legal():
    for key, facts in SETTINGS.items():
        assert facts.help[0].isupper() and facts.help.endswith("."), key
        assert facts.choices is None or facts.default in facts.choices, key
        assert facts.limits is None or facts.default is None or facts.limits.hold(facts.default), key
        assert facts.alias_of is None or SETTINGS[facts.alias_of].kind is bool, key
        assert (facts.example is not None) == (facts.default == "???"), key


def test_a_resumed_run_may_change_how_it_is_computed_and_not_what():
    def on_resume(key: str) -> str | None:
        return SETTINGS[key].on_resume

    megatron = "actor_rollout_ref.actor.megatron"
    changing = ("trainer.total_epochs", "data.train_files", "critic.ppo_max_token_len_per_gpu")
    for key in (*changing, f"{megatron}.tensor_model_parallel_size", "critic.megatron.param_offload"):
        assert on_resume(key) == MAY_CHANGE
    matching = ("trainer.seed", "trainer.critic_warmup", "data.train_batch_size", "algorithm.kl_ctrl.horizon")
    for key in (*matching, f"{megatron}.dtype", "critic.optim.lr", "critic.model.path"):
        assert on_resume(key) == MUST_MATCH


def test_no_rule_is_written_without_being_registered():
    registered = {*RULES, *MODEL_RULES, *REMARKS}
    assert len(registered) == len(RULES) + len(MODEL_RULES) + len(REMARKS)
    subjects = [found.name for found in pkgutil.iter_modules(rules.__path__) if found.name != "registry"]
    written = set()
    for subject in subjects:
        module = importlib.import_module(f"{rules.__name__}.{subject}")
        for name, function in inspect.getmembers(module, inspect.isfunction):
            takes_setup = "Setup" in inspect.get_annotations(function).values()
            if takes_setup and not name.startswith("_") and function.__module__ == module.__name__:
                written.add(function)
    assert written == registered


def test_the_page_of_all_settings_is_current():
    assert docs.PAGE.read_text(encoding="utf-8") == docs.page(), "run python -m remax_megatron.config.docs"
    assert all(f"| `{key.rpartition('.')[2]}` |" in docs.page() for key in SETTINGS)


def test_the_algorithm_knows_no_settings():
    """algorithm/ gets numbers and names: it imports no config and names no key, and its callers hold the settings."""
    for file in (PACKAGE / "algorithm").rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert "remax_megatron.config" not in text, file
        assert not [key for key in SETTINGS if key in text], file


def test_defaults_make_a_config():
    assert OmegaConf.to_container(OmegaConf.structured(Config), resolve=False)["trainer"]["logger"] == ["console"]
