"""Converters against `cp` and against two peers, there and back on one folder of real shapes and random weights.

    python benchmarks/convert.py [--shape 1.5b] [--layers N] [--repeats 3] [--peers DIR | --no-peers] [--work DIR]
                                 [--json FILE]

--peers names a Python environment with benchmarks/peers/requirements-convert.txt installed (that file says how); it is
made there when the folder is missing. Each repeat runs `cp -r` (which does not flush to the disk), our two commands
(which do), and then each peer; medians are printed. Times are those of the conversions, without starting Python and
importing, for ours and the peers alike; process_time_vs_cp counts that in. Memory is the largest anonymous memory of
the process. Needs room for four copies of the model in --work. Virtual disks grant bursts and then throttle, so the
disk rests for --rest seconds before every timed step.

    time_vs_best_peer    ours, both directions, over the faster peer's
    memory_vs_best_peer  ours, the larger of both directions, over the smaller peer's
    time_vs_cp           the slower of our two directions, over cp
    time_vs_flushed_cp   the same over `cp -r && sync`, which like ours waits for the disk
    process_time_vs_cp   time_vs_cp with starting Python
    peak_over_base_gib   our largest resident memory above that of a bare interpreter
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import ROOT, Usage, finish, machine, measured
from random_model import SHAPES, config_of, family_of, make_folder

from remax_megatron.convert.verify import read_tensors
from remax_megatron.model_facts import ModelFacts

PROJECTED = ("14b", "32b")
PEERS = ("mbridge", "megatron-bridge")
PEER_SCRIPT = ROOT / "benchmarks/peers/convert_peer.py"
PEER_PINS = ROOT / "benchmarks/peers/requirements-convert.txt"


def same_weights(a: Path, b: Path) -> bool:
    """Whether both folders have the same safetensors files, byte for byte."""
    files = sorted(path.name for path in a.glob("*.safetensors"))
    return files == sorted(p.name for p in b.glob("*.safetensors")) and not any(
        filecmp.cmpfiles(a, b, files, False)[1:]
    )


def settle(rest_s: float) -> None:
    """Let what earlier steps wrote reach the disk, and the disk rest, so that nobody pays for another."""
    os.sync()
    time.sleep(rest_s)


def repeat_ours(folder: Path, work: Path, repeats: int, rest_s: float) -> dict[str, object]:
    """cp, there and back in turn; medians of seconds, maxima of GiB."""
    python = [sys.executable]
    bare = measured([*python, "-c", "import time; time.sleep(0.2)"])
    copy, flushed, there, back = [], [], [], []
    for _ in range(repeats):
        for path in (work / "cp", work / "megatron", work / "hf"):
            shutil.rmtree(path, ignore_errors=True)
        settle(rest_s)
        copy.append(measured(["cp", "-r", str(folder), str(work / "cp")]))
        shutil.rmtree(work / "cp")
        settle(rest_s)
        flushed.append(measured(["sh", "-c", f"cp -r '{folder}' '{work / 'cp'}' && sync"]))
        shutil.rmtree(work / "cp")
        settle(rest_s)
        command = ["convert/hf_to_megatron.py", "--hf", str(folder), "--output", str(work / "megatron")]
        there.append(measured([*python, *command]))
        settle(rest_s)
        command = ["convert/megatron_to_hf.py", "--megatron", str(work / "megatron"), "--output", str(work / "hf")]
        back.append(measured([*python, *command]))
        if not same_weights(folder, work / "hf"):
            raise SystemExit("our round trip is not byte-equal")
    for path in (work / "megatron", work / "hf"):
        shutil.rmtree(path)
    return {
        "flushed_cp_s": statistics.median(run.seconds for run in flushed),
        "cp_s": statistics.median(run.seconds for run in copy),
        "there_s": statistics.median(own_seconds(run) for run in there),
        "back_s": statistics.median(own_seconds(run) for run in back),
        "there_process_s": statistics.median(run.seconds for run in there),
        "back_process_s": statistics.median(run.seconds for run in back),
        "peak_gib": max(run.peak_gib for run in there + back),
        "peak_anon_gib": max(run.peak_anon_gib for run in there + back),
        "interpreter_gib": bare.peak_gib,
        "runs": {
            name: [run.seconds for run in runs] for name, runs in (("cp", copy), ("there", there), ("back", back))
        },
    }


def repeat_peer(peer: str, python: Path, folder: Path, work: Path, repeats: int, rest_s: float) -> dict[str, object]:
    """The peer there and back; medians and maxima, or {"error": ...} with the exact error."""
    seconds: dict[str, list[float]] = {"there": [], "back": []}
    peak, version = 0.0, ""
    for _ in range(repeats):
        for name in ("peer-megatron", "peer-hf"):
            shutil.rmtree(work / name, ignore_errors=True)
        for direction in seconds:
            settle(rest_s)
            command = [str(python), str(PEER_SCRIPT), peer, direction, "--hf", str(folder)]
            command += ["--megatron", str(work / "peer-megatron")]
            command += ["--output", str(work / "peer-hf")] if direction == "back" else []
            try:
                answer = json.loads(measured(command, timeout_s=600).output.strip().splitlines()[-1])
            except RuntimeError as error:  # it died outside of what it reports itself
                answer = {"error": str(error).strip().splitlines()[-1]}
            if "error" in answer:
                return {"error": f"{direction}: {answer['error']}", "version": answer.get("version", "")}
            seconds[direction].append(answer["seconds"])
            peak, version = max(peak, answer["peak_anon_gib"]), answer["version"]
    equal = read_tensors(folder) == read_tensors(work / "peer-hf")
    for name in ("peer-megatron", "peer-hf"):
        shutil.rmtree(work / name)
    medians = {f"{name}_s": statistics.median(values) for name, values in seconds.items()}
    return medians | {"peak_anon_gib": peak, "version": version, "equal_tensors": equal, "runs": seconds}


def peers_python(folder: Path) -> Path:
    """The interpreter of the peers' environment, which is made when the folder is missing."""
    python = folder / "bin/python"
    if not python.exists():
        print(f"making the peers' environment in {folder} (2 GB)", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "-r", str(PEER_PINS)]
        subprocess.run(install, check=True)
    return python


def own_seconds(run: Usage) -> float:
    """What a command of ours says it took, from reading config.json to the renamed folder."""
    found = re.search(r" GB in ([\d.]+) s ", run.output)
    assert found, run.output
    return float(found[1])


def projection(ours: dict, num_bytes: int, say: Callable[[str], None]) -> dict[str, dict[str, float]]:
    """Time and memory of models that are not run whole: bytes over the measured rate, and the measured memory.

    Memory does not grow with the model: bytes go through in blocks of 1 MiB.
    """
    from remax_megatron.weights.weight_table import weight_table

    rates = {name: num_bytes / ours[f"{name}_s"] for name in ("there", "back")}
    projected = {}
    for shape in PROJECTED:
        facts = ModelFacts.from_hf_config(config_of(SHAPES[shape], family=family_of(shape)), shape)
        total = 2 * sum(torch.Size(dims).numel() for entry in weight_table(facts) for dims in entry.hf_shapes)
        seconds = {f"{name}_s": total / rate for name, rate in rates.items()}
        projected[shape] = {"gb": total / 1e9, "peak_gib": ours["peak_gib"]} | seconds
        say(
            f"{shape} whole, computed: {total / 1e9:.1f} GB, {seconds['there_s']:.0f} s there, "
            f"{seconds['back_s']:.0f} s back at the measured rates, peak {ours['peak_gib']:.2f} GiB"
        )
    return projected


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1.5b")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rest", type=float, default=15.0, help="seconds of rest for the disk before each timed step")
    parser.add_argument("--peers", type=Path, default=ROOT / ".venv-peers-convert", help="the peers' environment")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--work", help="folder for the models (default: the system's for temporary files)")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    say = lambda line: print(line, flush=True)  # noqa: E731
    config = {"shape": options.shape, "layers": options.layers or SHAPES[options.shape][0], "repeats": options.repeats}
    details: dict[str, object] = {"machine": machine(), "config": config}
    say(f"machine: {details['machine']}")
    say(f"config: {config}")
    with tempfile.TemporaryDirectory(prefix="convert-", dir=options.work) as name:
        work = Path(name)
        num_bytes = make_folder(
            work / "model", config_of(SHAPES[options.shape], options.layers, family_of(options.shape))
        )
        started = time.perf_counter()
        ours = repeat_ours(work / "model", work, options.repeats, options.rest)
        say(f"{'':16}{'there s':>9}{'back s':>9}{'anon GiB':>10}")
        whole = f"{ours['there_process_s']:.2f} and {ours['back_process_s']:.2f} with starting Python"
        say(f"{'ours':16}{ours['there_s']:9.2f}{ours['back_s']:9.2f}{ours['peak_anon_gib']:10.2f}   {whole}")
        flushed = f"{num_bytes / 1e9:.2f} GB, not flushed; with sync {ours['flushed_cp_s']:.2f}"
        say(f"{'cp -r':16}{ours['cp_s']:9.2f}{'':19}   {flushed}")
        details["ours"], peers = ours, {}
        for peer in () if options.no_peers else PEERS:
            peers[peer] = found = repeat_peer(
                peer, peers_python(options.peers), work / "model", work, options.repeats, options.rest
            )
            if "error" in found:
                say(f"{peer:16}{found['error']}")
            else:
                line = f"{peer:16}{found['there_s']:9.2f}{found['back_s']:9.2f}{found['peak_anon_gib']:10.2f}"
                say(f"{line}   equal tensors: {found['equal_tensors']}")
        details |= {"peers": peers, "projected": projection(ours, num_bytes, say)}
        details["seconds"] = time.perf_counter() - started
    ran = [found for found in peers.values() if "error" not in found]
    result = {}
    if ran:
        fastest = min(found["there_s"] + found["back_s"] for found in ran)
        result["time_vs_best_peer"] = (ours["there_s"] + ours["back_s"]) / fastest
        result["memory_vs_best_peer"] = ours["peak_anon_gib"] / min(found["peak_anon_gib"] for found in ran)
    result["time_vs_cp"] = max(ours["there_s"], ours["back_s"]) / ours["cp_s"]
    result["time_vs_flushed_cp"] = max(ours["there_s"], ours["back_s"]) / ours["flushed_cp_s"]
    result["process_time_vs_cp"] = max(ours["there_process_s"], ours["back_process_s"]) / ours["cp_s"]
    result["peak_over_base_gib"] = ours["peak_gib"] - ours["interpreter_gib"]
    finish(result, details, options.json)


if __name__ == "__main__":
    main()
