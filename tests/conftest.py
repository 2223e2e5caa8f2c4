"""Shared fixtures: a tiny random Llama for contracts, and the real data set and small model for figures."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).parent.parent
TASKS = ROOT / "lmeval_ext" / "tasks"
VOCABULARY = 384


def make_tokenizer(folder: Path, vocabulary: int = VOCABULARY, bos: bool = False) -> None:
    """A byte-level BPE of SmolLM2's kind, trained on the bundled text; with `bos` it puts <s> before every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    from lmeval_ext.tasks.corpus import SAMPLE

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(SAMPLE.read_text(encoding="utf-8").splitlines(), trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def make_llama(folder: Path, dtype: str = "float32", vocabulary: int = VOCABULARY, **config: Any) -> Path:
    """A random two-layer Llama with a context of 256 tokens, and its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,  # large enough for logits that differ
        "tie_word_embeddings": False,
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(settings | config)))
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def bos_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "bos-tokenizer"
    make_tokenizer(folder, bos=True)
    return folder


def load_task(name: str, **metadata: Any) -> Any:
    """One of our tasks, without the seven seconds in which the harness indexes its own."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata)
    return manager.load([name])["tasks"][name]


def evaluate(model: Any, task: str, limit: int | None = None, metadata: Any = None, **model_args: Any) -> Any:
    """simple_evaluate with our tasks only. `model`: a registered name, or a model object."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    merged = model_args | (metadata or {})
    return lm_eval.simple_evaluate(
        model=model,
        model_args=model_args if isinstance(model, str) else None,
        tasks=[task],
        limit=limit,
        device="cpu" if model == "hf" else None,
        batch_size=merged.pop("batch", None),
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False, metadata=merged),
    )


def run(*command: str | Path, env: dict[str, str] | None = None, cwd: Path | None = None) -> Any:
    """A command of this environment, as a user would type it: completed process with text output."""
    name, *arguments = map(str, command)
    program = Path(sys.executable).parent / name
    return subprocess.run(
        [str(program), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **(env or {})},
        cwd=cwd,
        timeout=900,
        check=False,
    )


@pytest.fixture(scope="session")
def wikitext() -> Path:
    """The folder with WikiText-2's test split (wiki.test.raw and its parquet file), named by WIKITEXT2_DIR."""
    named = os.environ.get("WIKITEXT2_DIR")
    if not named:
        pytest.skip("WIKITEXT2_DIR is not set: a folder with wiki.test.raw and test-*.parquet of wikitext-2-raw-v1")
    folder = Path(named)
    if not (folder / "wiki.test.raw").is_file():
        pytest.fail(f"WIKITEXT2_DIR={named}: no wiki.test.raw there")
    return folder
