"""Where metrics go (metrics.jsonl always; console, wandb, tensorboard on request).

Rank 0 writes: the caller reduces over ranks first, with each metric's own reduction. What the keys mean is
docs/metrics.md, drawing is plots.py.
`metrics.jsonl` holds one JSON object per line, `{"step": 3, "reward/mean": 0.5, ...}`, flushed line by line. JSON has
no word for NaN and infinity: they are written as null. wandb and tensorboard get the value itself. wandb runs offline
(files under the run's folder, `wandb sync` uploads them) unless WANDB_MODE says otherwise, or there is a key: in
WANDB_API_KEY, or in netrc by `wandb login`.
"""

from __future__ import annotations

import json
import logging
import math
import netrc
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import ParseResult, urlparse

from remax_megatron.atomic import replacing
from remax_megatron.config.schema import LOGGERS
from remax_megatron.errors import UserError

log = logging.getLogger(__name__)

WANDB_MODES = ("online", "offline", "disabled", "shared")
WANDB_WAIT_S = 10.0  # for a first answer of its server


class MetricsWriter:
    """Writes every step's metrics to `run_dir/metrics.jsonl` and to each of `loggers` (console, wandb, tensorboard).

    `project` and `experiment` are the run's names for wandb; `config_yaml` is the resolved config, shown by wandb and
    tensorboard. A file that exists is continued, less a last line that a killed run left half-written; `first_step`
    above 0 tells tensorboard and wandb that it is continued. The console's lines are logged.
    Raises ValueError for an unknown logger and for one whose package is not installed, before any file is made.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        loggers: Sequence[str],
        project: str,
        experiment: str,
        config_yaml: str,
        first_step: int = 0,
    ) -> None:
        loggers = [loggers] if isinstance(loggers, str) else list(loggers)
        for name in loggers:
            if name not in LOGGERS:
                raise ValueError(f"trainer.logger names {name!r}, which is unknown; use {', '.join(LOGGERS)}")
        run_dir = Path(run_dir)
        self._wandb = (
            _start_wandb(run_dir, project, experiment, config_yaml, first_step) if "wandb" in loggers else None
        )
        self._tensorboard = _start_tensorboard(run_dir, config_yaml, first_step) if "tensorboard" in loggers else None
        self._to_console = "console" in loggers
        run_dir.mkdir(parents=True, exist_ok=True)
        self.path = run_dir / "metrics.jsonl"
        self._file = self.path.open("a+b")
        self._file.seek(0)
        self._file.truncate(self._file.read().rfind(b"\n") + 1)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes one line. Values are plain numbers; anything else is a TypeError, not a silent string."""
        record = {"step": step, **{key: _jsonable(key, value) for key, value in metrics.items()}}
        self._file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        self._file.flush()
        values = {key: value for key, value in metrics.items() if key != "step"}
        if self._wandb is not None:
            self._wandb.log(values, step=step)
        if self._tensorboard is not None:
            for key, value in values.items():
                self._tensorboard.add_scalar(key, value, step)
        if self._to_console:
            for line in console_lines(step, metrics):
                log.info(line)

    def sync(self) -> None:
        """Bring metrics.jsonl to the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes every writer; a second call does nothing."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()
        self._wandb = self._tensorboard = None


# (label, key, format) of the console line, in order; keys that a step lacks are left out.
_CONSOLE = (
    ("Actor Loss", "actor/loss", "{:.3f}"),
    ("Reward", "reward/mean", "{:.3f}"),
    ("Baseline", "baseline/mean", "{:.3f}"),
    ("Advantage", "advantage/mean", "{:+.3f}"),
    ("Trained Tokens/s", "throughput/trained_tokens_per_s", "{:.0f}"),
    ("Generated Tokens/s", "throughput/generated_tokens_per_s", "{:.0f}"),
    ("Sync", "sync/seconds", "{:.2f}s"),
)


def console_lines(step: int, metrics: Mapping[str, float]) -> list[str]:
    """The lines for people: `Epoch 1, Step 3: Actor Loss: 0.189, Reward: 0.512, ...` and, where validation ran,
    `Validation Accuracy: 47.8%`."""
    lines = []
    parts = [f"{label}: {form.format(metrics[key])}" for label, key, form in _CONSOLE if key in metrics]
    if parts:
        epoch = f"Epoch {metrics['epoch']:.0f}, " if "epoch" in metrics else ""
        lines.append(f"{epoch}Step {step}: {', '.join(parts)}")
    if "val/accuracy" in metrics:
        accuracy = metrics["val/accuracy"]  # a mean reward: a share, unless the reward has another range
        lines.append(f"Validation Accuracy: {f'{accuracy:.1%}' if 0 <= accuracy <= 1 else f'{accuracy:.3f}'}")
    return lines


def truncate_metrics(path: str | os.PathLike[str], last_step: int) -> None:
    """Remove malformed lines, and records after `last_step`, from a metrics.jsonl, if the file exists."""
    path = Path(path)
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            if line.endswith(b"\n") and json.loads(line)["step"] <= last_step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    with replacing(path) as tmp:
        tmp.write_bytes(b"".join(kept))


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl. ValueError "FILE:LINE: ..." for a line that is not a JSON object."""
    records = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not JSON: {error}") from error
        if not isinstance(record, dict) or "step" not in record:
            raise ValueError(f"{path}:{number}: not a metrics record: an object with 'step' is needed")
        records.append(record)
    return records


def _jsonable(key: str, value: float) -> float | None:
    if not isinstance(value, int | float):
        raise TypeError(f"metric {key!r} must be an int or a float, found {type(value).__name__}: {value!r}")
    return value if math.isfinite(value) else None


def _start_wandb(run_dir: Path, project: str, experiment: str, config_yaml: str, first_step: int) -> Any:
    """A run that is resumed keeps its id, which lies in `run_dir`/wandb-id."""
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise ValueError("trainer.logger names 'wandb', which is not installed: pip install wandb") from error
    from omegaconf import OmegaConf

    run_dir.mkdir(parents=True, exist_ok=True)
    mode: Any = _wandb_mode(wandb.Settings().base_url)
    config: Any = OmegaConf.to_container(OmegaConf.create(config_yaml))
    id_file = run_dir / "wandb-id"
    run_id = id_file.read_text().strip() if first_step > 0 and id_file.exists() else os.urandom(4).hex()
    id_file.write_text(run_id + "\n")
    where = {"project": project, "name": experiment, "dir": run_dir, "mode": mode}
    settings = wandb.Settings(init_timeout=WANDB_WAIT_S)
    try:
        if mode == "online":
            _reach(urlparse(settings.base_url))
        return wandb.init(**where, config=config, id=run_id, resume="allow", settings=settings)
    except Exception as error:  # wandb raises its own errors, requests' and grpc's
        raise UserError(
            f"trainer.logger names wandb, which could not be started ({type(error).__name__}: {error}); set "
            "WANDB_MODE=offline in the environment (`wandb sync` uploads later), or leave wandb out of trainer.logger"
        ) from error


def _wandb_mode(base_url: str) -> str:
    """WANDB_MODE where it is set; else online with an API key, in the environment or by `wandb login` in netrc."""
    mode = os.environ.get("WANDB_MODE")
    if mode:
        if mode not in WANDB_MODES:
            raise UserError(f"WANDB_MODE={mode} is none of wandb's modes; set it to one of {', '.join(WANDB_MODES)}")
        return mode
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    try:
        logged_in = netrc.netrc(path).authenticators(urlparse(base_url).hostname or "") is not None
    except (OSError, netrc.NetrcParseError):
        logged_in = False
    return "online" if logged_in or os.environ.get("WANDB_API_KEY") else "offline"


def _reach(server: ParseResult) -> None:
    """OSError, soon, when there is no way to the server; a proxy is left to wandb, which would try for a minute."""
    if not any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy")):
        port = server.port or (80 if server.scheme == "http" else 443)
        socket.create_connection((server.hostname or "", port), timeout=WANDB_WAIT_S).close()


def _start_tensorboard(run_dir: Path, config_yaml: str, first_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise ValueError(
            "trainer.logger names 'tensorboard', which is not installed: pip install tensorboard"
        ) from error
    writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1 if first_step else None)
    writer.add_text("config", f"```yaml\n{config_yaml}\n```")
    return writer
