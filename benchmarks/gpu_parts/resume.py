"""A checkpoint saved and resumed on the device: the updates after it have the losses of the run that went on."""

from __future__ import annotations

from pathlib import Path

from gpu_parts.parity import SHAPE, STD, make_rows
from gpu_parts.part import Numbers, Part
from remax_megatron.checkpoint.folders import iteration_folder
from remax_megatron.checkpoint.saver import Saver
from remax_megatron.checkpoint.state import RunState
from remax_megatron.policy.training_state import TrainingState
from remax_megatron.weights.hf_folder import side_files

BEFORE, AFTER = 2, 3  # updates


def run(part: Part) -> None:
    for in_background in (False, True):
        name = "saved in the background" if in_background else "saved at once"
        part.case(name, lambda in_background=in_background: _resume(part, in_background))


def _resume(part: Part, in_background: bool) -> Numbers:
    folder = part.model("parity", SHAPE, STD)
    rows = make_rows(500, num_prompts=4, longest=30) if part.tiny else make_rows(8000, num_prompts=8, longest=400)
    config = part.settings(folder, "actor_rollout_ref.actor.optim.lr=1e-3")
    policy = part.policy(config)
    for row, logprobs in zip(rows, policy.logprobs(rows), strict=True):
        row.old_logprobs = logprobs  # without them every ratio is 1, and the loss the same whatever the weights
    for _ in range(BEFORE):
        policy.update(rows)
    root = part.work / f"checkpoints-{in_background}"
    side = side_files(folder, policy.dtype)
    saver = Saver(root, [TrainingState(policy)], part.layout(), side, keep=1, in_background=in_background)
    state = RunState(BEFORE, BEFORE, BEFORE, {}, "", {}, None)
    begun_s = part.seconds(lambda: saver.save(state))
    going_on = [policy.update(rows) for _ in range(AFTER)]
    finished_s = part.seconds(saver.finish)
    resumed_policy = part.policy(config, iteration_folder(root, BEFORE))
    TrainingState(resumed_policy).load_optimizer(iteration_folder(root, BEFORE), BEFORE)
    resumed = [resumed_policy.update(rows) for _ in range(AFTER)]
    losses = [[update.loss for update in updates] for updates in (going_on, resumed)]
    return {
        "losses": losses[0],
        "resumed_losses": losses[1],
        "loss_difference": max(abs(a - b) for a, b in zip(*losses, strict=True)),
        "save_s": begun_s,
        "finish_s": finished_s,
        "checkpoint_gb": _size(iteration_folder(root, BEFORE)) / 1e9,
    }


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())
