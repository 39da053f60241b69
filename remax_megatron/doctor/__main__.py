"""Whether a run can start here, before it costs days: one screen of findings, and an exit code.

    python -m remax_megatron.doctor [--config-name NAME] [--config-dir DIR] [key=value ...]           one machine
    torchrun --nnodes 2 ... -m remax_megatron.doctor --config-name qwen2_5_14b [key=value ...]        and between ranks

It takes the trainer's own settings. The first rank of each node looks at the machine; under a launcher the ranks
then meet at MASTER_ADDR:MASTER_PORT, reach each other as the trainer's will, and look whether they see one folder.
Rank 0 prints; what all nodes found alike stands once, the rest with its rank and host.

Exit code: 0 without a problem (warnings allowed), 1 with one, 2 for settings that the trainer refuses (as it does).
torchrun itself ends with 1 for both, and its own report of failed workers follows the screen.

It does not train, does not download, does not import vLLM, and leaves nothing behind.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from remax_megatron.config import cli
from remax_megatron.config.load import load_config
from remax_megatron.config.model_path import HUB_ID, resolve_model_facts
from remax_megatron.config.rules import validate, validate_files
from remax_megatron.config.schema import Config, expects_cpu
from remax_megatron.doctor import machine, reachability, stack
from remax_megatron.doctor.findings import OK, PROBLEM, SETTINGS, WARNING, Finding, show
from remax_megatron.environment import QUIET, check_attention
from remax_megatron.errors import UserError
from remax_megatron.model_facts import ModelFacts

QUIETER = QUIET | {"TORCH_CPP_LOG_LEVEL": "FATAL"}  # an unreachable store is a finding, not a C++ stack


def main(argv: Sequence[str] | None = None) -> int:
    """Look, print, and say how it is by the exit code."""
    request = cli.parse(sys.argv[1:] if argv is None else argv)
    with cli.reported_errors():
        loaded = load_config(request.config_name, request.overrides, request.config_dir)
        config, per_node = loaded.config, loaded.config.trainer.n_gpus_per_node
        world_size = int(os.environ.get("WORLD_SIZE", config.trainer.nnodes * per_node))
        notes = loaded.notes + validate(config, world_size, None)
    for name, value in QUIETER.items():
        os.environ.setdefault(name, value)
    launched, ranks_here = "WORLD_SIZE" in os.environ, int(os.environ.get("LOCAL_WORLD_SIZE", per_node))
    findings: list[Finding] = []
    facts = settings(config, world_size, notes, findings)
    run = machine.Run(config, facts, world_size, ranks_here, launched, expects_cpu(config))
    broken = list(stack.torch_loads())
    if os.environ.get("LOCAL_RANK", "0") == "0":
        findings += [*stack.versions(run.on_cpu), *stack.conflicts(), *broken, *stack.transformer_engine_loads()]
        findings += [finding for check in machine.CHECKS if not broken for finding in check(run)]  # they need torch
        findings += data(config, facts) if facts is not None and not broken else []
    else:
        findings = broken
    headline = f"remax_megatron.doctor: {request.config_name}, {world_size} ranks, {socket.gethostname()}"
    if launched and world_size > 1 and not broken:
        reachability.meet(run, findings, headline)  # ends the process
    if world_size > 1:
        start = f"torchrun ... --nproc-per-node {per_node} -m remax_megatron.doctor ..."
        findings.append(Finding("reachability", OK, f"not looked at without a launcher; this does: {start}"))
    return show({"": findings}, headline)


def settings(config: Config, world_size: int, notes: Sequence[str], findings: list[Finding]) -> ModelFacts | None:
    """Add what the rules say that need the model or the disk; those of the command line alone are checked before.

    No network: a hub model is looked for in the local cache. No facts where it is not there or a rule is broken.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    path, facts, what = config.actor_rollout_ref.model.path, None, "the rules of the model were not judged"
    folder, of_hub = Path(path), bool(HUB_ID.fullmatch(path)) and not Path(path).is_dir()
    if of_hub:
        with suppress(LocalEntryNotFoundError, HFValidationError):
            folder = Path(snapshot_download(path, local_files_only=True))
        if not any(folder.glob("*.safetensors")):
            fix = "nodes often have no network: run `hf download` for it where there is one, or set a local folder"
            findings.append(Finding("model", WARNING, f"{path} is not, or not whole, in the local hub cache", fix))
    try:
        check_attention(config)
        validate_files(config)
        if not of_hub or (folder / "config.json").is_file():
            facts = resolve_model_facts(path, config.trainer.prepare_command)
            validate(config, world_size, facts)
            what = f"{facts.num_layers} layers of {facts.hidden_size}"
    except UserError as error:
        fact, _, fix = " ".join(str(error).split()).rpartition("; ")
        findings.append(Finding(SETTINGS, PROBLEM, fact or fix, fix if fact else ""))
        return None
    findings.append(Finding(SETTINGS, OK, "; ".join([f"valid for {world_size} ranks and {path} ({what})", *notes])))
    return facts


def data(config: Config, facts: ModelFacts) -> list[Finding]:
    """What a run would read, looked at whole: the tokenizer, every row of the data, the reward. No network."""
    if not Path(config.actor_rollout_ref.model.path).expanduser().is_dir():
        return [Finding("data", WARNING, "not read: the model is not in a local folder", "`hf download` it first")]
    from remax_megatron.inputs import prepare_inputs, summary  # they need torch
    from remax_megatron.temporary import own_temporary_folder

    try:
        with own_temporary_folder():
            inputs = prepare_inputs(config, facts)
    except UserError as error:
        return [
            Finding("data", PROBLEM, str(error).replace("\n", ";"), "see docs/data_and_rewards.md for what a row needs")
        ]
    return [Finding("data", OK, "; ".join([*summary(config, inputs), *inputs.notes]))]


if __name__ == "__main__":
    sys.exit(main())
