"""The head's Triton kernels against its plain formulas: values, gradients, ranks, and how many kernels a pass has.

    TRITON_INTERPRET=1 python -m pytest tests/algorithm/test_logprob_triton.py

On a machine with a GPU they run there, compiled, without the variable; elsewhere in Triton's interpreter. It has to be
asked for before Triton is first imported, thus not by a test; without either, or without Triton, the tests are skipped.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from remax_megatron.algorithm import logprob
from remax_megatron.algorithm.logprob import can_fuse, head_full_kl, head_logprob
from tests import ROOT
from tests.algorithm.test_logprob import gradients, inputs, plain
from tests.ranks import run_ranks

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
with_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="Triton is not installed: it comes with CUDA builds"
)
with_kernels = pytest.mark.skipif(
    find_spec("triton") is None or (DEVICE == "cpu" and not INTERPRETED),
    reason="needs Triton and a GPU, or TRITON_INTERPRET=1",
)
# positions, hidden size, vocabulary, rows of the head, positions per tile: one of each, fewer than a block of 32
# columns, several blocks with a last one in part, several tiles with last ones in part, a head that is mostly padding.
SHAPES = [(1, 1, 1, 1, 1), (3, 5, 7, 16, 2), (9, 16, 100, 100, 1024), (13, 24, 300, 400, 5), (4, 8, 20, 300, 3)]


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    """Within `tolerance` of the largest element, or of 1: what cancels where all are 0. float32 rounds by 6e-8."""
    largest = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * max(1.0, largest))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 128 columns, of which a kernel takes 32 at a time."""
    from remax_megatron.algorithm import logprob_triton

    monkeypatch.setattr(logprob_triton, "_BLOCK", 32)
    for name in ("_TILE_BYTES_CPU", "_TILE_BYTES_GPU"):
        monkeypatch.setattr(logprob, name, 1024 * 128 * 4)


@with_kernels
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape: tuple[int, ...], temperature: float, small_blocks: None) -> None:
    num, hidden, vocab, rows, chunk_size = shape
    hidden_RH, weight_VH, target_R, *coefficients = (
        x.to(DEVICE) for x in inputs(num, hidden, rows, vocab, seed=num, scale=0.5)
    )
    weight_VH[vocab:] = 1e4  # padding, which would take all the probability
    found = []
    for fused in (True, False):

        def score(h: Tensor, w: Tensor, fused: bool = fused) -> tuple[Tensor, Tensor]:
            options = {"vocab_size": vocab, "temperature": temperature, "chunk_size": chunk_size}
            return head_logprob(h, w, target_R, **options, fused=fused)

        found.append([*score(hidden_RH, weight_VH), *gradients(score, hidden_RH, weight_VH, *coefficients)])
    for mine, expected in zip(*found, strict=True):
        assert_close(mine, expected)
    assert not found[0][3][vocab:].any()


@with_kernels
@pytest.mark.parametrize("frozen", ["hidden", "weight", "nothing"])
@pytest.mark.parametrize("what", ["logprob", "entropy"])
def test_gradient_of_one_value_and_of_one_input(what: str, frozen: str, small_blocks: None) -> None:
    hidden_RH, weight_VH, target_R, coefficient_R, _ = (x.to(DEVICE) for x in inputs(5, 8, 80, 70))
    found = []
    for score in (lambda h, w: head_logprob(h, w, target_R, vocab_size=70, fused=True), None):
        hidden = hidden_RH.clone().requires_grad_(frozen != "hidden")
        weight = weight_VH.clone().requires_grad_(frozen != "weight")
        values = score(hidden, weight) if score else plain(hidden, weight, target_R, 70, 1.0)
        (coefficient_R * values[what == "entropy"]).sum().backward()
        found.append([x.grad for x in (hidden, weight) if x.requires_grad])
    for mine, expected in zip(*found, strict=True):
        assert_close(mine, expected)


@with_kernels
def test_large_logits_and_not_a_number() -> None:
    # Logits 0 and 1000: p = 0 and 1 in float32, entropy 0; all finite, gradient 0 where nothing can move.
    weight_VH = torch.tensor([[0.0], [1000.0]], device=DEVICE)
    hidden_RH = torch.ones(2, 1, device=DEVICE, requires_grad=True)
    target_R = torch.tensor([0, 1], device=DEVICE)
    logprob_R, entropy_R = head_logprob(hidden_RH, weight_VH, target_R, vocab_size=2, fused=True)
    assert logprob_R.tolist() == [-1000.0, 0.0] and entropy_R.tolist() == [0.0, 0.0]
    (logprob_R.sum() + entropy_R.sum()).backward()
    assert hidden_RH.grad is not None and hidden_RH.grad.flatten().tolist() == [-1000.0, 0.0]

    broken_RH = torch.tensor([[1.0], [float("nan")]], device=DEVICE)
    logprob_R, entropy_R = head_logprob(broken_RH, weight_VH, target_R, vocab_size=2, fused=True)
    assert logprob_R.isnan().tolist() == entropy_R.isnan().tolist() == [False, True]


@with_kernels
def test_zero_scored_positions() -> None:
    hidden_RH, weight_VH, target_R, *coefficients = (x.to(DEVICE) for x in inputs(0, 8, 12, 7))

    def score(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return head_logprob(h, w, target_R, vocab_size=7, fused=True)

    assert [tuple(values.shape) for values in score(hidden_RH, weight_VH)] == [(0,), (0,)]
    grad_hidden, grad_weight = gradients(score, hidden_RH, weight_VH, *coefficients)
    assert grad_hidden.shape == (0, 8) and not grad_weight.any() and grad_weight.shape == (12, 8)


@with_kernels
def test_bfloat16(small_blocks: None) -> None:
    """Logits up to 22: values as float32 has them, gradients as bfloat16 has them."""
    hidden_RH, weight_VH, _, *coefficients = inputs(16, 256, 600, 600)
    low = (hidden_RH.bfloat16().to(DEVICE), (0.28 * weight_VH).bfloat16().to(DEVICE))
    p_RV = torch.softmax(low[0].float() @ low[1].float().T, dim=-1).cpu()
    target_R = torch.multinomial(p_RV, 1, generator=torch.Generator().manual_seed(0)).squeeze(1).to(DEVICE)
    coefficients = [c.to(DEVICE) for c in coefficients]

    def score(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return head_logprob(h, w, target_R, vocab_size=600, temperature=0.9, chunk_size=7, fused=True)

    exact = plain(low[0].double(), low[1].double(), target_R, 600, 0.9)
    for actual, expected in zip(score(*low), exact, strict=True):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=2e-5)
    reference = gradients(
        lambda h, w: plain(h, w, target_R, 600, 0.9),
        low[0].double(),
        low[1].double(),
        *(c.double() for c in coefficients),
    )
    for mine, expected in zip(gradients(score, *low, *coefficients), reference, strict=True):
        assert mine.dtype == torch.bfloat16
        error = (mine.double() - expected).norm() / expected.norm()
        assert error < 5e-3, error  # bfloat16's unit roundoff is 2^-8 = 3.9e-3


@with_kernels
@pytest.mark.parametrize("temperature", [1.0, 1.3])
def test_full_kl_and_its_gradients(temperature: float, small_blocks: None) -> None:
    hidden_RH, weight_VH, _, coefficient_R, _ = (x.to(DEVICE) for x in inputs(7, 16, 320, 300, scale=0.5))
    ref_hidden_RH, ref_weight_VH, *_ = (x.to(DEVICE) for x in inputs(7, 24, 320, 300, seed=1, scale=0.5))
    weight_VH[300:] = ref_weight_VH[300:] = 1e4
    found = []
    for fused in (True, False):
        leaves = [hidden_RH.clone().requires_grad_(), weight_VH.clone().requires_grad_()]
        options = {"vocab_size": 300, "temperature": temperature, "chunk_size": 4, "fused": fused}
        kl_R = head_full_kl(*leaves, ref_hidden_RH, ref_weight_VH, **options)
        found.append([kl_R.detach(), *torch.autograd.grad(kl_R, leaves, coefficient_R)])
    for mine, expected in zip(*found, strict=True):
        assert_close(mine, expected, 5e-6)  # differences of logits up to 10, which float32 keeps to 1e-6


@with_kernels
def test_full_kl_of_the_reference_itself_is_zero() -> None:
    hidden_RH, weight_VH, *_ = (x.to(DEVICE) for x in inputs(5, 16, 40, 33))
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight = (x.to(dtype).clone().requires_grad_() for x in (hidden_RH, weight_VH))
        kl_R = head_full_kl(hidden, weight, hidden.detach(), weight.detach(), vocab_size=33, chunk_size=2, fused=True)
        assert kl_R.tolist() == [0.0] * 5
        kl_R.sum().backward()
        assert not hidden.grad.any() and not weight.grad.any() and hidden.grad.dtype == dtype


def all_of(hidden_RH, weight_VH, target_R, coefficients, ref_weight_VH, options) -> list[Tensor]:
    """Log-probabilities, entropies and their gradients; then the KL to half the hidden states, and its gradients."""
    leaves = [hidden_RH.clone().requires_grad_(), weight_VH.clone().requires_grad_()]
    values = head_logprob(*leaves, target_R, **options)
    kl_R = head_full_kl(*leaves, hidden_RH / 2, ref_weight_VH, **options)
    results = [*values, *torch.autograd.grad(values, leaves, coefficients)]
    results += [kl_R, *torch.autograd.grad(kl_R, leaves, coefficients[0])]
    return [x.detach() for x in results]


def worker(cases: list) -> list[list[Tensor]]:
    """One rank: of each case `all_of` its rows of the head."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    results = []
    for (hidden_RH, weight_VH, target_R, *coefficients), vocab in cases:
        mine, ref_mine = (w.chunk(size)[rank].contiguous() for w in (weight_VH, weight_VH.flip(1)))
        options = {"vocab_size": vocab, "temperature": 1.3, "chunk_size": 4, "group": dist.group.WORLD, "fused": True}
        results.append(all_of(hidden_RH, mine, target_R, coefficients, ref_mine, options))
    dist.barrier()
    dist.destroy_process_group()
    return results


@with_kernels
@pytest.mark.skipif(not INTERPRETED, reason="ranks have no GPU of their own: needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("world_size", [2, 4])
def test_vocabulary_cut_over_ranks(world_size: int) -> None:
    # 256 rows: 211 tokens leave the last rank with padding in part, 100 tokens at least one with padding only; a target
    # lies with one rank and outside of all others; and no position at all.
    cases = [(inputs(5, 16, 256, vocab, seed=vocab), vocab) for vocab in (211, 100)]
    cases.append((inputs(0, 16, 256, 211), 211))
    preload = ("remax_megatron.algorithm.logprob_triton",)
    ranks = run_ranks("tests.algorithm.test_logprob_triton:worker", world_size, cases, timeout_s=120, preload=preload)
    for i, ((hidden_RH, weight_VH, target_R, *coefficients), vocab) in enumerate(cases):
        options = {"vocab_size": vocab, "temperature": 1.3, "fused": False}
        expected = all_of(hidden_RH, weight_VH, target_R, coefficients, weight_VH.flip(1), options)
        for place, value in enumerate(expected):
            parts = [rank[i][place] for rank in ranks]
            if place in (0, 1, 4):  # values: bitwise the same on all ranks
                assert all(torch.equal(part, parts[0]) for part in parts)
                found = parts[0]
            else:  # gradients: of the hidden states a part per rank, of the head its rows
                found = sum(parts) if place in (2, 5) else torch.cat(parts)
            assert_close(found, value, 5e-6 if place >= 4 else 1e-6)


class Kernels(TorchDispatchMode):
    """Counts the operators that write: views and `empty` are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        library, name = function._schema.name.split("::")
        if library != "prim" and not function.is_view and "empty" not in name and name != "detach":
            self.counts[name] += 1
        return outputs


@with_triton
def test_kernels_of_a_forward_pass_on_a_gpu() -> None:
    """The 7B preset: a quarter of the rows of its head, 24,000 positions; fake tensors, so nothing is launched."""
    with FakeTensorMode(), Kernels() as kernels, torch.no_grad():
        hidden_RH = torch.empty(24000, 3584, dtype=torch.bfloat16, device="cuda")
        weight_VH = torch.empty(152064 // 4, 3584, dtype=torch.bfloat16, device="cuda")
        target_R = torch.empty(24000, dtype=torch.int64, device="cuda")
        logprob_R, entropy_R = head_logprob(hidden_RH, weight_VH, target_R, vocab_size=151665, temperature=0.9)
    assert logprob_R.shape == entropy_R.shape == (24000,) and logprob_R.device.type == "cuda"
    # 1024 positions times 16,384 tokens: 24 x 3 tiles, of each a product and one kernel.
    assert kernels.counts["mm"] == kernels.counts["add_tile"] == 72
    assert kernels.counts.total() <= 2 * 72 + 25, kernels.counts


@with_triton
def test_kernels_of_a_backward_pass() -> None:
    """Four per tile, and two for each cut of the head. On a fake CPU, because autograd asks a fake GPU for a driver."""
    with FakeTensorMode():
        leaves = [torch.empty(4096, 64, requires_grad=True), torch.empty(8192, 64, requires_grad=True)]
        values = head_logprob(*leaves, torch.empty(4096, dtype=torch.int64), vocab_size=8000, fused=True)
        with Kernels() as kernels:
            torch.autograd.grad(values, leaves, [torch.empty(4096)] * 2)
    # 1024 positions times 2048 tokens: 4 x 4 tiles.
    expected = {"mm": 16, "tile_gradient": 16, "add_product": 32, "copy_": 4, "zero_": 4}
    assert {name: kernels.counts[name] for name in expected} == expected
    assert kernels.counts.total() - sum(expected.values()) <= 12, kernels.counts


@with_kernels
def test_operators_keep_their_schemas() -> None:
    """They write where they say, and only there; fake tensors go the same way."""
    from remax_megatron.algorithm import logprob_triton as kernels

    logits, ref_logits, gradient = torch.randn(3, 4, 40, device=DEVICE)
    target, factors = torch.tensor([0, 9, 39, 77], device=DEVICE), torch.rand(6, 5, device=DEVICE)[:, 1:]
    calls = [
        (kernels.add_tile, (logits, target, factors[:4], 8, 0.9)),
        (kernels.tile_gradient, (logits, target, factors[:4], 8, 0.9, gradient)),
        (kernels.add_kl_tile, (logits, ref_logits, factors[:5], 0.9)),
        (kernels.kl_tile_gradient, (logits, ref_logits, factors[:3], 0.9, gradient)),
        (kernels.add_product, (gradient, torch.randn(4, 3, device=DEVICE), torch.randn(3, 40, device=DEVICE))),
    ]
    for operator, arguments in calls:
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def compile_for_an_h100() -> None:
    """In a process without the interpreter: the kernels' code for compute capability 9.0, as a 7B head needs it."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from remax_megatron.algorithm import logprob_triton as kernels

    pointers = {"target": "*i64", "gradient": "*bf16", "logits": "*fp32", "ref_logits": "*fp32"}
    pointers |= {"sums": "*fp32", "factors": "*fp32"}
    others = {"width": "i32", "stride": "i32", "first": "i32", "inverse": "fp32", "BLOCK": "constexpr"}
    for name in ("_add_tile_kernel", "_tile_gradient_kernel", "_add_kl_tile_kernel", "_kl_tile_gradient_kernel"):
        kernel = getattr(kernels, name)
        signature = {argument: (pointers | others)[argument] for argument in kernel.arg_names}
        aligned = [i for i, argument in enumerate(signature) if argument in {*pointers, "width", "stride"}]
        source = ASTSource(
            fn=kernel,
            signature=signature,
            constexprs={(len(signature) - 1,): kernels._BLOCK},
            attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
        )
        code = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": kernels._NUM_WARPS}).asm
        assert len(code["cubin"]) > 0
        assert "ld.global.v4" in code["ptx"], f"{name} reads its tile in single words"


@with_triton
def test_kernels_compile_for_an_h100(tmp_path) -> None:
    """Without a GPU, by the assembler that Triton brings along: the interpreter takes what the compiler refuses."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    program = "from tests.algorithm.test_logprob_triton import compile_for_an_h100 as call; call()"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr


def test_who_uses_the_kernels() -> None:
    assert not can_fuse(torch.device("cpu"))
    assert can_fuse(torch.device("cuda")) == (find_spec("triton") is not None)
    program = "import sys, remax_megatron.algorithm.logprob; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=120)
