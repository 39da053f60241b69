"""What the converters refuse, and what an interruption leaves: one `error:` line, exit code 2, nothing half done.

Everything goes through the commands' own `main`; real processes are started where one has to be stopped or killed.
Nothing that a folder holds as a pickle is ever run: the payloads here would create a file.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from remax_megatron.convert import hf_to_megatron, megatron_to_hf, partial_folder, verify
from remax_megatron.model_facts import ModelFacts
from remax_megatron.weights.hf_folder import expected_shapes, write_hf_folder
from tests import ROOT
from tests.small_models import make_qwen2
from tests.weights.test_hf_folder import INDEX, rewrite, stream

TIMEOUT_S = 60
SINGLE, EMBEDDING, NORM = "model.safetensors", "model.embed_tokens.weight", "model.norm.weight"
ITERATION, TRACKER, FINAL_NORM = "iter_0000000", "latest_checkpointed_iteration.txt", "decoder.final_layernorm.weight"
WEIGHTS, METADATA, BACKEND = f"{ITERATION}/__0_0.distcp", f"{ITERATION}/.metadata", f"{ITERATION}/metadata.json"
BAR = re.compile(r"\d+%\|")
# What is wrong is half a message: one of these words says what to do, or what would be right.
FIX = re.compile(
    r"\b(set|add|remove|delete|choose|convert|save|load|name|write|wait|repeat|download|copy|use|give|expected)\b"
)
Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen2(tmp_path_factory.mktemp("hf") / "model", tied=False, layers=2)


@pytest.fixture(scope="module")
def converted(hf: Path) -> Path:
    hf_to_megatron.convert(hf, hf.with_name("megatron"))
    return hf.with_name("megatron")


@pytest.fixture
def model(hf: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(hf, tmp_path / "model"))


@pytest.fixture
def checkpoint(converted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(converted, tmp_path / "checkpoint"))


def tree(folder: Path) -> dict[str, tuple[int, str | bytes]]:
    """Every name below `folder` with its time of change (not a mount's, where an output may have been) and content."""
    found = {}
    for path in folder.rglob("*"):
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else b""
        found[str(path.relative_to(folder))] = 0 if path.is_mount() else path.lstat().st_mtime_ns, content
    return found


def call(main: Callable[[list[str]], int], *argv: object) -> int:
    return main([str(word) for word in argv])


def error_line(stderr: str) -> str:
    """The only line on standard error, progress bars aside."""
    lines = [line for line in re.split(r"[\r\n]+", stderr) if line.strip() and not BAR.search(line)]
    assert len(lines) == 1 and lines[0].startswith("error: "), stderr
    return lines[0]


@pytest.fixture
def refuses(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., None]:
    """`refuses(main, argv..., says=[...])`: exit code 2, one line with all of `says`, no file anywhere changed."""

    def check(main: Callable[[list[str]], int], *argv: object, says: list[str]) -> None:
        before = tree(tmp_path)
        capfd.readouterr()
        assert call(main, *argv) == 2
        line = error_line(capfd.readouterr().err)
        after = tree(tmp_path)
        assert after.keys() == before.keys() and after == before
        assert [word for word in says if word not in line] == [], line
        assert FIX.search(line), f"no word on what to do: {line}"

    return check


def change_json(file: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def config(**values: object) -> Damage:
    return lambda folder: change_json(folder / "config.json", lambda content: content.update(values))


def tensors(**changes: torch.Tensor | None) -> Damage:
    return lambda folder: rewrite(folder, **changes)


def text(name: str, content: str | bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def without(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def shorten(folder: Path, name: str = SINGLE) -> None:
    os.truncate(folder / name, (folder / name).stat().st_size // 2)


def payload(module: str, name: str, argument: str) -> bytes:
    """A pickle that calls module.name(argument) when it is loaded (a dotted name is walked)."""
    push = [b"\x8c" + bytes([len(word)]) + word.encode() for word in (module, name, argument)]
    return b"\x80\x04" + push[0] + push[1] + b"\x93" + push[2] + b"\x85R."


# -- Hugging Face -> Megatron ------------------------------------------------------------------------------------------


def shards(change: Callable[[Path, dict[str, str]], object]) -> Damage:
    """Make the folder a sharded one, then change a file or the index's weight_map."""

    def damage(folder: Path) -> None:
        write_hf_folder(folder, list(stream(folder)), folder, 200_000)
        change_json(folder / INDEX, lambda index: change(folder, index["weight_map"]))

    return damage


def only_a_pickle(folder: Path) -> None:
    (folder / SINGLE).unlink()
    (folder / "pytorch_model.bin").write_bytes(payload("os", "system", f"touch {folder}/marker"))


LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6}
UNREADABLE = "not a readable safetensors file"
HF_DAMAGE: dict[str, tuple[Damage, list[str]]] = {
    "missing tensor": (tensors(model__norm__weight=None), ["1 tensors are missing", NORM]),
    "extra tensor": (tensors(model__extra=torch.zeros(2)), ["1 tensors do not belong", "model.extra"]),
    "wrong shape": (tensors(model__norm__weight=torch.zeros(7)), [NORM, "(7,)", "(128,)"]),
    "integer tensor": (tensors(model__norm__weight=torch.zeros(128, dtype=torch.int8)), [NORM, "I8", "F32"]),
    "mixed types": (tensors(model__norm__weight=torch.zeros(128).bfloat16()), ["float32", "bfloat16", "--dtype"]),
    "truncated": (shorten, [SINGLE, UNREADABLE]),
    "garbage": (text(SINGLE, b"\xff" * 5000), [SINGLE, UNREADABLE]),
    "empty": (text(SINGLE, b""), [SINGLE, UNREADABLE]),
    "index: no file": (shards(lambda f, names: (f / names[NORM]).unlink()), ["the index names model-0", "missing"]),
    "index: shard cut": (shards(lambda f, names: shorten(f, names[NORM])), ["model-0", UNREADABLE]),
    "index: elsewhere": (shards(lambda f, names: names.update({NORM: names[EMBEDDING]})), [f"not hold {NORM}", INDEX]),
    "index: number": (shards(lambda f, names: names.update({NORM: 5})), [INDEX]),
    "index: list": (shards(lambda f, names: names.update({NORM: ["x"]})), [INDEX]),
    "index: damaged": (text(INDEX, "{"), [INDEX, "damaged"]),
    "index: a folder": (lambda folder: (folder / INDEX).mkdir(), [INDEX]),
    "only a pickle": (only_a_pickle, [SINGLE, "convert the weights to safetensors"]),
    "no config": (without("config.json"), ["--hf", "no config.json"]),
    "config cut": (text("config.json", '{"model_type"'), ["config.json cannot be read"]),
    "config: a list": (text("config.json", "[]"), ["config.json holds a list"]),
    "llama": (config(model_type="llama", architectures=["LlamaForCausalLM"]), ["not a Qwen2 or Qwen3 model", "llama"]),
    "architecture: number": (config(architectures=5), ["not a Qwen2 or Qwen3 model"]),
    "moe": (config(model_type="qwen2_moe", architectures=["Qwen2MoeForCausalLM"]), ["mixture-of-experts"]),
    "vision": (config(model_type="qwen2_vl", architectures=["Qwen2VLForConditionalGeneration"]), ["vision-language"]),
    "qwen3 moe": (config(model_type="qwen3_moe", architectures=["Qwen3MoeForCausalLM"]), ["mixture-of-experts"]),
    "quantised": (config(quantization_config={"quant_method": "gptq"}), ["quantised", "gptq"]),
    "rope scaling": (config(rope_scaling=LINEAR, rope_parameters=None), ["rope scaling (linear)"]),
    "rope parameters": (config(rope_parameters=LINEAR), ["rope scaling (linear)"]),
    "theta: a word": (config(rope_theta="much"), ["rope_theta", "much"]),
    "no layers": (config(num_hidden_layers=0), ["num_hidden_layers=0"]),
    "tied, other head": (config(tie_word_embeddings=True), ["lm_head.weight differs", "tie_word_embeddings"]),
}


@pytest.mark.parametrize("case", HF_DAMAGE)
def test_hf_folder_that_is_refused(case: str, model: Path, refuses: Callable[..., None]) -> None:
    damage, says = HF_DAMAGE[case]
    damage(model)
    refuses(hf_to_megatron.main, "--hf", model, "--output", model.with_name("out"), says=says)


OUTPUTS: dict[str, tuple[Damage, str, str]] = {
    "a folder": (lambda out: out.mkdir(), "out", "exists"),
    "a file": (lambda out: out.write_text("mine"), "out", "exists"),
    "a dangling link": (lambda out: out.symlink_to("nowhere"), "out", "exists"),
    "below a file": (lambda out: out.write_text("mine"), "out/new", "cannot be written"),
    "in the input": (lambda out: None, "model/new/out", "lies in the folder"),
    "the input": (lambda out: None, "model", "lies in the folder"),
    "in the input by a link": (lambda out: out.symlink_to("model"), "out/new", "lies in the folder"),
    "long name": (lambda out: None, "n" * 250, "--output"),
    "the root": (lambda out: None, "/", "--output"),
}


@pytest.mark.parametrize("case", OUTPUTS)
def test_output_that_is_refused(case: str, model: Path, converted: Path, refuses: Callable[..., None]) -> None:
    prepare, name, says = OUTPUTS[case]
    prepare(model.with_name("out"))
    output = model.parent / name
    refuses(hf_to_megatron.main, "--hf", model, "--output", output, says=["--output", says])
    if "input" not in case:
        refuses(megatron_to_hf.main, "--megatron", converted, "--output", output, says=["--output", says])


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """`mount(options)`: an empty file system in memory; needs the right to mount."""
    folder = tmp_path / "mount"
    folder.mkdir()

    def make(options: str) -> Path:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")
        return folder

    yield make
    if folder.is_mount():
        subprocess.run(["umount", folder], check=True)


def test_read_only_output(model: Path, mount: Callable[[str], Path], refuses: Callable[..., None]) -> None:
    output = mount("ro") / "out"
    refuses(hf_to_megatron.main, "--hf", model, "--output", output, says=["--output", os.strerror(errno.EROFS)])


@pytest.mark.parametrize("name", ["out", "new/out"])
@pytest.mark.parametrize("when", ["before", "while writing"])
def test_full_disk(when: str, name: str, model: Path, converted: Path, mount, refuses, monkeypatch) -> None:
    disk = mount("size=256k")  # the model has 0.9 MB
    if when == "while writing":  # the room was there when it was asked for
        monkeypatch.setattr(partial_folder.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9))
    says = [f"--output {disk / name}", "free"]
    refuses(hf_to_megatron.main, "--hf", model, "--output", disk / name, says=says)
    refuses(megatron_to_hf.main, "--megatron", converted, "--output", disk / name, says=says)


@pytest.mark.parametrize("option", ["--workers=0", "--workers=many", "--dtype=fp16", "--max-shard-size=0"])
def test_bad_option(option: str, hf: Path, converted: Path, tmp_path: Path, capfd) -> None:
    back = option.startswith("--max")
    module, source, folder = (megatron_to_hf, "--megatron", converted) if back else (hf_to_megatron, "--hf", hf)
    with pytest.raises(SystemExit, match="^2$"):
        call(module.main, source, folder, "--output", tmp_path / "out", option)
    assert f"error: argument {option.split('=')[0]}: " in capfd.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("script, option", [("hf_to_megatron", "--hf"), ("megatron_to_hf", "--megatron")])
def test_folder_that_does_not_exist(script: str, option: str, tmp_path: Path) -> None:
    """As a user runs it."""
    command = [sys.executable, f"convert/{script}.py", option, tmp_path / "none", "--output", tmp_path / "out"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S)
    line = error_line(done.stderr)
    assert done.returncode == 2 and done.stdout == "" and not list(tmp_path.iterdir())
    assert option in line and "no such folder" in line and "hub id" not in line  # these commands take no hub id


# -- Megatron -> Hugging Face ------------------------------------------------------------------------------------------


def index(change: Callable[..., object]) -> Damage:
    """`change(tensors, place)` of the unpickled .metadata (our own, so it may be loaded); `place` of the final norm."""

    def damage(folder: Path) -> None:
        content = pickle.loads((folder / METADATA).read_bytes())
        change(content.state_dict_metadata, next(p for k, p in content.storage_data.items() if k.fqn == FINAL_NORM))
        (folder / METADATA).write_bytes(pickle.dumps(content))

    return damage


def item(members: dict[str, bytes]) -> Damage:
    """Let the final norm lie in a file of its own, a zip with `members`."""

    def damage(folder: Path) -> None:
        file = folder / ITERATION / "__1_0.distcp"
        with zipfile.ZipFile(file, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)

        values = {"relative_path": file.name, "offset": 0, "length": file.stat().st_size}
        index(lambda tensors, place: place.__dict__.update(values))(folder)

    return damage


def saved(tensor: torch.Tensor) -> dict[str, bytes]:
    """The members of the zip that torch.save makes."""
    torch.save(tensor, buffer := io.BytesIO())
    with zipfile.ZipFile(buffer) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def layout(file: str = SINGLE, **norm: object) -> Damage:
    """Change what the manifest records of the Hugging Face file: its name, or its head's entry of the final norm."""

    def change(manifest: dict) -> None:
        head = json.loads(manifest["hf_files"][SINGLE])
        head[NORM] |= norm
        manifest["hf_files"] = {file: json.dumps(head)}

    return lambda folder: change_json(folder / "iter_0000000" / "tensor_manifest.json", change)


MANIFEST = ["tensor_manifest.json", "remove it"]
MEGATRON_DAMAGE: dict[str, tuple[Damage, list[str]]] = {
    "no folder": (shutil.rmtree, ["--megatron", "not a Megatron checkpoint"]),
    "no tracker": (without(TRACKER), ["--megatron", "not a Megatron checkpoint"]),
    "tracker: missing": (text(TRACKER, "12\n"), [TRACKER, "says 12", "iter_0000012"]),
    "tracker: word": (text(TRACKER, "../..\n"), [TRACKER, "'../..'"]),
    "tracker: bytes": (text(TRACKER, b"\xff\xfe"), [TRACKER]),
    "index: empty": (text(METADATA, b""), [".metadata is damaged"]),
    "index: cut": (lambda folder: shorten(folder, METADATA), [".metadata is damaged"]),
    "index: other": (text(METADATA, pickle.dumps([1])), [".metadata is not the index"]),
    "index: odd place": (index(lambda tensors, place: place.__dict__.update(offset="x")), [FINAL_NORM]),
    "index: odd chunk": (
        index(lambda tensors, place: tensors[FINAL_NORM].chunks[0].__dict__.update(sizes=())),
        [".metadata"],
    ),
    "items: cut": (lambda folder: shorten(folder, WEIGHTS), ["__0_0.distcp", "too short"]),
    "items: gone": (without(WEIGHTS), ["__0_0.distcp", "No such file"]),
    "item: no tensor": (item({"a/data.pkl": pickle.dumps(5)}), [FINAL_NORM]),
    "item: odd names": (item({"data.pkl": b""}), [FINAL_NORM]),
    "item: short": (item(saved(torch.zeros(128)) | {"archive/data/0": b"", "archive/more": bytes(512)}), [FINAL_NORM]),
    "missing tensor": (index(lambda tensors, place: tensors.pop(FINAL_NORM)), [FINAL_NORM, "missing"]),
    "missing chunk": (index(lambda tensors, place: tensors[FINAL_NORM].chunks.clear()), [FINAL_NORM]),
    "extra tensor": (config(tie_word_embeddings=True), ["1 tensors do not belong", "output_layer.weight"]),
    "wrong shape": (config(intermediate_size=64), ["linear_fc1", "config.json says (2, 128, 128)"]),
    "more layers": (config(num_hidden_layers=3), ["decoder.layers", "config.json says (3, "]),
    "fewer layers": (config(num_hidden_layers=1), ["decoder.layers", "config.json says (1, "]),
    "no config": (without("config.json"), ["no config.json", "--hf-template"]),
    "backend: other": (text(BACKEND, '{"sharded_backend": "zarr"}'), ["'zarr'", "torch_dist"]),
    "backend: gone": (without(BACKEND), ["metadata.json"]),
    "manifest: cut": (lambda folder: shorten(folder, "iter_0000000/tensor_manifest.json"), ["damaged", *MANIFEST]),
    "manifest: list": (text("iter_0000000/tensor_manifest.json", "[]"), ["damaged", *MANIFEST]),
    "manifest: overlap": (layout(data_offsets=[0, 512]), MANIFEST),
    "manifest: before the file": (layout(data_offsets=[-600, -88]), MANIFEST),
    "manifest: outside": (layout("../elsewhere.safetensors"), MANIFEST),
    "manifest: no weights file": (layout("config.json"), MANIFEST),
}


@pytest.mark.parametrize("case", MEGATRON_DAMAGE)
def test_checkpoint_that_is_refused(case: str, checkpoint: Path, refuses: Callable[..., None]) -> None:
    damage, says = MEGATRON_DAMAGE[case]
    damage(checkpoint)
    refuses(megatron_to_hf.main, "--megatron", checkpoint, "--output", checkpoint.with_name("out"), says=says)


def test_checkpoint_is_not_written_into_itself(checkpoint: Path, refuses: Callable[..., None]) -> None:
    output = checkpoint / ITERATION / "hf"
    refuses(megatron_to_hf.main, "--megatron", checkpoint, "--output", output, says=["lies in the folder --megatron"])


RUNS_A_COMMAND = [("os", "system"), ("builtins", "eval"), ("torch", "os.system"), ("pathlib", "os.system")]


@pytest.mark.parametrize("place", [METADATA, "data.pkl", f"{ITERATION}/common.pt"])
@pytest.mark.parametrize("names", [*RUNS_A_COMMAND, ("torch", "load"), ("collections", "OrderedDict")])
def test_pickles_are_not_run(place: str, names: tuple[str, str], checkpoint: Path, tmp_path: Path, refuses) -> None:
    marker, output = tmp_path / "marker", tmp_path / "out"
    evil = payload(*names, f"open('{marker}', 'w')" if names[1] == "eval" else f"touch '{marker}'")
    if names in RUNS_A_COMMAND:  # the payload would work
        pickle.loads(evil)
        marker.unlink()
    damage = item({"a/data.pkl": evil, "a/data/0": bytes(512)}) if place == "data.pkl" else text(place, evil)
    damage(checkpoint)
    if place.endswith("common.pt"):  # never looked at
        assert call(megatron_to_hf.main, "--megatron", checkpoint, "--output", output) == 0
    else:
        refuses(megatron_to_hf.main, "--megatron", checkpoint, "--output", output, says=[str(checkpoint)])
    assert not marker.exists()


def test_verify_names_what_differs(hf: Path, checkpoint: Path, refuses: Callable[..., None], capfd) -> None:
    assert call(verify.main, hf, checkpoint) == call(verify.main, checkpoint) == 0
    stored = bytearray((checkpoint / WEIGHTS).read_bytes())
    stored[stored.index(load_file(hf / SINGLE)[NORM].numpy().tobytes())] ^= 1
    (checkpoint / WEIGHTS).write_bytes(stored)
    capfd.readouterr()
    assert call(verify.main, hf, checkpoint) == call(verify.main, checkpoint) == 1
    assert capfd.readouterr().out.count(NORM) == 3  # not equal to the other folder's; not the manifest's, both times
    refuses(verify.main, hf, says=["no tensor_manifest.json", "second folder"])
    refuses(verify.main, hf, hf.with_name("none"), says=["no such folder"])


# -- stopped in the middle ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def big(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 120 MB: enough is left to do where a conversion of it is stopped."""
    folder = tmp_path_factory.mktemp("big")
    shutil.copy(hf / "config.json", folder)
    config(hidden_size=1024, intermediate_size=2048, num_hidden_layers=3, vocab_size=256)(folder)
    weights = {}
    for number, (name, dims) in enumerate(expected_shapes(ModelFacts.from_folder(folder)).items()):
        weights[name] = torch.arange(torch.Size(dims).numel(), dtype=torch.float32).reshape(dims) + number
    save_file(weights, folder / SINGLE, metadata={"format": "pt"})
    return folder


def partial(output: Path) -> Path:
    return output.with_name(f".{output.name}.partial")


STOPS_ITSELF = """
import signal, sys, threading
from remax_megatron.convert import hf_to_megatron
from remax_megatron.weights.mapped import MappedFiles

read, blocks = MappedFiles.read, iter(range(10**9))

def read_or_stop(self, extent):
    if next(blocks) == 50:
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)  # this thread, so that it stops right here
    return read(self, extent)

MappedFiles.read = read_or_stop
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
sys.exit(hf_to_megatron.main())
"""


@contextlib.contextmanager
def stopped_in_the_middle(hf: Path, output: Path) -> Iterator[subprocess.Popen]:
    """A real process of its own that converts, and stops in the middle of a tensor, when some are written."""
    command = [sys.executable, "-c", STOPS_ITSELF, "--hf", hf, "--output", output, "--workers", "1"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        assert process.poll() is None, process.communicate()
        done = (partial(output) / "journal.jsonl").read_text().count('"job"')
        assert done == 3 and not output.exists()  # of 23, the largest first
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def killed(big: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a conversion that was killed; tests copy what it left."""
    output = tmp_path_factory.mktemp("killed") / "out"
    with stopped_in_the_middle(big, output) as process:
        process.kill()
    assert os.listdir(output.parent) == [partial(output).name]
    return output


@pytest.fixture
def left(killed: Path, tmp_path: Path) -> Path:
    """An output of this test's own, with what the killed conversion left beside it."""
    shutil.copytree(partial(killed), partial(tmp_path / "out"))
    return tmp_path / "out"


def finish(hf: Path, output: Path) -> None:
    """--resume completes the conversion, and nothing but the output is left."""
    assert call(hf_to_megatron.main, "--hf", hf, "--output", output, "--resume") == 0
    assert call(verify.main, hf, output) == call(verify.main, output) == 0
    assert os.listdir(output.parent) == ["out"] and not (output / "journal.jsonl").exists()


def test_kill(big: Path, left: Path, refuses: Callable[..., None]) -> None:
    argv = [hf_to_megatron.main, "--hf", big, "--output", left]
    refuses(*argv, says=["interrupted", "--resume", str(partial(left))])
    refuses(*argv, "--resume", "--dtype", "bf16", says=["--resume", "other settings"])
    finish(big, left)


def test_resume_with_another_input(big: Path, left: Path, refuses: Callable[..., None]) -> None:
    before = (big / SINGLE).stat()
    os.utime(big / SINGLE)  # as if it had been written again
    refuses(hf_to_megatron.main, "--hf", big, "--output", left, "--resume", says=["--resume", "other input"])
    os.utime(big / SINGLE, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_resume_with_damage(big: Path, left: Path) -> None:
    """Bytes that changed after they were written, and a line of the journal that was cut short."""
    with open(partial(left) / WEIGHTS, "r+b") as file:
        for offset in range(100_000, os.fstat(file.fileno()).st_size, 2_000_000):
            (byte,) = os.pread(file.fileno(), 1, offset)
            os.pwrite(file.fileno(), bytes([byte ^ 1]), offset)
    with open(partial(left) / "journal.jsonl", "a") as journal:
        journal.write('{"job": "0:decoder.la')
    finish(big, left)


def test_two_at_once(big: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    argv, said = ["--hf", big, "--output", tmp_path / "out"], []
    with stopped_in_the_middle(big, tmp_path / "out") as process:
        for more in (["--resume"], []):
            assert call(hf_to_megatron.main, *argv, *more) == 2
            said.append(error_line(capfd.readouterr().err))
        process.send_signal(signal.SIGCONT)
        assert process.wait(TIMEOUT_S) == 0
    assert os.listdir(tmp_path) == ["out"] and call(verify.main, big, tmp_path / "out") == 0
    assert all("another process is converting" in line for line in said), said


def test_interrupt(big: Path, tmp_path: Path) -> None:
    with stopped_in_the_middle(big, tmp_path / "out") as process:
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGCONT)
        _, stderr = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 130 and b"--resume" in stderr and b"Traceback" not in stderr
    assert os.listdir(tmp_path) == [".out.partial"]
    finish(big, tmp_path / "out")
