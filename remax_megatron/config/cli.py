"""The command line of the trainer: what it takes, what it says, and how a wrong setting ends. Imports no torch.

    python -m remax_megatron.config.cli [--config-name NAME] [--config-dir DIR] [--cfg job] [--data] [key=value ...]

checks settings without starting anything (on a login node, say): it assumes as many ranks as the settings ask for. With
--data it then reads the data and the reward as well, by `python -m remax_megatron.preflight`.
The trainer's own entry, `python -m remax_megatron`, takes the same arguments and calls `parse`, then
`load_and_validate`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from remax_megatron.config.load import list_presets, load_config, presets_dir, to_yaml
from remax_megatron.config.model_path import resolve_model_facts
from remax_megatron.config.rules import validate, validate_files
from remax_megatron.config.schema import Config, ConfigError
from remax_megatron.errors import UserError
from remax_megatron.model_facts import ModelFacts

EXIT_BAD_SETTINGS = 2
OTHER_RANKS_WAIT_S = 5.0

HELP = """\
Train a Qwen2.5 or Qwen3 model with ReMax: Megatron-Core policy, vLLM rollouts, in the same ranks.

usage:
  torchrun --nproc-per-node RANKS -m remax_megatron [--config-name NAME] [--config-dir DIR] [key=value ...]
  python -m remax_megatron [--config-name NAME] --cfg job [key=value ...]     print the resolved settings, run nothing
  python -m remax_megatron.config.cli [--config-name NAME] [key=value ...]    check the settings, run nothing
  python -m remax_megatron.config.cli --data [--config-name NAME] [key=value ...]      and every row of the data
  python -m remax_megatron.doctor [--config-name NAME] [key=value ...]        check the machine, too; see its docstring
  python -m remax_megatron.plan [--config-name NAME] [key=value ...]          memory and time of a step, modelled

RANKS is trainer.n_gpus_per_node of the preset; with several nodes add torchrun's --nnodes and --rdzv-endpoint.

presets (--config-name, default demo), from {folder}:
{presets}

settings that are often changed (all of them: docs/settings.md; their values: --cfg job):
  actor_rollout_ref.model.path=FOLDER_OR_HUB_ID      the model to train (Hugging Face, or converted to Megatron)
  data.train_files=FILE data.val_files=FILE          parquet, JSON or JSONL; a list is written [FILE,FILE]
  data.train_batch_size=512                          prompts per rollout batch
  actor_rollout_ref.rollout.n=4                      sampled answers per prompt
  actor_rollout_ref.actor.optim.lr=5e-7              learning rate
  actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16000    token budget of a micro-batch
  actor_rollout_ref.actor.megatron.tensor_model_parallel_size=2
  actor_rollout_ref.rollout.tensor_model_parallel_size=2
  trainer.nnodes=4 trainer.n_gpus_per_node=8         ranks: the product of the two
  trainer.logger=[console,wandb]                     of console, wandb, tensorboard
  trainer.default_local_dir=DIR                      metrics.jsonl, config.yaml and the trained model

example:
  torchrun --nproc-per-node 8 -m remax_megatron --config-name qwen2_5_7b data.train_batch_size=512
"""


@dataclass(frozen=True)
class CliRequest:
    """What the user asked for; `print_config` is `--cfg job`, `check_data` is `--data`."""

    config_name: str
    config_dir: Path | None
    overrides: tuple[str, ...]
    print_config: bool = False
    check_data: bool = False


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; --help shows the usage")


def parse(argv: Sequence[str]) -> CliRequest:
    """The request in `argv`. `--help` prints and exits 0, a wrong option prints one `error:` line and exits 2."""
    parser = _Parser(prog="python -m remax_megatron", add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("-cn", "--config-name", default="demo")
    parser.add_argument("-cd", "--config-dir", type=Path)
    parser.add_argument("-c", "--cfg", choices=["job"])
    parser.add_argument("--data", action="store_true")
    parser.add_argument("overrides", nargs="*")
    with reported_errors():
        options = parser.parse_intermixed_args(argv)
    if options.help:
        print(help_text(options.config_dir))
        raise SystemExit(0)
    overrides = tuple(options.overrides)
    return CliRequest(options.config_name, options.config_dir, overrides, options.cfg == "job", options.data)


def load_and_validate(request: CliRequest, world_size: int | None) -> tuple[Config, ModelFacts, list[str]]:
    """Settings, model facts and notes of `request`, all rules checked.

    `world_size` is the number of ranks that were started; None takes as many as the settings ask for.
    With `--cfg job` it prints the resolved settings and exits 0 instead. Wrong settings print one `error:` line on
    standard error and exit 2.
    """
    with reported_errors():
        loaded = load_config(request.config_name, request.overrides, request.config_dir)
        config = loaded.config
        if request.print_config:
            print(to_yaml(config), end="")
            raise SystemExit(0)
        if world_size is None:
            world_size = config.trainer.nnodes * config.trainer.n_gpus_per_node
        validate(config, world_size, None)  # what needs no model comes first: facts may take a download
        validate_files(config)
        facts = resolve_model_facts(config.actor_rollout_ref.model.path, config.trainer.prepare_command)
        return config, facts, loaded.notes + validate(config, world_size, facts)


@contextmanager
def reported_errors() -> Iterator[None]:
    """Turn a UserError into one `error:` line on standard error and exit code 2.

    Under a launcher all ranks find the same error. The first rank of each node prints it at once; the others leave it
    the time to do so, after which the launcher has ended them, unless the error was theirs alone.
    """
    try:
        yield
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(OTHER_RANKS_WAIT_S)
        print(error.lines(), file=sys.stderr, flush=True)
        raise SystemExit(EXIT_BAD_SETTINGS) from None


def help_text(config_dir: Path | None = None) -> str:
    """Return what --help prints, with the presets of `config_dir` or the shipped ones."""
    presets = list_presets(config_dir)
    width = max(map(len, presets), default=0)
    lines = "\n".join(f"  {name:{width}}  {description}" for name, description in presets.items())
    return HELP.format(folder=config_dir or presets_dir(), presets=lines or "  none")


def main(argv: Sequence[str] | None = None) -> int:
    """Check the settings and say what they come to."""
    argv = sys.argv[1:] if argv is None else argv
    request = parse(argv)
    if request.check_data:
        return subprocess.call([sys.executable, "-m", "remax_megatron.preflight", *argv])
    config, facts, notes = load_and_validate(request, None)
    for note in notes:
        print("note:", note)
    ranks = config.trainer.nnodes * config.trainer.n_gpus_per_node
    print(f"the settings are valid: {config.actor_rollout_ref.model.path}, {facts.num_layers} layers, {ranks} ranks")
    return 0


if __name__ == "__main__":
    sys.exit(main())
