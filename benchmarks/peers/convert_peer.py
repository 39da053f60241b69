"""One conversion by a peer, on a CPU: Hugging Face -> Megatron checkpoint ("there") or back, in a process of its own.

    python convert_peer.py {mbridge,megatron-bridge} there --hf DIR --megatron DIR
    python convert_peer.py {mbridge,megatron-bridge} back  --hf DIR --megatron DIR --output DIR

Runs in the environment of requirements-convert.txt, not in the project's; benchmarks/convert.py starts it. `--hf` is
the input of "there" and the template (config, file layout, tokenizer) of "back"; megatron-bridge fails without a
tokenizer in it. The folder that is written must not exist. Gloo, world size 1, as many threads as the process may use
cores. What is timed is the peer's own public path:

  mbridge 0.15.1          there  AutoBridge.from_pretrained, get_model, load_weights(memory_efficient=True), then
                                 megatron.core.dist_checkpointing.save of the model's sharded_state_dict: mbridge
                                 leaves the model in memory, has no disk format, and its users keep it this way.
                          back   get_model, dist_checkpointing.load, save_weights. Its memory_efficient=True refuses
                                 a folder without an index and writes every tensor twice, so it stays off.
  megatron-bridge 0.3.1   there  AutoBridge.import_ckpt (it saves with low_memory_save=True).
                          back   AutoBridge.load_megatron_model and save_hf_pretrained(strict=False): the body of
                                 export_ckpt, which would start the process group inside the timed part.

Neither peer knows how to run without a GPU; the three functions `without_cuda`, `without_transformer_engine` and
`gpu_packages_for_import` are what it takes. They touch how the model's modules are made, not how weights are read,
mapped or written. Without them:

  both             AssertionError: Torch not compiled with CUDA enabled
  mbridge          NameError: name 'TENorm' is not defined
  megatron-bridge  ModuleNotFoundError: No module named 'transformer_engine', then: No module named 'triton'

Prints one JSON line. On success: peer, direction, version, seconds (the conversion alone), seconds_with_imports
(since the process began), base_anon_gib (RssAnon after imports and process group), peak_anon_gib (largest RssAnon,
sampled every 20 ms; the processes that dist_checkpointing forks to write are not added), max_rss_gib (the kernel's
high-water mark, mapped files included). When the peer fails: peer, direction, version, error, and exit code 0,
because the error is a result; the traceback goes to stderr with all that the peer prints. It compares no bytes and is
no converter to use.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import resource
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable
from pathlib import Path

import torch

SAMPLE_SECONDS = 0.02


def anon_gib() -> float:
    """RssAnon of this process in GiB: memory that is not backed by a file."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon:")) / 2**20


def process_age_s() -> float:
    """Seconds since this process began, imports included (proc(5): starttime in clock ticks since boot)."""
    with open("/proc/self/stat") as stat:
        start_ticks = int(stat.read().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - start_ticks / os.sysconf("SC_CLK_TCK")


class PeakAnon:
    """Context manager: `.gib` is the largest RssAnon seen between enter and exit."""

    def __enter__(self) -> PeakAnon:
        self.gib = anon_gib()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self.gib = max(self.gib, anon_gib())

    def __exit__(self, *exc_info) -> None:
        self._stop.set()
        self._thread.join()
        self.gib = max(self.gib, anon_gib())


def without_cuda() -> None:
    """Let the calls into torch.cuda that megatron-core 0.16.1 and both peers make while converting find a CPU."""
    # Where parameters are made, and what mbridge's get_model moves the finished model to.
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    # dist_checkpointing waits for copies to the host; on a CPU there are none.
    torch.cuda.synchronize = lambda device=None: None
    # megatron-bridge gathers the generator states for a checkpoint even where it does not save them.
    torch.cuda.get_rng_state = lambda device=None: torch.get_rng_state()


def without_transformer_engine() -> None:
    """Give megatron-core's Transformer Engine layer spec modules of its own, with TE's class and parameter names.

    Both peers ask for that spec and know weights by TE's names only (`linear_qkv.layer_norm_weight`), so their tables
    then apply as they are. No forward pass ever runs.
    """
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    class TELayerNormColumnParallelLinear(ColumnParallelLinear):
        def __init__(self, input_size: int, output_size: int, *, config, **kwargs) -> None:
            super().__init__(input_size, output_size, config=config, **kwargs)
            self.layer_norm_weight = torch.nn.Parameter(torch.empty(input_size, dtype=config.params_dtype))

    class SpecProvider(LocalSpecProvider):
        def fuse_layernorm_and_linear(self) -> bool:
            return True

        def column_parallel_layer_norm_linear(self) -> type:
            return TELayerNormColumnParallelLinear

        def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
            return WrappedTorchNorm

    gpt_layer_specs.TESpecProvider = SpecProvider
    gpt_layer_specs.TENorm = WrappedTorchNorm


@contextlib.contextmanager
def gpu_packages_for_import():
    """While active, `transformer_engine` and megatron-core's Triton kernels can be imported by megatron-bridge.

    Its LoRA classes name te.Linear as base class, its Mamba models import the kernels; neither is used here. Gone
    afterwards, and megatron-core must be imported before, so that nothing takes Transformer Engine to be there.
    """
    linear, ops = torch.nn.Linear, types.SimpleNamespace(Sequential=torch.nn.Sequential)
    te, te_torch = types.ModuleType("transformer_engine"), types.ModuleType("transformer_engine.pytorch")
    te.pytorch, te_torch.Linear, te_torch.ops = te_torch, linear, ops
    kernels_name = "megatron.core.inference.contexts.attention_context.triton.tensor_ops"
    kernels = types.ModuleType(kernels_name)
    kernels.__getattr__ = lambda name: None  # the module's functions, imported by name
    stand_ins = {te.__name__: te, te_torch.__name__: te_torch, kernels_name: kernels}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name in stand_ins:
            del sys.modules[name]


def start_process_group() -> None:
    """Gloo and Megatron's groups, world size 1."""
    from megatron.core import parallel_state

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()


def mbridge(args: argparse.Namespace) -> Callable[[], None]:
    """Import mbridge; returns the conversion, not yet started."""
    without_transformer_engine()
    from mbridge import AutoBridge
    from mbridge.core.safetensor_io import SafeTensorIO
    from megatron.core import dist_checkpointing

    def model():
        bridge = AutoBridge.from_pretrained(args.hf)
        bridge.set_extra_args(use_cpu_initialization=True, perform_initialization=False)  # no random weights first
        return bridge, bridge.get_model()

    def there() -> None:
        bridge, models = model()
        bridge.load_weights(models, args.hf, memory_efficient=True)
        os.makedirs(args.megatron)
        dist_checkpointing.save(models[0].sharded_state_dict(), args.megatron)

    def back() -> None:
        bridge, models = model()
        models[0].load_state_dict(dist_checkpointing.load(models[0].sharded_state_dict(), args.megatron))
        bridge.safetensor_io = SafeTensorIO(args.hf)  # the file layout; otherwise load_weights has set it
        bridge.save_weights(models, args.output)

    return there if args.direction == "there" else back


def megatron_bridge(args: argparse.Namespace) -> Callable[[], None]:
    """Import megatron-bridge; returns the conversion, not yet started."""
    without_transformer_engine()
    with gpu_packages_for_import():
        import megatron.bridge.training.model_load_save  # noqa: F401  (imported only when it is first needed)
        from megatron.bridge import AutoBridge

    def there() -> None:
        AutoBridge.import_ckpt(args.hf, args.megatron)

    def back() -> None:
        bridge = AutoBridge.from_hf_pretrained(args.hf)
        models = bridge.load_megatron_model(args.megatron)
        bridge.save_hf_pretrained(models, args.output, strict=False)

    return there if args.direction == "there" else back


PEERS = {"mbridge": mbridge, "megatron-bridge": megatron_bridge}


def measure(args: argparse.Namespace) -> dict:
    """Run the conversion; returns the measured fields, or raises what the peer raises."""
    without_cuda()
    convert = PEERS[args.peer](args)
    start_process_group()
    base = anon_gib()
    with torch.no_grad(), PeakAnon() as peak:
        begin = time.perf_counter()
        convert()
        seconds, age = time.perf_counter() - begin, process_age_s()
    return {
        "seconds": round(seconds, 3),
        "seconds_with_imports": round(age, 3),
        "base_anon_gib": round(base, 3),
        "peak_anon_gib": round(peak.gib, 3),
        "max_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3),
    }


def failures() -> tuple[type[BaseException], ...]:
    """What a peer that cannot do it may raise. Called when something was raised; evaluates to the types to catch."""
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from safetensors import SafetensorError

    builtin = (ImportError, NameError, AttributeError, AssertionError, RuntimeError, TypeError, ValueError, LookupError)
    return (*builtin, OSError, MemoryError, CheckpointingException, SafetensorError)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("direction", choices=("there", "back"))
    parser.add_argument("--hf", required=True, help="Hugging Face folder: input of 'there', template of 'back'")
    parser.add_argument("--megatron", required=True, help="Megatron checkpoint: output of 'there', input of 'back'")
    parser.add_argument("--output", help="Hugging Face folder that 'back' writes")
    args = parser.parse_args()
    if (args.direction == "back") != (args.output is not None):
        parser.error("--output is needed by 'back' and by nothing else")
    written = args.megatron if args.direction == "there" else args.output
    if Path(written).exists():
        parser.error(f"{written} exists; name a folder that does not")

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    result = {"peer": args.peer, "direction": args.direction, "version": importlib.metadata.version(args.peer)}
    with contextlib.redirect_stdout(sys.stderr):  # the peers print too
        try:
            result |= measure(args)
        except failures() as error:
            traceback.print_exc()
            result["error"] = f"{type(error).__name__}: {error}"
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
