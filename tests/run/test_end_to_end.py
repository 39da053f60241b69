"""The demo preset under torchrun, with every real part, over the layouts; and what a run leaves behind."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from remax_megatron.config.load import load_config
from remax_megatron.convert import hf_to_megatron
from remax_megatron.demo.model_config import MODEL_CONFIG
from remax_megatron.metrics import read_metrics
from remax_megatron.types import Row
from tests import ROOT
from tests.ranks import run_ranks

LAYOUTS = [  # ranks, tp, pp, vllm tp
    (2, 2, 1, 1),
    (2, 2, 1, 2),
    (2, 1, 2, 1),
    (2, 1, 2, 2),
    (2, 1, 1, 1),
    (2, 1, 1, 2),
    (4, 2, 2, 1),
    (4, 2, 2, 2),
]
REQUIRED_METRICS = {
    "step",
    "epoch",
    "weight_version",
    "reward/mean",
    "baseline/mean",
    "advantage/mean",
    "advantage/zero_share",
    "baseline/win_share",
    "baseline/tie_share",
    "baseline/lose_share",
    "actor/loss",
    "actor/grad_norm",
    "actor/entropy",
    "response/mean_tokens",
    "response/truncated_share",
    "batch/num_microbatches",
    "batch/num_tokens",
    "batch/fill",
    "rollout/logprob_diff_mean",
    "rollout/logprob_diff_max",
    "sync/seconds",
    "sync/bytes",
    "sync/canary_max_abs_diff",
    "time/rollout_s",
    "time/reward_s",
    "time/update_s",
    "time/sync_s",
    "time/step_s",
    "time/score_s",
    "memory/rollout_peak_gib",
    "memory/score_peak_gib",
    "memory/update_peak_gib",
    "memory/sync_peak_gib",
    "perf/tflops",
    "perf/hardware_tflops",
    "throughput/trained_tokens_per_s",
    "throughput/generated_tokens_per_s",
}


def overrides(policy: str, run_dir: Path, tp: int, pp: int, vllm_tp: int) -> list[str]:
    megatron = "actor_rollout_ref.actor.megatron"
    return [
        f"actor_rollout_ref.model.path={policy}",
        f"{megatron}.tensor_model_parallel_size={tp}",
        f"{megatron}.pipeline_model_parallel_size={pp}",
        f"actor_rollout_ref.rollout.tensor_model_parallel_size={vllm_tp}",
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=512",
        "data.train_batch_size=8",
        "data.val_max_samples=16",
        "trainer.total_training_steps=2",
        "actor_rollout_ref.actor.skip_zero_advantage=False",  # this policy is hardly ever right
        f"trainer.default_local_dir={run_dir}",
        f"trainer.rollout_data_dir={run_dir}/rollouts",
        f"trainer.validation_data_dir={run_dir}/validation",
        "actor_rollout_ref.rollout.val_kwargs={n:2,do_sample:True}",
    ]


@pytest.fixture(scope="module")
def first_run(torchrun, demo_policy, tmp_path_factory) -> Path:
    """A DP 2 run of two steps whose rollouts are recorded, and the second of which is profiled."""
    run_dir = tmp_path_factory.mktemp("first") / "run"
    finished = torchrun(2, [*overrides(demo_policy, run_dir, 1, 1, 1), "trainer.profile_steps=[2]"])
    assert finished.code == 0, finished.output
    assert "Epoch 1, Step 1: Dynamic Batch: " in finished.output
    assert "Validation Accuracy: " in finished.output
    return run_dir


def test_a_megatron_checkpoint_trains_like_the_folder_it_came_from(torchrun, first_run, demo_policy, tmp_path):
    hf_to_megatron.convert(demo_policy, tmp_path / "megatron")
    finished = torchrun(2, overrides(str(tmp_path / "megatron"), tmp_path / "run", 1, 1, 1))
    assert finished.code == 0, finished.output

    def measured(run_dir: Path) -> list[dict]:
        timings = ("time/", "throughput/", "perf/", "seconds", "gb_per_s", "memory/")
        records = read_metrics(run_dir / "metrics.jsonl")
        return [{k: v for k, v in record.items() if not any(t in k for t in timings)} for record in records]

    assert measured(tmp_path / "run") == measured(first_run)
    assert len(measured(first_run)[1]) > 25


def check_metrics(run_dir: Path, plain_advantages: bool = True) -> None:
    before, *steps = read_metrics(run_dir / "metrics.jsonl")
    assert before["step"] == 0 and "val/accuracy" in before
    assert [record["step"] for record in steps] == [1, 2]
    assert "val/accuracy" in steps[-1]
    for record in steps:
        assert not REQUIRED_METRICS - record.keys()
        assert record["weight_version"] == record["step"]
        assert record["sync/canary_max_abs_diff"] <= 1e-4
        assert record["rollout/logprob_diff_max"] <= 1e-4
        assert 0 < record["batch/fill"] <= 1
        shares = [record[f"baseline/{name}_share"] for name in ("win", "tie", "lose")]
        assert sum(shares) == pytest.approx(1.0)
        if plain_advantages:
            gain = record["reward/mean"] - record["baseline/mean"]
            assert record["advantage/mean"] == pytest.approx(gain)


def test_flops_are_those_of_the_recorded_rollouts_and_peaks_are_above_what_is_held(first_run):
    sizes = MODEL_CONFIG
    hidden, ffn, layers = sizes["hidden_size"], sizes["intermediate_size"], sizes["num_hidden_layers"]
    keys = hidden * sizes["num_key_value_heads"] // sizes["num_attention_heads"]
    per_layer = hidden * (2 * hidden + 2 * keys + 3 * ffn)
    _, *steps = read_metrics(first_run / "metrics.jsonl")
    for record in steps:
        by_hand = 0
        for line in (first_run / "rollouts" / f"{record['step']}.jsonl").read_text().splitlines():
            rollout = json.loads(line)
            for sample in rollout["samples"]:
                answer = len(sample["token_ids"])
                row = len(rollout["prompt"]["token_ids"]) + answer
                by_hand += 6 * layers * (per_layer * row + hidden * row**2)
                by_hand += 6 * hidden * sizes["vocab_size"] * answer
        update_s = record["time/update_s"] - record["time/score_s"]
        assert record["perf/tflops"] == pytest.approx(by_hand / update_s / 2 / 1e12, rel=0.01)  # 2 ranks
        assert "perf/mfu" not in record  # of a CPU
        peaks = {key: value for key, value in record.items() if key.endswith("_peak_gib")}
        assert all(0.1 < peak < 8 for peak in peaks.values()), peaks
        assert peaks["memory/score_peak_gib"] <= peaks["memory/update_peak_gib"] <= peaks["memory/step_peak_gib"]
    assert "memory/save_peak_gib" in steps[1]  # that of step 1, whose record was written before


def test_every_time_speed_and_memory_is_documented(first_run):
    page = (ROOT / "docs" / "metrics.md").read_text()
    phases = re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in page.splitlines() if line.startswith("| `")))
    for record in read_metrics(first_run / "metrics.jsonl"):
        for key in record:
            if key.startswith(("time/", "perf/", "memory/")) and f"`{key}`" not in page:
                phase, general = re.fullmatch(r"(?:time|memory)/([a-z]+)(_.+)", key).groups()
                assert phase in phases and f"/PHASE{general}`" in page, key


def test_a_profiled_step_leaves_a_trace_of_its_phases_on_each_rank(first_run):
    profile = first_run / "profile"
    assert sorted(str(p.relative_to(profile)) for p in profile.rglob("*.gz")) == [
        "step-2/rank-0.json.gz",
        "step-2/rank-1.json.gz",
    ]
    events = json.loads(gzip.decompress((profile / "step-2" / "rank-1.json.gz").read_bytes()))["traceEvents"]
    names = [event["name"] for event in events]
    assert all(names.count(phase) == 1 for phase in ("step", "rollout", "reward", "update", "sync"))


@pytest.mark.parametrize(
    ("ranks", "tp", "pp", "vllm_tp"),
    [
        pytest.param(*case, marks=() if case == (2, 1, 2, 2) else pytest.mark.slow)
        for case in LAYOUTS
        if case != (2, 1, 1, 1)
    ],
)
def test_every_layout_trains(torchrun, demo_policy, tmp_path, ranks, tp, pp, vllm_tp):
    finished = torchrun(ranks, overrides(demo_policy, tmp_path / "run", tp, pp, vllm_tp))
    assert finished.code == 0, finished.output
    check_metrics(tmp_path / "run")


def test_mini_batches_and_epochs_are_optimizer_steps_on_kept_logprobs(torchrun, demo_policy, tmp_path):
    actor = "actor_rollout_ref.actor"
    extra = [f"{actor}.ppo_mini_batch_size=4", f"{actor}.ppo_epochs=2", f"{actor}.optim.lr=1e-3"]
    extra += [f"{actor}.optim.lr_decay_style=linear", f"{actor}.optim.min_lr=2e-4"]
    finished = torchrun(2, [*overrides(demo_policy, tmp_path / "run", 2, 1, 1), *extra])
    assert finished.code == 0, finished.output
    check_metrics(tmp_path / "run")
    for record, rate in zip(read_metrics(tmp_path / "run" / "metrics.jsonl")[1:], (7e-4, 3e-4), strict=True):
        assert record["actor/num_updates"] == 4  # 8 prompts / 4, twice
        assert record["actor/lr"] == pytest.approx(rate)  # 3/8 and 7/8 of the way from 1e-3 to 2e-4, in 8 updates
        assert record["actor/approx_kl"] != 0.0  # three of the four ratios are not 1


def test_validation_alone_trains_and_exports_nothing(torchrun, first_run, demo_policy, tmp_path):
    run_dir, val_only = tmp_path / "run", "trainer.val_only=True"
    steps = "trainer.total_training_steps=5000"
    finished = torchrun(2, [*overrides(demo_policy, run_dir, 1, 1, 1), val_only, steps])
    assert f"note: {steps} has no effect" in finished.output
    assert finished.code == 0, finished.output
    assert "Validated after step 0: with trainer.val_only=True nothing is trained or exported." in finished.output
    (record,) = read_metrics(run_dir / "metrics.jsonl")
    before = read_metrics(first_run / "metrics.jsonl")[0]  # the first run's validation before its first step
    assert record["step"] == record["epoch"] == 0 and record["val/accuracy"] == before["val/accuracy"]
    assert {path.name for path in run_dir.iterdir()} == {"config.yaml", "lock", "metrics.jsonl", "validation"}


def test_kl_terms_shared_prompts_and_importance_weights_in_one_run(torchrun, demo_policy, tmp_path):
    extra = [
        "actor_rollout_ref.actor.skip_zero_advantage=null",
        "algorithm.use_kl_in_reward=True",
        "algorithm.kl_ctrl.type=adaptive",
        "algorithm.rollout_correction.rollout_is=sequence",
        "actor_rollout_ref.actor.use_kl_loss=True",
        "actor_rollout_ref.actor.share_prompts=True",
        "actor_rollout_ref.actor.entropy_coeff=0.001",
        "actor_rollout_ref.actor.optim.lr=1e-3",
    ]
    finished = torchrun(2, [*overrides(demo_policy, tmp_path / "run", 1, 2, 1), *extra])
    assert finished.code == 0, finished.output
    check_metrics(tmp_path / "run", plain_advantages=False)
    first, second = read_metrics(tmp_path / "run" / "metrics.jsonl")[1:]
    # The reference is the policy before its first step: their KL is that of rounding, and then it is not.
    assert abs(first["kl/reward_mean"]) < 1e-5 and abs(first["actor/kl"]) < 1e-5
    assert abs(second["kl/reward_mean"]) > 1e-4 and second["actor/kl"] > 1e-5
    assert second["kl/coef"] < first["kl/coef"] == 0.001  # below its target
    assert first["importance/mean"] == pytest.approx(1.0, abs=1e-4)
    assert first["batch/shared_token_share"] > 0.05 and first["batch/left_out_token_share"] == 0.0


def test_bfloat16_trains_with_a_tied_model_over_two_stages(torchrun, demo_policy, tmp_path):
    folder = tmp_path / "tied"
    shutil.copytree(demo_policy, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    bfloat16 = "actor_rollout_ref.actor.megatron.dtype=bfloat16"
    finished = torchrun(2, [*overrides(str(folder), tmp_path / "run", 1, 2, 1), bfloat16])
    assert finished.code == 0, finished.output
    for record in read_metrics(tmp_path / "run" / "metrics.jsonl"):
        assert record["sync/canary_mean_abs_diff"] <= 2e-2
    assert {tensor.dtype for tensor in load_file(tmp_path / "run" / "hf" / "model.safetensors").values()} == {
        torch.bfloat16
    }


def test_run_leaves_metrics_config_curves_and_a_model(first_run):
    check_metrics(first_run)
    assert (first_run / "curves.png").stat().st_size > 10_000
    metrics = read_metrics(first_run / "metrics.jsonl")
    for record in (metrics[0], metrics[2]):
        lines = (first_run / "validation" / f"{record['step']}.jsonl").read_text().splitlines()
        answers = [json.loads(line) for line in lines]
        assert len(answers) == 32 and {answer["step"] for answer in answers} == {record["step"]}
        right = [answer["reward"] for answer in answers]
        assert record["val/accuracy"] == record["val/word_problems/mean@2"] == sum(right) / 32
        either = [max(pair) for pair in zip(right[::2], right[1::2], strict=True)]
        assert record["val/word_problems/pass@2"] == sum(either) / 16
        assert any(a["answer"] != b["answer"] for a, b in zip(answers[::2], answers[1::2], strict=True))
        assert all(a["prompt"] == b["prompt"] != "" for a, b in zip(answers[::2], answers[1::2], strict=True))
    saved = load_config(str(first_run / "config.yaml").removesuffix(".yaml").rsplit("/", 1)[1], [], first_run).config
    assert saved.data.train_batch_size == 8


def generate_with_vllm(folder: str) -> list[list[int]]:
    """Greedy answers of a plain vLLM engine to two prompts, in a process of its own."""
    code = (
        "import sys, json\n"
        "from vllm import LLM, SamplingParams\n"
        "llm = LLM(sys.argv[1], dtype='float32', enforce_eager=True, max_model_len=160, kv_cache_memory_bytes=2**27)\n"
        "prompts = [{'prompt_token_ids': list(range(20, 50))}, {'prompt_token_ids': list(range(60, 80))}]\n"
        "answers = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))\n"
        "print('ANSWER', json.dumps([list(a.outputs[0].token_ids) for a in answers]))\n"
    )
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    import os

    done = subprocess.run(
        [sys.executable, "-c", code, folder], env=os.environ | environment, capture_output=True, text=True, timeout=200
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    assert lines, done.stdout + done.stderr
    return json.loads(lines[0].removeprefix("ANSWER "))


def test_exported_model_loads_in_transformers_and_vllm(first_run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = str(first_run / "hf")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    AutoTokenizer.from_pretrained(folder)
    expected = []
    for prompt in (list(range(20, 50)), list(range(60, 80))):
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=8, min_new_tokens=8, do_sample=False)
        expected.append(ids[0, len(prompt) :].tolist())
    answers = generate_with_vllm(folder)
    # min_new_tokens bars the end-of-sequence token, ignore_eos does not: compare up to the first one.
    for ours, theirs in zip(expected, answers, strict=True):
        end = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), len(ours))
        assert end == len(ours) or theirs[end] in (model.generation_config.eos_token_id, model.config.eos_token_id)


# -- the same recorded rollouts over every layout ---------------------------------------------------------------------


def replay_worker(payload):
    from megatron.core import parallel_state as mpu

    from remax_megatron.parallel.layout import init_distributed
    from tests.model.test_parity import build_policy, take_update

    device = init_distributed("cpu", 120)
    results = []
    for layout, settings in payload["cases"]:
        policy = build_policy(payload["folder"], layout, device, **settings)
        update = take_update(policy, payload["rows"])
        results.append((layout, settings, update.loss, update.grad_norm, update.metrics["rollout/logprob_diff_max"]))
        mpu.destroy_model_parallel()
    return results


def test_recorded_rollouts_give_the_same_loss_and_gradient_on_every_layout(first_run, demo_policy):
    records = [json.loads(line) for line in (first_run / "rollouts" / "1.jsonl").read_text().splitlines()]
    rows = [
        Row(
            prompt_ids=tuple(record["prompt"]["token_ids"]),
            response_ids=sample["token_ids"],
            advantages=[0.5 + i - record["greedy"]["reward"]] * len(sample["token_ids"]),
            rollout_logprobs=sample["logprobs"],
        )
        for record in records
        for i, sample in enumerate(record["samples"])
    ]
    assert len(rows) == 32
    packed, single = {"budget": 512}, {"rows_per_batch": 1}
    cases = {
        1: [((1, 1, None, False), packed), ((1, 1, None, False), single)],
        2: [
            (layout, how)
            for layout in ((2, 1, None, False), (2, 1, None, True), (1, 2, None, False), (1, 1, None, False))
            for how in (packed, single)
        ],
        4: [((2, 2, None, False), packed), ((2, 2, None, True), single), ((1, 2, None, False), packed)],
    }
    results = []
    for world, some in cases.items():
        payload = {"folder": demo_policy, "rows": rows, "cases": some}
        results += run_ranks("tests.run.test_end_to_end:replay_worker", world, payload)[0]
    _, _, loss, norm, _ = results[0]
    for layout, settings, one_loss, one_norm, mismatch in results:
        assert one_loss == pytest.approx(loss, rel=1e-5), (layout, settings)
        assert one_norm == pytest.approx(norm, rel=1e-5), (layout, settings)
        assert mismatch <= 1e-4
