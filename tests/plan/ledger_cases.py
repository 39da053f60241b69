"""Settings that took no part in the making of the ledger's formulas, and the bytes that were counted for them.

The counts are those of tests/fake_cuda/test_ledger.py, which makes them anew on fake CUDA tensors;
tests/plan/test_ledger.py takes them from here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from remax_megatron.config.load import load_config
from remax_megatron.config.schema import Config
from remax_megatron.plan.ledger import Ledger, MicroBatch, Stack, ledger
from tests.stand_ins.fake_cuda.models import FACTS

MEGATRON = "actor_rollout_ref.actor.megatron"
RECOMPUTE = f"{MEGATRON}.override_transformer_config.recompute"


@dataclass(frozen=True)
class Case:
    """A model and how it is trained; `counted` are the most bytes alive in an update, on a rank of each stage."""

    model: str
    layers: str
    row: tuple[int, int]  # tokens of a prompt and an answer
    tokens: int  # of a micro-batch
    counted: tuple[int, ...]
    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    dp: int = 1
    sequence_parallel: bool = False
    recompute: str = "none"
    method: str | None = None
    num_layers: int | None = None
    dtype: str = "bfloat16"
    share_prompts: bool = False

    @property
    def num_microbatches(self) -> int:
        """Enough to fill the pipeline."""
        return self.pp if self.vpp is None else 2 * self.pp

    @property
    def config(self) -> Config:
        overrides = {
            f"{MEGATRON}.layers": self.layers,
            f"{MEGATRON}.dtype": self.dtype,
            f"{MEGATRON}.tensor_model_parallel_size": self.tp,
            f"{MEGATRON}.pipeline_model_parallel_size": self.pp,
            f"{MEGATRON}.virtual_pipeline_model_parallel_size": self.vpp,
            f"{MEGATRON}.sequence_parallel": self.sequence_parallel,
            f"{RECOMPUTE}_granularity": self.recompute,
            f"{RECOMPUTE}_method": self.method,
            f"{RECOMPUTE}_num_layers": self.num_layers,
            "actor_rollout_ref.actor.share_prompts": self.share_prompts,
            "actor_rollout_ref.actor.ppo_max_token_len_per_gpu": self.tokens,
            "actor_rollout_ref.rollout.tensor_model_parallel_size": 1,
            "trainer.n_gpus_per_node": self.world_size,
        }
        texts = (f"{key}={'null' if value is None else value}" for key, value in overrides.items())
        return load_config("qwen2_5_7b", list(texts)).config

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def batch(self) -> MicroBatch:
        """A micro-batch of whole rows."""
        num_rows = self.tokens // sum(self.row)
        return MicroBatch(num_rows * sum(self.row), num_rows * self.row[1], self.num_microbatches)

    @property
    def stack(self) -> Stack:
        te = self.layers == "transformer_engine"
        flexible = self.share_prompts or self.dtype == "float32"
        return Stack(self.layers, "flex" if flexible else "transformer_engine" if te else "varlen", fused_adam=te)

    def ledgers(self) -> Iterator[Ledger]:
        """Those of all stages."""
        for stage in range(self.pp):
            yield ledger(
                self.config, FACTS[self.model], self.world_size, batch=self.batch, stage=stage, stack=self.stack
            )

    def __str__(self) -> str:
        sizes = {"TP": self.tp, "PP": self.pp, "VPP": self.vpp or 1, "DP": self.dp}
        words = [f"{name} {size}" for name, size in sizes.items() if size > 1]
        words += ["SP"] * self.sequence_parallel + ["shared prompts"] * self.share_prompts
        words += ["float32"] * (self.dtype == "float32")
        recompute = " ".join(str(part) for part in (self.recompute, self.method, self.num_layers) if part is not None)
        return f"{self.model.upper()}, {' '.join(words) or 'one GPU'}, {self.tokens} tokens, {recompute}"


TE = "transformer_engine"
CASES = [
    Case("0.5b", "local", (256, 768), 8192, (17_954_816_512,)),
    Case("1.5b", "local", (512, 1536), 16384, (10_342_675_456,), tp=4, sequence_parallel=True, recompute="selective"),
    Case(
        "1.5b", "local", (512, 1536), 16384, (17_807_078_400,), tp=2, recompute="full", method="uniform", num_layers=4
    ),
    Case("3b", "local", (1024, 1024), 8192, (25_048_796_672, 18_170_326_528), tp=2, pp=2, dp=2, sequence_parallel=True),
    Case(
        "7b",
        "local",
        (1024, 3072),
        12288,
        (34_026_921_984,),
        tp=4,
        dp=2,
        sequence_parallel=True,
        recompute="full",
        method="block",
        num_layers=9,
    ),
    Case(
        "14b",
        "local",
        (512, 1536),
        8192,
        (53_837_726_208, 42_791_331_840, 38_710_398_464, 44_985_442_816),
        tp=2,
        pp=4,
        sequence_parallel=True,
        recompute="selective",
    ),
    Case("32b", "local", (512, 1536), 4096, (45_164_760_576, 45_105_506_816), tp=8, pp=2, sequence_parallel=True),
    Case("0.5b", "local", (512, 512), 8192, (23_548_415_488,), dp=2, dtype="float32"),
    Case("1.5b", "local", (1024, 512), 8192, (45_084_452_352,), share_prompts=True),
    Case("3b", TE, (512, 1536), 12288, (20_106_341_888,), tp=4, dp=2, sequence_parallel=True),
    Case("14b", TE, (1024, 1024), 8192, (59_939_641_344,), tp=4, dp=2, recompute="selective"),
    Case(
        "32b",
        TE,
        (256, 1792),
        6144,
        (75_581_060_608, 75_582_512_128),
        tp=4,
        pp=2,
        sequence_parallel=True,
        recompute="full",
    ),
    Case(
        "3b",
        TE,
        (512, 1536),
        8192,
        (26_539_814_400, 23_883_757_568),
        tp=2,
        pp=2,
        vpp=3,
        sequence_parallel=True,
        recompute="full",
        method="block",
        num_layers=2,
    ),
    Case("1.5b", TE, (1024, 512), 8192, (33_383_613_952,), share_prompts=True, recompute="selective"),
    Case("qwen3-4b", TE, (512, 1536), 8192, (63_818_100_224,), dp=8),
    Case("qwen3-4b", "local", (512, 1536), 8192, (56_581_295_616,), tp=2, sequence_parallel=True),
    Case("qwen3-8b", TE, (512, 1536), 8192, (39_334_490_112,), tp=2, dp=4, sequence_parallel=True, recompute="full"),
    Case("qwen3-8b", "local", (512, 1536), 8192, (39_146_152_448,), tp=4, dp=2, recompute="selective"),
]
