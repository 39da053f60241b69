"""Memory and time of the head's log-probabilities, forward and backward: ours, Megatron-Core's, cut-cross-entropy's.

    python benchmarks/logprob.py [--tokens 8192] [--peer-tokens N] [--hidden 896] [--vocab 152064] [--tp 1 2]
                                 [--repeats 3] [--json FILE] [--peers DIR | --no-peers]

    ours        head_logprob: log-probabilities and entropies, gradients of both
    megatron    hidden @ weight.T, then megatron.core.tensor_parallel.vocab_parallel_cross_entropy: no entropies
    cce         cut-cross-entropy's torch_compile, TP 1 only (it knows no other): no entropies, bfloat16 logits

All in bfloat16 on the CPU, one thread per rank, gloo, random inputs (logits up to about 25), every case in processes
of its own. --peer-tokens gives Megatron fewer tokens, where its logits do not fit; its numbers are then scaled up. The
gradient of the hidden states is left as each rank's part on both sides. --peers names a folder with
benchmarks/peers/requirements-logprob.txt installed; it is made there when missing. Of the first call, after a small
one: the memory; of the next --repeats: the time. Columns, in MiB, of the rank that needs most:

    peak        largest anonymous memory during the call, sampled every 2 ms, above that right before: all but inputs
    gradients   of it, what the call returns: the gradients of head and hidden states in bfloat16
    rest        peak - gradients
    s, cpu s    seconds, forward + backward, median of --repeats (- where only memory was asked), on the clock and as
                the processor counts them for this process: the latter bears other work on the machine
    error       of the log-probabilities of 8 positions against float64

RESULT: memory_ratio is ours over Megatron's `peak` (the one with gradients: the worse one), time_ratio that of `s`,
cpu_time_ratio that of `cpu s`, the worst over --tp. memory_growth_kib is what one more token adds to our `rest` from
2048 to 16384 tokens: the gradient of its hidden state in float32 has 4 H bytes, and nothing else grows (its logits,
in float32, have 4 V).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from common import ROOT, finish, machine

SAMPLE_SECONDS, TIMEOUT_S, WARM_TOKENS, CHECKED = 0.002, 1800, 64, 8
GROWTH_TOKENS = (2048, 16384)
PEER_PINS = ROOT / "benchmarks/peers/requirements-logprob.txt"
Found = dict[str, float | str]


def anonymous_bytes() -> int:
    """RssAnon of this process, from the cheapest file that has it (proc(5): resident minus shared, in pages)."""
    with open("/proc/self/statm") as statm:
        fields = statm.read().split()
    return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGE_SIZE")


def peak_bytes(call: Callable[[], object]) -> int:
    """How far the anonymous memory rises during `call`."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = highest = anonymous_bytes()
    stop = threading.Event()

    def sample() -> None:
        nonlocal highest
        while not stop.wait(SAMPLE_SECONDS):
            highest = max(highest, anonymous_bytes())

    thread = threading.Thread(target=sample)
    thread.start()
    call()
    stop.set()
    thread.join()
    return max(highest, anonymous_bytes()) - before


def cut_cross_entropy(peers: str) -> Callable:
    """Its torch_compile function. The package imports Triton wherever it does not find itself on macOS, and there is
    none on a CPU; the function itself needs none."""
    sys.path.insert(0, peers)
    system, platform.system = platform.system, lambda: "Darwin"
    try:
        from cut_cross_entropy.torch_compile import torch_compile_linear_cross_entropy
    finally:
        platform.system = system
    return torch_compile_linear_cross_entropy


def one_case(case: dict) -> None:
    """In a rank's process: print what `case` costs as one JSON line."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    tp = dist.get_world_size()
    generator = torch.Generator().manual_seed(0)
    shape = (case["tokens"], case["hidden"])
    hidden_TH = torch.randn(*shape, generator=generator).bfloat16().requires_grad_()
    target_T = torch.randint(0, case["vocab"], shape[:1], generator=generator)
    rows = case["vocab"] // tp
    weight_VH = torch.empty(rows, case["hidden"], dtype=torch.bfloat16).normal_(0, 0.15, generator=generator)
    weight_VH.requires_grad_()
    coefficient_T = torch.randn(shape[0], generator=generator) / shape[0]

    if case["who"] == "ours":
        from remax_megatron.algorithm.logprob import head_logprob

        def score(hidden_RH, target_R):
            return head_logprob(hidden_RH, weight_VH, target_R, vocab_size=case["vocab"], group=dist.group.WORLD)

    elif case["who"] == "megatron":
        from megatron.core import parallel_state, tensor_parallel

        parallel_state.initialize_model_parallel(tp)

        def score(hidden_RH, target_R):
            logits = hidden_RH.unsqueeze(1) @ weight_VH.T
            return -tensor_parallel.vocab_parallel_cross_entropy(logits, target_R.unsqueeze(1)).squeeze(1), None

    else:
        function = cut_cross_entropy(case["peers"])

        def score(hidden_RH, target_R):
            return -function(hidden_RH, weight_VH, target_R, reduction="none"), None

    def call(tokens: int = shape[0]) -> torch.Tensor:
        hidden_TH.grad = weight_VH.grad = None
        logprob_R, entropy_R = score(hidden_TH[:tokens], target_T[:tokens])
        loss = (coefficient_T[:tokens] * logprob_R).sum()
        if entropy_R is not None:
            loss = loss - 0.01 * entropy_R.mean()
        loss.backward()
        return logprob_R.detach()

    call(WARM_TOKENS)
    hidden_TH.grad = weight_VH.grad = None
    dist.barrier()
    found: Found = {"peak": peak_bytes(call) / 2**20}
    found["gradients"] = (hidden_TH.numel() + weight_VH.numel()) * 2 / 2**20
    found["rest"] = found["peak"] - found["gradients"]
    seconds, cpu_seconds = [], []
    for _ in range(case["repeats"]):
        dist.barrier()
        started, cpu_started = time.perf_counter(), time.process_time()
        logprob_T = call()
        seconds.append(time.perf_counter() - started)
        cpu_seconds.append(time.process_time() - cpu_started)
    if seconds:
        found["s"], found["cpu s"] = statistics.median(seconds), statistics.median(cpu_seconds)
        if tp == 1:
            with torch.no_grad():
                parts = [hidden_TH[:CHECKED].double() @ part.double().T for part in weight_VH.split(4096)]
                exact = torch.cat(parts, dim=1).log_softmax(dim=-1).gather(1, target_T[:CHECKED].unsqueeze(1))
            found["error"] = (logprob_T[:CHECKED].double() - exact.squeeze(1)).abs().max().item()
    print(json.dumps(found), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def run_case(case: dict, tp: int) -> Found:
    """Start the ranks of a case; of every measure the largest of them. {"error": ...} when a peer fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(tp):
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "RANK": str(rank),
            "WORLD_SIZE": str(tp),
        }
        command = [sys.executable, __file__, "--case", json.dumps(case)]
        ranks.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    try:
        outputs = [process.communicate(timeout=TIMEOUT_S) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    for process, (_, errors) in zip(ranks, outputs, strict=True):
        if process.returncode != 0:
            if case["who"] == "ours":
                raise RuntimeError(f"exit code {process.returncode} of {case}\n{errors}")
            return {"failed": (errors.strip().splitlines() or [f"exit code {process.returncode}"])[-1]}
    found = [json.loads(output.strip().splitlines()[-1]) for output, _ in outputs]
    return {name: max(rank[name] for rank in found) for name in found[0]}


def show(who: str, tokens: int, tp: int, found: Found) -> None:
    line = f"{who:10}{tp:>4}{tokens:>8}"
    if "failed" in found:
        print(f"{line}  {found['failed']}", flush=True)
        return
    line += f"{found['peak']:9.0f}{found['gradients']:11.0f}{found['rest']:9.0f}"
    line += f"{found['s']:9.2f}{found['cpu s']:9.2f}" if "s" in found else f"{'-':>9}{'-':>9}"
    print(line + (f"{found['error']:11.1e}" if "error" in found else f"{'-':>11}"), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--peer-tokens", type=int, help="for Megatron-Core and cut-cross-entropy; default: --tokens")
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--vocab", type=int, default=152064)
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--peers", type=Path, default=ROOT / ".venv-peers-logprob", help="cut-cross-entropy's folder")
    parser.add_argument("--no-peers", action="store_true", help="without cut-cross-entropy")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        one_case(json.loads(options.case))
        return
    peer_tokens = options.peer_tokens or options.tokens
    if any(options.vocab % tp for tp in options.tp):
        parser.error(f"--vocab {options.vocab} cannot be cut over --tp {options.tp}: set a multiple of each")
    config = {"tokens": options.tokens, "peer_tokens": peer_tokens, "hidden": options.hidden, "vocab": options.vocab}
    details: dict[str, object] = {"machine": machine(), "config": config}
    print(f"machine: {details['machine']}\nconfig: {config}", flush=True)
    if not options.no_peers and not options.peers.is_dir():
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(options.peers)]
        subprocess.run([*install, "-r", str(PEER_PINS)], check=True)

    rows: list[dict[str, object]] = []

    def run(who: str, tokens: int, tp: int, repeats: int) -> Found:
        case = config | {"who": who, "tokens": tokens, "repeats": repeats, "peers": str(options.peers)}
        found = run_case(case, tp)
        show(who, tokens, tp, found)
        rows.append({"who": who, "tokens": tokens, "tp": tp} | found)
        return found

    print(
        f"\n{'':10}{'TP':>4}{'tokens':>8}{'peak':>9}{'gradients':>11}{'rest':>9}{'s':>9}{'cpu s':>9}{'error':>11}",
        flush=True,
    )
    memory, seconds, cpu_seconds, scale = [], [], [], options.tokens / peer_tokens
    for tp in options.tp:
        ours, theirs = (
            run(who, tokens, tp, options.repeats)
            for who, tokens in (("ours", options.tokens), ("megatron", peer_tokens))
        )
        if "failed" in theirs:
            raise RuntimeError(f"Megatron-Core failed, so there is nothing to compare with: {theirs['failed']}")
        memory.append(ours["peak"] / (theirs["gradients"] + theirs["rest"] * scale))
        seconds.append(ours["s"] / (theirs["s"] * scale))
        cpu_seconds.append(ours["cpu s"] / (theirs["cpu s"] * scale))
    if not options.no_peers:
        run("cce", peer_tokens, 1, options.repeats)
    few, many = (run("ours", tokens, 1, repeats=0) for tokens in GROWTH_TOKENS)
    growth = (many["rest"] - few["rest"]) * 1024 / (GROWTH_TOKENS[1] - GROWTH_TOKENS[0])
    details["cases"] = rows
    result = {"memory_ratio": max(memory), "time_ratio": max(seconds), "cpu_time_ratio": max(cpu_seconds)}
    result["memory_growth_kib"] = growth
    finish(result, details, options.json)


if __name__ == "__main__":
    main()
