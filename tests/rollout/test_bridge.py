"""The resharding bridge into a real vLLM engine, and the canary: what it lets pass and what it must catch."""

from __future__ import annotations

import pytest
import torch

from tests.ranks import run_ranks
from tests.small_models import YARN, make_qwen2, make_qwen3

pytestmark = pytest.mark.vllm_cpu

END, PROMPTS, TEMPERATURE = 1, 10, 0.8


class Tokenizer:
    """Just what the engine asks of a tokenizer; the canary never reads text."""

    eos_token_id = END

    def decode(self, ids, **_):
        return " ".join(map(str, ids))


def build(folder: str, device, *, tp=1, pp=1, bucket_bytes=2**20, **engine_options):
    """A float32 policy and the engine for it on `device`, the bridge between them, and prompts. Collective."""
    from remax_megatron.rollout.bridge import Bridge

    policy = build_policy(folder, device, tp=tp, pp=pp)
    engine, prompts = build_engine(folder, device, **engine_options)
    bridge = Bridge(policy, engine, prompts, dtype="float32", bucket_bytes=bucket_bytes, threshold=None)
    return policy, engine, bridge, prompts


def build_policy(folder: str, device, *, tp=1, pp=1):
    from remax_megatron.config.schema import Actor
    from remax_megatron.model_facts import ModelFacts
    from remax_megatron.parallel.layout import init_model_parallel
    from remax_megatron.policy.policy import Policy
    from remax_megatron.policy.settings import PolicySettings

    layout = init_model_parallel(device, tp=tp, pp=pp, vpp=None, seed=1)
    actor = Actor()
    actor.megatron.dtype = "float32"
    actor.ppo_max_token_len_per_gpu = 512
    actor.optim.lr = 1e-2
    facts = ModelFacts.from_folder(folder)
    return Policy(facts, layout, PolicySettings(actor, TEMPERATURE), folder)


def build_engine(folder: str, device, *, vllm_tp=1, dtype="float32", max_response_length=24, **rollout_settings):
    """(the engine, PROMPTS prompts of 40 tokens). Collective."""
    from remax_megatron.config.schema import RolloutConfig, ValKwargs
    from remax_megatron.model_facts import ModelFacts
    from remax_megatron.rollout.engine import Engine
    from remax_megatron.types import Prompt

    rollout = RolloutConfig(
        n=2, temperature=TEMPERATURE, tensor_model_parallel_size=vllm_tp, kv_cache_gib=0.1, **rollout_settings
    )
    rollout.val_kwargs = ValKwargs(n=3, do_sample=True, temperature=1.5)
    engine = Engine(
        folder,
        Tokenizer(),
        rollout,
        dtype=dtype,
        max_prompt_length=64,
        max_response_length=max_response_length,
        seed=3,
        device=device,
        tied_embeddings=ModelFacts.from_folder(folder).tied_embeddings,
        stop_token_ids=[END],
    )
    prompts = [Prompt(i, tuple((7 * i + 3 * j) % 200 + 2 for j in range(40)), "x", "y") for i in range(PROMPTS)]
    return engine, prompts


def train(policy, engine, bridge, prompts, step: int) -> None:
    """One update that moves every weight (rank 0's rollouts for all)."""
    from remax_megatron.algorithm.aggregation import weigh_rows
    from remax_megatron.types import Row

    rows = [
        Row(r.prompt.token_ids, s.token_ids, [1.0 - 2.0 * i] * len(s.token_ids), s.logprobs)
        for r in engine.rollout(prompts, step=step)
        for i, s in enumerate(r.samples)
    ]
    weigh_rows(rows, "token-mean")
    policy.update(rows)


class Corrupting:
    """A weight stream that changes one tensor by one percent on its way."""

    def __init__(self, stream, changed="model.layers.2.mlp.up_proj.weight"):
        self.stream, self.num_bytes, self.changed = stream, stream.num_bytes, changed

    def __iter__(self):
        for name, tensor in self.stream:
            yield name, tensor * 1.01 if name == self.changed else tensor


def faults_worker(folder: str) -> dict[str, str]:
    """Each fault in turn, in one engine: what the canary says."""
    from remax_megatron.parallel.layout import init_distributed
    from remax_megatron.rollout.bridge import CanaryError

    policy, engine, bridge, prompts = build(folder, init_distributed("cpu", 120))
    said: dict[str, str] = {}

    def sync(name: str) -> None:
        try:
            report = bridge.sync()
            said[name] = f"passed: {report.canary_max:.1e} {report.num_bytes}"
        except CanaryError as error:
            said[name] = str(error)

    sync("first")
    for step, fault in enumerate(("none", "tied head", "stale cache", "one tensor", "none again")):
        train(policy, engine, bridge, prompts, step)
        keep = engine._repack_head, engine._llm.reset_prefix_cache, bridge._stream
        if fault == "tied head":
            engine._repack_head = False
        if fault == "stale cache":
            engine._llm.reset_prefix_cache = lambda: True
        if fault == "one tensor":
            bridge._stream = Corrupting(bridge._stream)
        sync(fault)
        engine._repack_head, engine._llm.reset_prefix_cache, bridge._stream = keep
    return said


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> str:
    return str(make_qwen2(tmp_path_factory.mktemp("bridge") / "tied", tied=True))


@pytest.fixture(scope="module")
def untied(tmp_path_factory) -> str:
    return str(make_qwen2(tmp_path_factory.mktemp("bridge") / "untied", tied=False))


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory) -> str:
    """Tied, with YaRN, its heads together twice as wide as its hidden states."""
    rope = YARN | {"original_max_position_embeddings": 32}
    return str(make_qwen3(tmp_path_factory.mktemp("bridge") / "qwen3", tied=True, rope=rope))


@pytest.fixture(scope="module")
def yarn(tmp_path_factory) -> str:
    rope = YARN | {"original_max_position_embeddings": 32}
    return str(make_qwen2(tmp_path_factory.mktemp("bridge") / "yarn", tied=False, rope=rope))


def test_canary_passes_good_syncs_and_catches_each_fault(tied):
    said = run_ranks("tests.rollout.test_bridge:faults_worker", 1, tied)[0]
    for name in ("first", "none", "none again"):
        assert said[name].startswith("passed"), (name, said[name])
    for name in ("tied head", "stale cache", "one tensor"):
        assert "does not compute with the policy's weights" in said[name], (name, said[name])
        assert "limit 0.0001 (actor_rollout_ref.rollout.canary_threshold); worst at scored position" in said[name]
        assert "policy -" in said[name] and "engine -" in said[name]


def reshard_worker(payload):
    """Two syncs, rollouts and validations under one layout: canaries, weights as streamed, and tokens answered."""
    from remax_megatron.config.schema import ValKwargs
    from remax_megatron.parallel.layout import init_distributed

    folder, layout = payload
    policy, engine, bridge, prompts = build(folder, init_distributed("cpu", 120), **layout)
    reports = [bridge.sync()]
    streamed = {name: tensor.clone() for name, tensor in policy.weight_stream(torch.float32, 3000)}
    rollouts = engine.rollout(prompts, step=5)
    few = prompts[:4]
    validations = [tokens_of(engine.validation(some)) for some in (few, few[::-1])]
    engine.config.val_kwargs = ValKwargs()
    validations.append(tokens_of(engine.validation(few)))
    train(policy, engine, bridge, prompts, 0)
    reports.append(bridge.sync())
    tokens = tokens_of([r.completions for r in rollouts])
    versions = {s.weight_version for r in rollouts for s in (r.greedy, *r.samples)}
    return [(r.canary_max, r.num_bytes, r.weight_version) for r in reports], streamed, tokens, validations, versions


def tokens_of(answers):
    return [[answer.token_ids for answer in group] for group in answers]


TP2, PP2 = {"tp": 2, "vllm_tp": 1}, {"pp": 2, "vllm_tp": 2, "bucket_bytes": 3000}


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        pytest.param("tied", TP2, marks=pytest.mark.slow),
        ("tied", PP2),
        ("untied", TP2),
        pytest.param("untied", PP2, marks=pytest.mark.slow),
        pytest.param("yarn", TP2, marks=pytest.mark.slow),
        ("qwen3", PP2),
    ],
)
def test_resharding_is_exact_and_rollouts_do_not_depend_on_the_layout(model, layout, request):
    from safetensors.torch import load_file

    folder = request.getfixturevalue(model)
    results = run_ranks("tests.rollout.test_bridge:reshard_worker", 2, (folder, layout))
    saved = load_file(f"{folder}/model.safetensors")
    for reports, streamed, tokens, (sampled, backwards, greedy), versions in results:
        assert all(largest <= 1e-4 for largest, _, _ in reports)
        assert [version for _, _, version in reports] == [0, 1]
        assert reports[0][1] == sum(t.numel() * 4 for t in saved.values())
        assert streamed.keys() == saved.keys()
        assert all(torch.equal(streamed[name], saved[name]) for name in saved)
        assert versions == {0}
        assert tokens == results[0][2]  # same seeds, same prompts: the same answers on every rank
        assert sampled == backwards[::-1] == results[0][3][0]  # the place in the batch does not matter either
        assert all(len({*map(tuple, group)}) == 3 for group in sampled)
        assert greedy == [group[:1] for group in tokens[:4]]


def test_memory_that_stays_while_the_engine_sleeps_is_bounded(monkeypatch, caplog):
    """10 GiB used, 4 of them torch's own: 6 stay. More than 0.3 GiB over the second sleep is said, once per growth."""
    from types import SimpleNamespace

    from remax_megatron.rollout.engine import Engine

    gib = 2**30
    segments = [{"segment_pool_id": (0, 0), "total_size": 4 * gib}, {"segment_pool_id": (0, 1), "total_size": 9 * gib}]
    engine = object.__new__(Engine)
    engine.device, engine._num_sleeps, engine._asleep_limit = torch.device("cuda", 0), 0, 0.0
    engine._sleeps = True
    waits: list[str] = []
    engine._llm = SimpleNamespace(sleep=lambda level: waits.append(f"sleep {level}"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda **_: segments)
    warned = []
    for used in (10.0, 11.0, 11.2, 11.4, 11.5, 11.8):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, used=used: (int((80 - used) * gib), 80 * gib))
        caplog.clear()
        engine.sleep()
        assert engine.asleep_bytes == pytest.approx((used - 4) * gib, abs=2)
        warned.append(len(caplog.records))
    assert warned == [0, 0, 0, 1, 0, 1]
    assert waits == ["synchronize", "sleep 2"] * 6
    engine.close()
    assert waits[-1] == "synchronize"
