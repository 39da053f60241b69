"""The command: what fits and what does not, the shipped presets, the search for settings, time limits, no torch."""

from __future__ import annotations

import copy
import functools
import re
import subprocess
import sys
import time

import pytest

from remax_megatron.config.load import load_config
from remax_megatron.config.rules import validate
from remax_megatron.config.schema import Config
from remax_megatron.config.setting import set_value
from remax_megatron.plan import __main__ as command
from remax_megatron.plan.gpus import GPUS
from remax_megatron.plan.ledger import OF_THE_ENGINE
from remax_megatron.plan.lengths import NAMED
from remax_megatron.plan.memory import Machine, is_valid, largest_budget, memory
from remax_megatron.plan.models import sizes_of
from remax_megatron.plan.parts import Efficiencies
from remax_megatron.plan.step_time import step_time
from remax_megatron.plan.suggest import Search, fewest_devices, on_devices
from tests import ROOT

H100 = Machine(GPUS["h100-80gb"])
ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
MEGATRON, TOKENS = f"{ACTOR}.megatron", f"{ACTOR}.ppo_max_token_len_per_gpu"
TP, ROLLOUT_TP = f"{MEGATRON}.tensor_model_parallel_size", f"{ROLLOUT}.tensor_model_parallel_size"
RECOMPUTE = f"{MEGATRON}.override_transformer_config.recompute_granularity"
SHARE = f"{ROLLOUT}.gpu_memory_utilization"
PRESETS = sorted(path.stem for path in (ROOT / "conf").glob("qwen*.yaml"))


def ranks(config: Config) -> int:
    return config.trainer.nnodes * config.trainer.n_gpus_per_node


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = command.main(arguments)
    return code, capsys.readouterr().out


# -- what fits ---------------------------------------------------------------------------------------------------------

# preset, settings, phase, the change that fits
IMPOSSIBLE = [
    ("qwen2_5_32b", [f"{TP}=2", f"{RECOMPUTE}=full"], "optimizer", f"{TP}=8"),
    ("qwen2_5_7b", [f"{RECOMPUTE}=none", f"{TOKENS}=64000"], "update", f"{RECOMPUTE}=full"),
    ("qwen2_5_14b", [f"{SHARE}=0.6"], "sync", f"{SHARE}=0.3"),
    ("qwen2_5_32b", [f"{ROLLOUT_TP}=1"], "engine", f"{ROLLOUT_TP}=2"),
    ("qwen2_5_7b", [f"{TP}=1", f"{ROLLOUT_TP}=1", f"{RECOMPUTE}=full", "trainer.n_gpus_per_node=1"], "sync", ""),
]


@pytest.mark.parametrize("preset, overrides, phase, change", IMPOSSIBLE)
def test_what_is_impossible_is_refused(capsys, preset, overrides, phase, change):
    """By phase, rank and bytes, with the nearest setting that fits, which then does."""
    code, screen = said(capsys, "--config-name", preset, *overrides)
    assert code == 1
    (line,) = re.findall(r"does NOT fit: (.*)", screen)
    assert re.fullmatch(rf"{phase}, rank \d+: [\d.]+ [GM]B more than .*", line), line
    found = re.findall(r"nearest setting that fits: (.*)", screen)
    if not change:
        assert not found and "no setting of this model fits these devices" in screen
        return
    assert found[0].startswith(change), found
    key = found[0].partition("=")[0]
    kept = [text for text in overrides if not text.startswith(f"{key}=")]
    assert said(capsys, "--config-name", preset, *kept, found[0])[0] == 0


@pytest.mark.parametrize("preset", ["qwen2_5_3b", "qwen2_5_7b", "qwen2_5_14b", "qwen3_8b", "qwen3_32b"])
def test_what_is_tight_passes(preset):
    """The largest token budget without recompute fits, and one step more does not."""
    config = load_config(preset, [f"{RECOMPUTE}=none"]).config
    facts, world_size = sizes_of(config.actor_rollout_ref.model.path), ranks(config)
    budget = largest_budget(config, facts, world_size, H100)
    assert budget is not None
    set_value(config, TOKENS, budget)
    made = memory(config, facts, world_size, H100)
    assert made.fits and made.headroom < 2e9
    set_value(config, TOKENS, budget + config.actor_rollout_ref.actor.megatron.tensor_model_parallel_size)
    assert not memory(config, facts, world_size, H100).fits


def test_fewest_devices():
    """A 7B has 16 bytes per parameter that DP does not share, less 12 / DP: two GPUs of 80 GB hold it, one does not."""
    config = load_config("qwen2_5_7b").config
    facts = sizes_of(config.actor_rollout_ref.model.path)
    assert fewest_devices(config, facts, H100) == 2
    assert fewest_devices(config, facts, Machine(GPUS["h200-141gb"])) in (1, 2)


def test_measured_memory_counts():
    """What a run took beside the count, and what the engine kept asleep, leave less."""
    config = load_config("qwen2_5_7b").config
    facts = sizes_of(config.actor_rollout_ref.model.path)
    plain, more = (memory(config, facts, 8, machine) for machine in (H100, Machine(H100.gpu, beside={"sync": 10**9})))
    assert more.made.peak("sync") == plain.made.peak("sync") + 10**9
    assert Machine(H100.gpu, asleep=20 * 10**9).limit == 60 * 10**9


# -- presets -----------------------------------------------------------------------------------------------------------


@functools.cache
def planned(preset: str):
    config = load_config(preset).config
    facts = sizes_of(config.actor_rollout_ref.model.path)
    made = memory(config, facts, ranks(config), H100)
    seconds = step_time(config, facts, ranks(config), H100.gpu, NAMED["gsm8k"]).seconds(Efficiencies())
    return config, facts, made, seconds


@pytest.mark.parametrize("preset", [name for name in PRESETS if not name.startswith("_")])
def test_a_preset_fits_and_says_its_headroom(preset):
    """On its cards of 80 GB; the comment of the preset has the headroom."""
    _, _, made, _ = planned(preset)
    assert made.fits
    text = (ROOT / "conf" / f"{preset}.yaml").read_text()
    assert f"{made.phase} leaves {made.headroom / 1e9:.1f} GB" in " ".join(text.replace("#", "").split())


@pytest.mark.parametrize("preset", ["qwen2_5_7b", "qwen2_5_32b"])
def test_the_best_suggestion_is_no_slower_than_the_preset(preset):
    config, facts, _, seconds = planned(preset)
    found = Search(config, facts, ranks(config), H100, NAMED["gsm8k"]).best()
    assert 1 <= len(found) <= 5 and found == sorted(found, key=lambda one: one.seconds)
    assert found[0].seconds <= seconds * 1.001
    for one in found:
        changed = on_devices(config, ranks(config))
        for key, value in one.changes.items():
            set_value(changed, key, value)
        validate(changed, ranks(config), facts)
        made = memory(changed, facts, ranks(config), H100)
        assert made.fits and made.headroom == one.headroom
        again = step_time(changed, facts, ranks(config), H100.gpu, NAMED["gsm8k"]).seconds(Efficiencies())
        assert again == pytest.approx(one.seconds)


# -- the command -------------------------------------------------------------------------------------------------------

NO_TORCH = (
    "import sys\nfrom remax_megatron.plan.__main__ import main\ncode = main(sys.argv[1:])\n"
    "assert not {'torch', 'vllm', 'megatron', 'transformers'} & sys.modules.keys()\nsys.exit(code)"
)


@pytest.mark.parametrize("more, limit_s", [((), 2.0), (("--suggest", "64"), 30.0)])
def test_it_answers_soon_and_without_torch(more, limit_s):
    """In seconds of CPU, which a busy machine does not stretch."""
    command_line = [sys.executable, "-c", NO_TORCH, "--config-name", "qwen2_5_32b", *more]
    before = time.process_time(), _children_s()
    done = subprocess.run(command_line, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert _children_s() - before[1] < limit_s
    assert "counted and modelled, not measured on a GPU" in done.stdout


def _children_s() -> float:
    import resource

    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_the_screen(capsys):
    code, screen = said(capsys, "--config-name", "qwen2_5_7b", "--gpu", "h200-141gb", "--lengths", "math")
    assert code == 0
    for text in (
        *("8 x h200-141gb, TP 2, PP 1, DP 4, engine TP 2", "memory of rank 0 (pipeline stage 0)", "in all"),
        *("the engine's share: weights 7.6 GB", "largest token budget that fits:", "time of a step, math:"),
        *("bound by reading the weights", "trained tokens/s per device", "host memory of offloads 0.0 MB per node"),
    ):
        assert text in screen, text


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--gpu", "h1000"), "--gpu=h1000 is not known"),
        (("--lengths", "short"), "--lengths=short is neither a file nor one of gsm8k, math, long"),
        (("--calibrate", "nowhere.jsonl"), "--calibrate=nowhere.jsonl cannot be read"),
        (("--suggest", "-1"), "--suggest=-1 is no number of devices"),
        ((f"{TP}=3",), "does not divide"),
        (("--sugest", "8"), "unrecognized arguments"),
    ],
)
def test_what_is_refused(capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        command.main(["--config-name", "qwen2_5_7b", *arguments])
    assert ended.value.code == 2 and message in capsys.readouterr().err


# -- the engine on ranks of its own ----------------------------------------------------------------------------------


def test_each_side_of_a_split_run_holds_its_own():
    config, facts, made, _ = planned("qwen2_5_32b_split")
    phases = made.made.phases
    both = ["sync", "canary", "rollout"]
    assert list(phases) == ["update", "optimizer", *both, *(f"engine's {name}" for name in both)]
    for name, terms in phases.items():
        assert ("engine" in terms) != ("weights" in terms) and ("engine" in terms) == name.startswith(OF_THE_ENGINE)
    alone = load_config("qwen2_5_32b").config  # colocated on as many ranks as train here
    for key in ("grad_offload", "optimizer_offload"):
        set_value(alone, f"{MEGATRON}.{key}", False)
    budget = config.actor_rollout_ref.actor.ppo_max_token_len_per_gpu
    set_value(alone, TOKENS, budget)
    assert memory(alone, facts, 16, H100).made.phases["update"] == phases["update"]


def test_a_step_ahead_is_the_longer_side_and_the_sync():
    config, facts, _, seconds = planned("qwen2_5_32b_split")
    made = step_time(config, facts, ranks(config), H100.gpu, NAMED["gsm8k"])
    of = {name: phase.seconds(Efficiencies()) for name, phase in made.phases.items()}
    assert "offload" not in of and not any("sleeping" in part.name for part in made.phases["rollout"].parts)
    assert seconds == pytest.approx(max(of["rollout"] + of["reward"], of["update"]) + of["sync"])
    config = copy.deepcopy(config)
    config.actor_rollout_ref.rollout.ahead = 0
    made = step_time(config, facts, ranks(config), H100.gpu, NAMED["gsm8k"])
    assert made.seconds(Efficiencies()) == pytest.approx(sum(of.values()))


def test_what_is_suggested_for_a_split_run_is_legal_and_fits():
    config, facts, _, _ = planned("qwen2_5_32b_split")
    found = Search(config, facts, 32, H100, NAMED["gsm8k"]).best(2)
    assert len(found) == 2
    for one in found:
        changed = on_devices(config, 32)
        for key, value in one.changes.items():
            set_value(changed, key, value)
        assert memory(changed, facts, 32, H100).fits and is_valid(changed, facts, 32)
