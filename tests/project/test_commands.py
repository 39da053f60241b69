"""Every shell command of README.md, CONTRIBUTING.md, docs/ and examples/: run as written, or known to be run elsewhere.

A command that no row of HOW knows fails the test. What runs here runs in a folder that looks like the root of the
repository, with the console scripts on PATH; HF_DIR, DIR and the folders of the SmolLM2 example hold something small.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

from remax_megatron.config.load import load_config
from remax_megatron.config.rules import validate
from tests import ROOT
from tests.small_models import make_qwen2

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
]
SHELL = re.compile(r"^ *```(?:bash|sh|shell|console)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)

# What happens to a command here: it runs; it is run by other tests, or by whoever runs these; or the page has to say
# beside it what it needs that a test machine lacks.
RUN, ELSEWHERE = "run", "elsewhere"
GPU, SLURM, HUB = "GPU", "Slurm", "hub"
HOW = (  # the first row that a command begins with
    ("make ", ELSEWHERE),  # its target exists: test_make_targets_exist
    ("source .venv/bin/activate", ELSEWHERE),
    ("pytest ", ELSEWHERE),
    ("touch runs/demo/stop", ELSEWHERE),  # test_resume.py, test_slurm.py
    ("remax-convert megatron-to-hf --megatron runs/demo/checkpoints ", ELSEWHERE),  # test_resume.py
    ("torchrun --standalone --nproc-per-node 2 -m remax_megatron ", ELSEWHERE),  # test_end_to_end.py; settings: below
    (
        "torchrun --nproc-per-node 2 -m remax_megatron --config-name demo trainer.placement=split ",
        ELSEWHERE,
    ),  # test_split
    ("torchrun --nproc-per-node 8 -m remax_megatron ", GPU),
    ("torchrun --nnodes 2 ", GPU),
    ("torchrun --nproc-per-node N pretrain_gpt.py ", GPU),
    ("python -m remax_megatron.demo.prepare ", ELSEWHERE),  # test_demo.py
    ("python -m benchmarks.gpu ", GPU),  # test_gpu_benchmark.py runs it without one
    ("for layers in local transformer_engine; do ", ELSEWHERE),  # make gpu-counts, in an environment of its own
    ("python -m remax_megatron.doctor --config-name qwen2_5_", GPU),
    ("python -m remax_megatron.plan --config-name qwen2_5_14b --calibrate ", GPU),  # test_calibrate.py
    ("python -m remax_megatron.plan ", RUN),
    ("python -m benchmarks.scale ", ELSEWHERE),  # test_scale.py runs a part of it
    (
        "python -m benchmarks.estimators ",
        ELSEWHERE,
    ),  # test_estimators_benchmark.py has its arithmetic; it takes an hour
    ("python -m benchmarks.ahead ", ELSEWHERE),  # half an hour
    ("python -m remax_megatron.config.cli --config-name qwen2_5_", HUB),
    ("python -m remax_megatron.data.gsm8k --local_dir ~/data/gsm8k --from_jsonl ", RUN),
    ("python -m remax_megatron.data.", HUB),
    ("python examples/smollm/as_qwen2.py ", HUB),
    ("sbatch ", SLURM),
    ("scancel ", SLURM),
    ("python examples/", RUN),
    ("python convert/", RUN),
    ("python -m remax_megatron --help", RUN),
    ("python -m remax_megatron --config-name qwen2_5_7b --cfg job", RUN),
    ("python -m remax_megatron.config.cli ", RUN),
    ("python -m remax_megatron.doctor ", RUN),
    ("remax-", RUN),
)


@dataclass(frozen=True)
class Command:
    """`text` is one line; `before` is what a reader has read: the page's opening, and its section up to the command."""

    page: str
    text: str
    before: str

    @property
    def how(self) -> str | None:
        return next((how for start, how in HOW if f"{self.text} ".startswith(start)), None)


def commands_of(page: Path) -> list[Command]:
    """The commands of the page's shell blocks in order, without comments; a continued line or a loop is one command."""
    text, found = page.read_text(), []
    for block in SHELL.finditer(text):
        opening, *sections = re.split(r"^## ", text[: block.start()], flags=re.MULTILINE)
        before = opening + (sections[-1] if sections else "")
        lines = re.sub(r"\\\n\s*|(?<=; do)\n\s*", " ", block[1]).splitlines()
        texts = [" ".join(re.sub(r"\s#\s.*", "", f" {line}").split()) for line in lines]
        found += [Command(str(page.relative_to(ROOT)), text, before) for text in texts if text]
    return found


COMMANDS = [command for page in PAGES for command in commands_of(page)]


def name(command: Command) -> str:
    return f"{command.page}: {command.text[:60]}"


def test_commands_are_found():
    loop = "for layers in local transformer_engine; do for preset in"
    assert {"make demo", "make test", "remax-convert roundtrip HF_DIR"} <= {command.text for command in COMMANDS}
    assert [c.text.endswith("done; done") for c in COMMANDS if c.text.startswith(loop)] == [True]
    assert not [name(command) for command in COMMANDS if "\\" in command.text]


@pytest.mark.parametrize("command", COMMANDS, ids=name)
def test_a_command_is_known_and_its_needs_are_said(command):
    assert command.how, f"add a row to HOW for: {command.text}"
    if command.how in (GPU, SLURM, HUB):
        assert command.how in command.before, f"{command.page} does not say beside it: {command.how}"


def test_no_row_of_how_is_left_over():
    starts = [start for start, _ in HOW]
    used = {next((s for s in starts if f"{command.text} ".startswith(s)), None) for command in COMMANDS}
    assert set(starts) <= used


def test_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for command in COMMANDS:
        if command.text.startswith("make "):
            assert command.text.split()[1] in targets, command.text


def test_test_files_and_job_scripts_exist():
    for command in COMMANDS:
        for word in command.text.split():
            if word.startswith(("tests/", "slurm/", "examples/")):
                assert (ROOT / word).exists(), command.text


@pytest.mark.parametrize(
    "command",
    [c for c in COMMANDS if re.search(r"-m remax_megatron(\.config\.cli|\.doctor|\.plan)? |^sbatch ", c.text)],
    ids=name,
)
def test_the_settings_of_a_run_are_valid(command):
    """Those of the command line and the preset; what needs the model or the files is checked when it runs."""
    words = shlex.split(command.text)
    options = dict(zip(words, words[1:], strict=False))
    overrides = [word for word in words if re.match(r"[a-z_.]+=", word)]
    if words[0] == "sbatch":
        size = re.search(r"_(\d+b)\.sh", command.text)
        nodes = re.search(r"--nodes=(\d+)", command.text)
        overrides.append(f"trainer.nnodes={nodes[1] if nodes else 1}")
        options["--config-name"] = f"qwen2_5_{size[1]}"
    folder = options.get("--config-dir")
    preset = options.get("--config-name", "demo")
    config = load_config(preset, overrides, ROOT / folder if folder else None).config
    validate(config, config.trainer.nnodes * config.trainer.n_gpus_per_node, None)
    ranks = int(options.get("--nnodes", 1)) * int(options.get("--nproc-per-node", config.trainer.n_gpus_per_node))
    assert ranks == config.trainer.nnodes * config.trainer.n_gpus_per_node or words[0] != "torchrun"


@pytest.fixture(scope="module")
def root(tmp_path_factory, demo_policy, demo_data) -> tuple[Path, dict[str, str]]:
    """A folder for the commands to run in, and their environment."""
    folder = tmp_path_factory.mktemp("root")
    for part in ("remax_megatron", "benchmarks", "conf", "convert", "docs", "examples", "slurm"):
        (folder / part).symlink_to(ROOT / part)
    make_qwen2(folder / "HF_DIR", tied=True, vocab=1024)
    (folder / "DIR").mkdir()
    example = json.dumps({"question": "What is 2 + 3?", "answer": "2 + 3 = 5\n#### 5"}) + "\n"
    for split in ("train", "test"):
        (folder / "DIR" / f"{split}.jsonl").write_text(example)
    # What the demo's preparation makes.
    inputs = folder / "runs" / "demo" / "inputs"
    inputs.mkdir(parents=True)
    (inputs / "policy").symlink_to(demo_policy)
    (inputs / "data").symlink_to(Path(demo_data[0].partition("=")[2]).parent)
    # What the hub would give to the SmolLM2 example.
    (folder / "runs" / "gsm8k").mkdir(parents=True)
    for split in ("train", "test"):
        (folder / "runs" / "gsm8k" / f"{split}.parquet").touch()
    make_qwen2(folder / "runs" / "smollm2-135m", tied=True, vocab=1024)
    programs = folder / "bin"
    programs.mkdir()
    (programs / "python").write_text(
        f'#!/bin/sh\nexec {sys.executable} "$@"\n'
    )  # a link would leave its packages behind
    (programs / "python").chmod(0o755)
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    for script, target in scripts.items():
        module, function = target.split(":")
        code = f"#!{sys.executable}\nimport sys\nfrom {module} import {function} as main\nsys.exit(main())\n"
        (programs / script).write_text(code)
        (programs / script).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HOME": str(folder / "home"),
    }
    return folder, environment


@pytest.mark.e2e
@pytest.mark.parametrize("page", sorted({command.page for command in COMMANDS if command.how == RUN}))
def test_commands_run_as_written(page, root):
    folder, environment = root
    for command in COMMANDS:
        if command.page == page and command.how == RUN:
            shell = ["bash", "-c", command.text]
            done = subprocess.run(shell, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, f"{command.text}\n{done.stdout}\n{done.stderr}"


# -- the pages themselves ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert link.startswith("https://") or (page.parent / link).exists(), link


def test_every_page_is_listed():
    listed = set(re.findall(r"\]\((\w+\.md)\)", (ROOT / "docs" / "README.md").read_text()))
    assert listed == {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}


def test_the_readme_is_a_door():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) < 150
    assert "No GPU has run it yet" in "\n".join(lines[:10])


def test_the_readme_s_reward_and_row_are_taken(tmp_path):
    """The two snippets of `Your data and your reward`, by the project's own loaders."""
    from remax_megatron.data.dataset import load_prompts
    from remax_megatron.demo.warm_start import make_tokenizer
    from remax_megatron.rewards.scorer import ScoreRequest, ScoreResult
    from remax_megatron.rewards.scoring import load_scorer

    text = (ROOT / "README.md").read_text()
    for kind, file in (("python", "reward.py"), ("json", "row.jsonl")):
        (snippet,) = re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL)
        (tmp_path / file).write_text(snippet)
    (prompt,) = load_prompts(tmp_path / "row.jsonl", make_tokenizer(), max_prompt_length=100)
    scorer = load_scorer(str(tmp_path / "reward.py"))
    for answer, score in (("It is 5.", 1.0), ("It is 6.", 0.0)):
        request = ScoreRequest(prompt.data_source, answer, prompt.ground_truth, prompt.extra_info)
        assert scorer.score(request) == ScoreResult(score)
