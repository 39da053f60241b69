"""Every file of examples/, loaded as the trainer, the data reader or Slurm loads it. Commands: test_commands.py."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch

from remax_megatron.config.load import load_config
from remax_megatron.config.rules import validate
from remax_megatron.data.dataset import load_prompts
from remax_megatron.rewards.pool import RewardPool
from remax_megatron.rewards.scorer import ScoreRequest, ScoreResult
from remax_megatron.rewards.scoring import load_scorer
from tests import ROOT

EXAMPLES = ROOT / "examples"
SLURM_JOB = EXAMPLES / "slurm_job" / "own_7b.sh"


def test_every_example_has_a_page_and_is_listed():
    folders = [folder for folder in EXAMPLES.iterdir() if folder.is_dir() and folder.name != "__pycache__"]
    listed = re.findall(r"\]\((\w+)/README.md\)", (EXAMPLES / "README.md").read_text())
    assert sorted(folder.name for folder in folders) == sorted(listed)
    assert all((folder / "README.md").is_file() for folder in folders)


@pytest.mark.parametrize(
    ("solution", "score", "right"),
    [
        ("Anna has 9-4=5 coins.\n#### 5", 1.0, 1.0),
        ("Anna has 9-4=5 coins.\n#### 1,005.", 0.0, 0.0),
        ("5", 0.0, 0.0),
        (f"{'Anna counts. ' * 5}\n#### 5", 0.9, 1.0),
    ],
)
def test_own_reward(solution, score, right):
    scorer = load_scorer(str(EXAMPLES / "own_reward" / "reward.py"))
    assert scorer.score(ScoreRequest("my_sums", solution, "5")) == ScoreResult(score, extra={"right": right})


@pytest.mark.parametrize(
    ("solution", "reward"), [("Step 1: add them.", 1.0), ("Sure.\n1. Add", 1.0), ("It is 12.", 0.0)]
)
def test_format_reward(solution, reward):
    scorer = load_scorer(str(EXAMPLES / "smollm" / "format_reward.py"))
    assert scorer.score(ScoreRequest("openai/gsm8k", solution, "12")) == ScoreResult(reward)


@pytest.mark.parametrize(
    ("file", "settings", "scores"),
    [
        ("async_judge", {"kwargs": {"seconds": 0.1}}, (1.0, 0.0)),
        ("class_judge", {"name": "Judge", "kwargs": {"partial": 0.5}}, (1.0, 0.5)),
    ],
)
def test_judges(file, settings, scores):
    turns = [{"role": "user", "content": "9 - 4?"}]
    answers = [ScoreRequest("sums", f"#### {n}", 5, prompt=turns) for n in (5, 6)]
    with RewardPool(1, 10.0, path=str(EXAMPLES / "judges" / f"{file}.py"), **settings) as pool:
        results = pool.score(answers)
    assert tuple(result.score for result in results) == scores
    if file == "async_judge":
        assert [result.texts for result in results] == [{"why": "right"}, {"why": "wrong"}]


def test_own_data(tmp_path):
    """The files that the script writes are prompts for the demo's model, and the page shows a row of them."""
    from remax_megatron.demo.warm_start import make_tokenizer

    script = EXAMPLES / "own_data" / "make_data.py"
    subprocess.run([sys.executable, script, "--local_dir", tmp_path], check=True, timeout=60)
    limit = load_config("demo").config.data.max_prompt_length
    tokenizer = make_tokenizer()
    train, val = (
        load_prompts(tmp_path / f"{name}.jsonl", tokenizer, max_prompt_length=limit, filter_overlong_prompts=False)
        for name in ("train", "val")
    )
    assert (len(train), len(val)) == (1280, 128) and not {p.token_ids for p in train} & {p.token_ids for p in val}
    first = train[0]
    assert first.data_source == "my_sums" and first.extra_info["index"] == 0
    assert first.ground_truth == str(first.extra_info["first"] - first.extra_info["second"])

    (shown,) = re.findall(r"```json\n(.*?)```", (EXAMPLES / "own_data" / "README.md").read_text(), re.DOTALL)
    (tmp_path / "shown.jsonl").write_text(shown.replace("\n", ""))
    (prompt,) = load_prompts(tmp_path / "shown.jsonl", tokenizer, max_prompt_length=100)
    assert (prompt.data_source, prompt.ground_truth) == ("my_sums", "5")


def test_smollm_preset():
    config = load_config("smollm", config_dir=EXAMPLES / "smollm").config
    assert validate(config, config.trainer.n_gpus_per_node, None) == []
    assert (ROOT / config.custom_reward_function.path).is_file()


def test_a_llama_stored_as_qwen2_answers_alike():
    from transformers import LlamaConfig, LlamaForCausalLM

    sys.path.insert(0, str(EXAMPLES / "smollm"))
    try:
        from as_qwen2 import as_qwen2
    finally:
        sys.path.pop(0)
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 3, "num_key_value_heads": 1}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=2, tie_word_embeddings=True, **sizes))
    llama = llama.to(torch.bfloat16)
    ids = torch.randint(0, 64, (2, 16))
    with torch.no_grad():
        assert torch.equal(as_qwen2(llama)(ids).logits, llama(ids).logits)


def test_slurm_job():
    """Sound bash, the header of the 7B job but for its name, and settings that the trainer takes."""
    subprocess.run(["bash", "-n", SLURM_JOB], check=True, timeout=30)
    text, shipped = SLURM_JOB.read_text(), (ROOT / "slurm" / "remax_7b.sh").read_text()
    header, as_shipped = (re.findall(r"^#SBATCH (?!--job-name).*", t, re.MULTILINE) for t in (text, shipped))
    assert header == as_shipped
    (settings,) = re.findall(r"^settings=\(\n(.*?)\n\)", text, re.DOTALL | re.MULTILINE)
    overrides = settings.replace('"', "").replace("$home", str(ROOT)).split()
    config = load_config("qwen2_5_7b", overrides).config
    validate(config, config.trainer.n_gpus_per_node, None)
    load_scorer(config.custom_reward_function.path)
