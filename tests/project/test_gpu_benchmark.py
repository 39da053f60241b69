"""benchmarks/gpu.py on a CPU: every part's code with tiny sizes, a part that is stopped, the verdicts, the document."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from tests import ROOT

pytestmark = pytest.mark.e2e

needs_engine = pytest.mark.vllm_cpu  # of the parts cycle, demo, step
PARTS = ["parity", "head", "resume", "update", "cycle", "demo", "step"]  # in the order in which they run


@pytest.fixture(scope="module")
def report():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import gpu_report

        yield gpu_report
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[str, dict]:
    """The output and the JSON of one run of all parts, in which `stack` has no time."""
    folder = tmp_path_factory.mktemp("gpu")
    names = ",".join(["stack", *PARTS])
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--tiny", "--parts", names]
    command += ["--json", str(folder / "gpu.json"), "--work", str(folder), "--total=280", "--limit=stack=0.001"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=290)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads((folder / "gpu.json").read_text())


def cases(details: dict, part: str) -> dict[str, dict]:
    return {case["case"]: case for case in details["parts"][part]["cases"]}


@needs_engine
@pytest.mark.slow
def test_every_part_runs_and_a_part_that_is_stopped_ends_no_other(run):
    output, details = run
    assert list(details["parts"]) == ["stack", *PARTS]
    assert details["parts"]["stack"]["outcome"] == "stopped at its limit of 0 s"
    for name in PARTS:
        part = details["parts"][name]
        assert part["outcome"] == "done", output
        assert part["cases"] and not [case for case in part["cases"] if "failed" in case], part["cases"]
    last = output.strip().splitlines()[-1]
    assert last.startswith("RESULT ")
    found = {name: float(value) for name, value in (pair.split("=") for pair in last.split()[1:])}
    assert found["parts_failed"] == 1 and found["cases_failed"] == 0
    assert found["gradient_float32"] <= 1e-4 and found["gradient_bfloat16"] <= 1.5
    assert found["resume_loss"] == 0
    assert found["canary_mean"] <= 1e-4  # float32 here
    assert found["targets_not_measured"] == 3  # what needs a GPU: speed-up, MFU and with it the ledger


@needs_engine
@pytest.mark.slow
def test_what_needs_a_gpu_is_said_to_be_missing(run):
    _, details = run
    for part in ("parity", "update"):
        missing = [c for name, c in cases(details, part).items() if "transformer_engine" in name.split()]
        assert missing and all(c["not_available"] == "Transformer Engine cannot be imported here" for c in missing)
    assert "flex cannot run here on cpu" in cases(details, "parity")["local float32 flex none"]["not_available"]


@needs_engine
@pytest.mark.slow
def test_the_parts_measure_what_they_are_for(run):
    _, details = run
    update = cases(details, "update")["1.5b local full"]
    assert update["tokens_per_s"] == pytest.approx(update["tokens"] / update["seconds"])
    assert update["tflops"] > 0 and update["ledger_gib"] > 0
    losses = cases(details, "resume")["saved in the background"]["losses"]
    assert len(set(losses)) == len(losses), "the loss does not depend on the weights"
    rounds = [case for name, case in cases(details, "cycle").items() if name.startswith("round")]
    assert len(rounds) == 2 and all(case["collective_rpc_s"] > 0 for case in rounds)
    step = cases(details, "step")["1.5b"]
    assert step["step_s"] >= step["rollout_s"] + step["reward_s"] + step["update_s"] + step["sync_s"]
    head = cases(details, "head")
    assert head["tiny ours"]["error"] < 1e-3 and head["tiny ours"]["peak_gib"] < head["tiny megatron"]["peak_gib"]


@needs_engine
@pytest.mark.slow
def test_the_document_is_written_from_the_json(run, report, tmp_path):
    _, details = run
    docs = tmp_path / "gpu.md"
    shutil.copy(ROOT / "docs/gpu.md", docs)
    for _ in range(2):  # a second time changes nothing
        report.write_docs(details, docs)
        text = docs.read_text()
        assert text.count("### parity") == 1 and "Not run yet" not in text
    assert "| resume_loss: losses after a resume, largest difference | <= 1e-06 | 0 | met |" in text
    assert "| te_speedup: Transformer Engine's layers / local ones, tokens/s | >= 1.2 |  | not measured |" in text
    assert "no GPU: on the CPU, tiny sizes" in text and details["machine"]["commit"] in text
    (tmp_path / "some_preset.txt").write_text("7 kernels\nRESULT syncs_per_step=3 peak_gib=37.1\n")
    report.write_counts([tmp_path / "some_preset.txt"], docs)
    assert "| case | syncs_per_step | peak_gib |\n| --- | --- | --- |\n| some_preset | 3 | 37.1 |\n" in docs.read_text()


def test_verdicts_by_hand(report):
    te, local = {"tokens_per_s": 600.0, "mfu": 0.5}, {"tokens_per_s": 400.0, "mfu": 0.3}
    ledger = {"ledger_gib": 22.0, "peak_gib": 20.0}
    updates = {"1.5b transformer_engine full": te, "1.5b local full": local, "1.5b local none": local}
    updates["0.5b transformer_engine none"] = te | {"mfu": 0.9}  # too small to count, and without a partner
    head = {"16k ours": {"peak_gib": 1.0, "seconds": 3.0}, "16k megatron": {"peak_gib": 10.0, "seconds": 2.0}}
    broken = {"case": "1.5b transformer_engine none", "failed": "RuntimeError: x"}
    parts = {"update": updates, "head": head}
    details = {
        "parts": {
            name: {"outcome": "done", "cases": [{"case": case} | ledger | found for case, found in made.items()]}
            for name, made in parts.items()
        }
    }
    details["parts"]["update"]["cases"].append(broken)
    details["parts"]["cycle"] = {"outcome": "stopped at its limit of 90 s", "cases": []}
    assert report.result(details) == pytest.approx(
        {"head_memory": 0.1, "head_time": 1.5, "te_speedup": 1.5, "mfu": 0.5, "ledger_error": 0.1}
        | {"targets_met": 4, "targets_missed": 1, "targets_not_measured": 7, "parts_failed": 1, "cases_failed": 1}
    )


def test_wrong_arguments_are_named():
    for arguments, message in (
        (["--parts", "parity,speed"], "--parts parity,speed: speed unknown; set some of stack, parity"),
        (["--limit", "parity"], "--limit parity: expected PART=SECONDS"),
    ):
        command = [sys.executable, "benchmarks/gpu.py", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and message in done.stderr
