"""What a device has: memory and rates from the vendors' data sheets, each row with its source. No measured number.

Rates are of one device and one direction. NVLink's figure on a data sheet is of both directions together, so half of it
stands here. `network` is the device's share of its node's adapters in the vendor's own eight-GPU machine. What a run
reaches of a rate is one of the planner's efficiencies (step_time.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from remax_megatron.config.schema import ConfigError
from remax_megatron.flops import PEAK_BF16_TFLOPS

GB = 10**9


@dataclass(frozen=True)
class Gpu:
    """A device: bytes of memory, dense bfloat16 FLOP/s, and bytes/s of its memory, to a peer of its node, to another
    node, and to the host."""

    name: str
    memory: int
    peak_flops: float
    memory_rate: float
    node_rate: float
    network_rate: float
    host_rate: float
    per_node: int = 8


def _gpu(name: str, memory_gb: int, flops_of: str, terabytes_per_s: float, *links_gb_per_s: float) -> Gpu:
    node, network, host = links_gb_per_s
    peak = PEAK_BF16_TFLOPS[flops_of] * 1e12
    return Gpu(name, memory_gb * GB, peak, terabytes_per_s * 1e12, node * 1e9, network * 1e9, host * 1e9)


# Memory and its rate, NVLink, PCIe: NVIDIA's data sheets of H100, H200, H800, H20, A100, L40S and B200 (the last: DGX
# B200). Network: DGX A100 has eight 200 Gb/s adapters, DGX H100, H200 and B200 eight of 400 Gb/s. L40S has no NVLink:
# its peers are reached through PCIe 4.0 x16.
GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("h100-80gb", 80, "H100 HBM3", 3.35, 450, 50, 64),
        _gpu("h200-141gb", 141, "H200", 4.8, 450, 50, 64),
        _gpu("h800-80gb", 80, "H800", 3.35, 200, 50, 64),
        _gpu("h20-96gb", 96, "H20", 4.0, 450, 50, 64),
        _gpu("a100-80gb", 80, "A100", 2.04, 300, 25, 32),
        _gpu("a100-40gb", 40, "A100", 1.56, 300, 25, 32),
        _gpu("b200-180gb", 180, "B200", 8.0, 900, 50, 64),
        _gpu("l40s-48gb", 48, "L40S", 0.864, 32, 25, 32),
        # One core of a server's processor, for the demo and for runs that check this model: 32 float32 multiplications
        # and additions per cycle at 2.5 GHz, a share of the memory's rate, and copies between processes. An
        # assumption without a data sheet; calibrate it.
        Gpu("cpu-core", 16 * GB, 160e9, 10e9, 2e9, 1e9, 10e9),
    )
}
DEFAULT, DEFAULT_ON_CPU = "h100-80gb", "cpu-core"


def gpu_named(name: str) -> Gpu:
    """Look `name` up in GPUS. ConfigError for one that is not there."""
    if name not in GPUS:
        raise ConfigError(f"--gpu={name} is not known; set it to one of {', '.join(GPUS)}")
    return GPUS[name]
