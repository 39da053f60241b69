"""What a run is beside its weights and optimizer state: captured into a checkpoint, and restored from it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remax_megatron.config.schema import Config
from remax_megatron.errors import UserError

if TYPE_CHECKING:
    from remax_megatron.policy.training_state import TrainingState
    from remax_megatron.rollout.engine import Engine
    from remax_megatron.rollout.remote import RemoteEngine
    from remax_megatron.update import Learner

STATE = "state.json"
FORMAT = 1


class CheckpointError(UserError):
    """A checkpoint that cannot be written, or cannot be resumed."""


@dataclass(frozen=True)
class RunState:
    """`step` counts finished steps; the data's position, the seeds of sampling and the learning rate follow from it
    and from `config`."""

    step: int
    num_updates: int
    weight_version: int
    learner: dict[str, Any]
    train_prompts: str  # digest of the training prompts in their order
    config: dict[str, Any]
    accuracy: float | None = None  # of the validation after `step`, when there was one
    reward_file: str | None = None  # digest of custom_reward_function.path, as it was when the run started
    format: int = field(default=FORMAT)

    def to_json(self) -> str:
        """Return the state as the text of state.json."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"


def capture(
    step: int,
    config: Config,
    learner: Learner,
    engine: Engine | RemoteEngine,
    train_prompts: str,
    accuracy: float | None,
) -> RunState:
    """The state of a run after `step`.

    step           finished steps
    config         the settings of the run
    learner        has the policy, the coefficient of a KL in the reward and the counts of the guards
    engine         has the version of the weights
    train_prompts  digest of the training prompts
    accuracy       of the validation after `step`, None without one
    """
    return RunState(
        step=step,
        num_updates=learner.policy.num_updates,
        weight_version=engine.weight_version,
        learner=learner.state_dict(),
        train_prompts=train_prompts,
        config=dataclasses.asdict(config),
        reward_file=reward_file_digest(config.custom_reward_function.path),
        accuracy=accuracy,
    )


@functools.cache
def reward_file_digest(path: str | None) -> str | None:
    """The sha-256 of the user's reward file, as it was at the first call; None without one, or when it is gone."""
    try:
        return None if path is None else hashlib.sha256(Path(path).expanduser().read_bytes()).hexdigest()
    except OSError:
        return None


def restore_optimizers(state: RunState, folder: Path, training_states: Sequence[TrainingState]) -> None:
    """Read the optimizers of `state`, the policy's and then a critic's, from its checkpoint. They come before the
    engine, which measures free memory."""
    counts = [state.num_updates, *([state.learner["critic"]["num_updates"]] if "critic" in state.learner else [])]
    for training_state, num_updates in zip(training_states, counts, strict=True):
        training_state.load_optimizer(folder, num_updates)


def restore(state: RunState, learner: Learner, engine: Engine | RemoteEngine) -> None:
    """Bring the rest of the run to where `capture` found it."""
    learner.load_state_dict(state.learner)
    engine.resume_at(state.weight_version)


def read_state(folder: Path) -> RunState:
    """The state in a checkpoint's folder. CheckpointError when there is none, or a damaged one."""
    path = folder / STATE
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise CheckpointError(f"{path} has format {content['format']}, this version reads {FORMAT}")
        return RunState(**content)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} is no checkpoint of a run: it has no {STATE}; a model's folder belongs in "
            "actor_rollout_ref.model.path"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {error})") from error
