"""Two sides of a run: each has a default group of its own, calls are answered, weights arrive bit for bit."""

from __future__ import annotations

import pytest

from tests.ranks import run_ranks

BUCKETS = [[("embedding", (5, 4)), ("norm", (4,))], [("up", (3, 4))], [("down", (4, 3)), ("head", (5, 4))]]


def tensors(dtype: str) -> list:
    import torch

    numbers = torch.arange(100, dtype=torch.float32).sqrt().to(getattr(torch, dtype))
    return [
        (name, numbers[: torch.Size(shape).numel()].view(shape) + len(name))
        for bucket in BUCKETS
        for name, shape in bucket
    ]


def talk(payload: tuple[int, str]) -> dict:
    """The last ranks serve; what each rank has seen."""
    import torch
    import torch.distributed as dist

    from remax_megatron.parallel.layout import init_distributed
    from remax_megatron.parallel.link import Link
    from remax_megatron.parallel.whole_run import wait_for_all, whole_run

    num_engine_ranks, dtype = payload
    device = init_distributed("cpu", 60, num_engine_ranks)
    whole = whole_run()
    link = Link(whole, device, 60)
    seen = {"side": (dist.get_rank(), dist.get_world_size()), "engine": whole.is_engine_only}
    if whole.is_engine_only:
        received = {}

        def reload() -> str:
            for name, tensor in link.received_weights(BUCKETS, getattr(torch, dtype)):
                received[name] = tensor
            return "loaded"

        ones = torch.ones(1)
        dist.all_reduce(ones)  # of this side alone
        link.serve({"double": lambda x: 2 * x, "reload": reload})
        seen |= {"sum": int(ones), "equal": all(torch.equal(received[name], t) for name, t in tensors(dtype))}
    else:
        link.begin("double", [1, "a"])
        busy = torch.ones(1)
        dist.all_reduce(busy)  # meanwhile
        seen |= {"sum": int(busy), "result": link.result()}
        link.begin("reload")
        link.send_weights(iter(tensors(dtype)), BUCKETS)
        seen["reload"] = link.result()
        seen["large"] = len(link.call("double", b"x" * 3_000_000))
        link.close()
    wait_for_all()
    return seen


@pytest.mark.parametrize(("policy", "engine", "dtype"), [(1, 1, "float32"), (2, 1, "bfloat16"), (1, 2, "float32")])
def test_calls_are_answered_and_weights_arrive(policy, engine, dtype):
    seen = run_ranks("tests.parallel.test_link:talk", policy + engine, (engine, dtype), timeout_s=90)
    for rank, one in enumerate(seen[:policy]):
        assert one["side"] == (rank, policy) and not one["engine"] and one["sum"] == policy
        assert one["result"] == [1, "a", 1, "a"] and one["reload"] == "loaded" and one["large"] == 6_000_000
    for rank, one in enumerate(seen[policy:]):
        assert one["side"] == (rank, engine) and one["engine"] and one["sum"] == engine and one["equal"]
