"""Private code of Megatron that is called, replaced or overridden here: as it was read, in the versions that were read.

A new version fails in the first test. Read the places below in it, repair what has changed, and add it to VERSIONS.
"""

from __future__ import annotations

import inspect

import megatron.core
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel import random as megatron_random

VERSIONS = {  # version -> arguments of _get_save_and_finalize_callbacks, what makes the queue
    "0.16.1": (["self", "writer", "save_state_dict_ret"], "_get_write_results_queue"),
    "0.19.2": (["self", "writer", "save_state_dict_ret", "async_strategy"], "get_write_results_queue"),
}


VERSION = megatron.core.__version__.split("+")[0]  # without the commit of a build


def arguments(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_this_version_was_read():
    assert VERSION in VERSIONS, f"megatron-core {VERSION}: read the places of this file in it, then add it to VERSIONS"


def test_checkpoint_saver():
    """checkpoint/saver.py writes the files itself, and has the queue of results in its own process."""
    from remax_megatron.checkpoint.saver import MAKE_QUEUE

    callbacks, make_queue = VERSIONS[VERSION]
    assert arguments(TorchDistSaveShardedStrategy._get_save_and_finalize_callbacks) == callbacks
    assert make_queue == MAKE_QUEUE and callable(getattr(filesystem_async, make_queue))
    writer = filesystem_async.FileSystemWriterAsync
    assert f"self.results_queue = {make_queue}()" in inspect.getsource(writer.prepare_write_data)
    write = ["transform_list", "local_proc_idx", "write_bucket", "results_queue", "count_queue", "use_fsync", "kwargs"]
    assert arguments(writer.write_preloaded_data) == write
    assert arguments(writer.preload_tensors) == ["write_buckets", "non_blocking"]
    returned = "[torch.distributed.get_rank(), self.write_buckets, self.results_queue]"
    assert returned in inspect.getsource(writer.get_save_function_and_args)


def test_training_state():
    """policy/training_state.py finds the stretch of a parameter that a rank's distributed optimizer owns."""
    assert arguments(DistributedOptimizer._get_model_param_range_map) == ["self", "param"]
    source = inspect.getsource(DistributedOptimizer)
    for name in ("model_param_gbuf_map", "model_param_group_index_map"):
        assert f"self.{name}" in source, name


def test_cpu_platform():
    """parallel/cpu_platform.py replaces the random state of the GPU by that of the CPU."""
    assert arguments(megatron_random._get_cuda_rng_state) == ["device", "clone", "graph_safe"]
    assert arguments(megatron_random._set_cuda_rng_state) == ["new_state", "device", "graph_safe"]


def test_gradient_norm():
    """policy/gradient_norm.py takes the place of a function of Megatron's, with the same bits."""
    import torch
    from megatron.core.optimizer import clip_grads
    from megatron.core.utils import local_multi_tensor_l2_norm

    from remax_megatron.policy.gradient_norm import l2_norm

    assert clip_grads.l2_norm_impl is local_multi_tensor_l2_norm
    torch.manual_seed(0)
    tensors = [torch.randn(size) * 3**i for i, size in enumerate((1, 7, 64, 1000, 4097))]
    flag = torch.zeros(1, dtype=torch.int)
    found, _ = l2_norm(65536, flag, [tensors], False)
    whole = torch.cat(tensors).double().norm()
    torch.testing.assert_close(found.double().squeeze(), whole, rtol=1e-6, atol=0.0)
    theirs = torch.norm(torch.tensor([float(torch.norm(tensor)) for tensor in tensors]))  # its formula, on the CPU
    assert torch.equal(found.squeeze(), theirs)
