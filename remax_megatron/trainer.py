"""The training loop: answer, score, learn, sync (ReMax, arXiv 2310.10505), and a checkpoint now and then.

Every rank runs it with the same arguments. Building the parts, starting and ending a run is run.py.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from tqdm import tqdm

from remax_megatron.atomic import replacing, written_for
from remax_megatron.checkpoint.pending import pending_files
from remax_megatron.checkpoint.saver import Saver
from remax_megatron.checkpoint.state import capture
from remax_megatron.config.schema import Config
from remax_megatron.data.dataset import PromptDataset, batches
from remax_megatron.diagnostics import rollout_metrics, sync_metrics, throughput_metrics, update_metrics
from remax_megatron.evaluation import validate
from remax_megatron.flops import UpdateFlops
from remax_megatron.gauges import process_gauges
from remax_megatron.inputs import total_steps
from remax_megatron.metrics import MetricsWriter
from remax_megatron.phases import PhaseTimer
from remax_megatron.rollout.batches import Batches
from remax_megatron.rollout.bridge import Bridge
from remax_megatron.rollout.collect import Collector
from remax_megatron.rollout.remote import RemoteCollector
from remax_megatron.types import Prompt, Rollout
from remax_megatron.update import Learner

log = logging.getLogger(__name__)


@dataclass
class Trainer:
    """The parts of a run. `writer` exists on rank 0 only; `start_step` counts the steps finished before this resume."""

    config: Config
    learner: Learner
    bridge: Bridge
    batches: Batches
    collector: Collector | RemoteCollector
    train_prompts: PromptDataset
    val_prompts: PromptDataset | None
    timer: PhaseTimer
    flops: UpdateFlops
    writer: MetricsWriter | None
    saver: Saver
    prompts_digest: str
    start_step: int = 0

    def train(self) -> bool:
        """Run the steps that are left; collective over the world. False when the stop file ended it before the last."""
        sync = self.bridge.sync()
        if self.start_step == 0:
            before = self._validate(0, due=self.config.trainer.val_before_train)
            self._log(0, {"epoch": 0, **sync_metrics(sync), **before})
        for step, epoch in self._steps():
            with self.timer.step(step):
                answered = self.batches.take(step, self._batch(step), self._batch(step + 1))
                rollouts = answered.rollouts
                with self.timer.phase("update"):
                    learned = self.learner.learn(rollouts, f"Epoch {epoch}, Step {step}", step)
                timeline = self.batches.finish()
                with self.timer.phase("sync"):
                    sync = self.bridge.sync()
            times = {**answered.metrics, **self.timer.pop()}
            metrics = {"epoch": epoch, **rollout_metrics(rollouts, learned.rows), **update_metrics(learned.updates)}
            metrics |= learned.metrics | sync_metrics(sync) | timeline | times
            metrics |= throughput_metrics(rollouts, learned, times, self.flops)
            validation = self._validate(step, due=step == self.num_steps or _every(self.config.trainer.test_freq, step))
            gauges = process_gauges(self.learner.policy.layout.device, self.timer.pop_peaks())
            self._dump(step, rollouts)
            self._log(step, metrics | validation | gauges)
            if not self._checkpoint(step, validation.get("val/accuracy")):
                return False
        with self.timer.phase("save"):
            self.saver.finish()
        return True

    def validate_only(self) -> int:
        """Validate the policy as it is and write the metrics down; collective over the world. Returns its step."""
        sync = self.bridge.sync()
        epoch = -(-self.start_step // self.steps_per_epoch)
        validation = self._validate(self.start_step, due=True)
        self._log(self.start_step, {"epoch": epoch, **sync_metrics(sync), **validation})
        return self.start_step

    # -- batches ---------------------------------------------------------------------------------------------------

    @property
    def steps_per_epoch(self) -> int:
        """Count the whole batches of an epoch."""
        return len(self.train_prompts) // self.config.data.train_batch_size

    @property
    def num_epochs(self) -> int:
        """Epochs that are begun: fewer than total_epochs when total_training_steps ends the run before."""
        return -(-self.num_steps // self.steps_per_epoch)

    @property
    def num_steps(self) -> int:
        """Count the steps of the whole run."""
        return total_steps(self.config, len(self.train_prompts))

    def _batch(self, step: int) -> list[int] | None:
        """Positions of the prompts of a step, which is counted from 1; None after the last."""
        if step > self.num_steps:
            return None
        epoch, place = divmod(step - 1, self.steps_per_epoch)
        data, seed = self.config.data, self.config.trainer.seed
        return _orders(len(self.train_prompts), data.train_batch_size, seed, epoch + 1, data.shuffle)[place]

    def _steps(self) -> Iterator[tuple[int, int]]:
        """(step, epoch) of what is left to do, both counted from 1, under one progress bar per epoch."""
        for epoch in range(self.start_step // self.steps_per_epoch + 1, self.num_epochs + 1):
            first = (epoch - 1) * self.steps_per_epoch
            begun, count = max(0, self.start_step - first), min(self.steps_per_epoch, self.num_steps - first)
            often = 0.1 if sys.stderr.isatty() else 30.0  # seconds; a log file needs no animation
            title, hidden = f"Epoch {epoch}/{self.num_epochs}", self.writer is None
            bar = {"initial": begun, "unit": "step", "disable": hidden, "mininterval": often}
            for place in tqdm(range(begun, count), title, count, **bar):
                yield first + place + 1, epoch

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def _checkpoint(self, step: int, accuracy: float | None) -> bool:
        """Save when it is time to, or asked for; False when the run shall end. Its time counts to the next step."""
        trainer = self.config.trainer
        with self.timer.phase("save"):
            stop = self.saver.any_rank(self.writer is not None and Path(trainer.stop_file).exists())
            due = trainer.save_freq > 0 and (step == self.num_steps or _every(trainer.save_freq, step))
            if due or stop:
                if self.writer is not None:
                    self.writer.sync()  # the records are no older than the checkpoint
                engine, digest = self.bridge.engine, self.prompts_digest
                state = capture(step, self.config, self.learner, engine, digest, accuracy)
                pending = pending_files(self.batches.pending) if self.writer is not None else {}
                self.saver.save(state, pending, in_background=False if stop else None)
            else:
                self.saver.poll()
        if not stop or step == self.num_steps:
            return True
        if self.writer is not None:
            Path(trainer.stop_file).unlink(missing_ok=True)
            log.info("Stopped after step %d, as %s asks; trainer.resume_mode=auto resumes", step, trainer.stop_file)
        return False

    # -- records ---------------------------------------------------------------------------------------------------

    def _validate(self, step: int, due: bool) -> dict[str, float]:
        if not due or self.val_prompts is None:
            return {}
        prompts: Sequence[Prompt] = self.val_prompts
        dump_dir = self.config.trainer.validation_data_dir if self.writer is not None else None
        batch_size = self.config.data.val_batch_size
        metrics = validate(self.collector, prompts, step=step, batch_size=batch_size, dump_dir=dump_dir)
        return metrics | self.timer.pop()

    def _log(self, step: int, metrics: dict[str, float]) -> None:
        if self.writer is not None:
            with written_for("trainer.default_local_dir", self.config.trainer.default_local_dir):
                self.writer.log(step, metrics)

    def _dump(self, step: int, rollouts: Sequence[Rollout]) -> None:
        """One JSON line per prompt, whole, in `trainer.rollout_data_dir`/STEP.jsonl."""
        folder = self.config.trainer.rollout_data_dir
        if self.writer is None or folder is None:
            return
        texts = self.collector.engine.tokenizer.batch_decode([list(rollout.prompt.token_ids) for rollout in rollouts])
        with written_for("trainer.rollout_data_dir", folder), replacing(Path(folder) / f"{step}.jsonl") as path:
            records = ({**asdict(rollout), "text": text} for rollout, text in zip(rollouts, texts, strict=True))
            path.write_text("".join(json.dumps(record, default=str) + "\n" for record in records))


_orders = lru_cache(maxsize=2)(batches)  # of this epoch and of the next


def _every(frequency: int, step: int) -> bool:
    return frequency > 0 and step % frequency == 0
