"""`pytest --fast`, markers by folder, and shared fixtures: a tiny random Llama, and the real data set."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests import fast_guard

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).parent.parent
TASKS = ROOT / "lmeval_ext" / "tasks"
VOCABULARY = 384
# Folders whose tests all have one marker
FOLDER_MARKERS = {"gpu": "gpu", "conformance": "engine", "demo": "engine"}
# Pictures are drawn as SVG in every test of them; these formats repeat the same test, more slowly
SLOW_FORMATS = {"png", "pdf"}


# A busy machine is not a failure
settings.register_profile("tests", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="only tests without an engine, a browser or Ray: make fast")


def pytest_configure(config: pytest.Config) -> None:
    os.environ.pop("COLUMNS", None)  # pytest-xdist sets it, and `compare table` would then wrap its rows
    if config.getoption("--fast"):
        config.option.markexpr = " and ".join(f"not {marker}" for marker in fast_guard.MARKERS)
        fast_guard.watch_commands()
        fast_guard.fast.append(True)


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tests = Path(__file__).parent
    for item in items:
        if tests not in item.path.parents:
            continue
        folder = item.path.relative_to(tests).parts[0]
        if folder in FOLDER_MARKERS:
            item.add_marker(FOLDER_MARKERS[folder])
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if any(isinstance(value, str) and value in SLOW_FORMATS for value in parameters):
            item.add_marker("slow")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`--fast` does not even import the folders and files that it would leave out as a whole."""
    if not config.getoption("--fast"):
        return None
    left_out = collection_path.parent == Path(__file__).parent and collection_path.name in FOLDER_MARKERS
    return True if left_out or fast_guard.leaves_out(collection_path) else None


def pytest_collection_finish(session: pytest.Session) -> None:
    broken = fast_guard.violation() if session.config.getoption("--fast") else None
    if broken:
        raise pytest.UsageError(f"the collection {broken}")


@pytest.fixture(autouse=True)
def _fast_guard(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    broken = fast_guard.violation() if request.config.getoption("--fast") else None
    if broken:
        pytest.fail(broken)


def make_tokenizer(folder: Path, vocabulary: int = VOCABULARY, bos: bool = False) -> None:
    """Writes a byte-level BPE like SmolLM2's, trained on the bundled text; with `bos` it puts <s> before every text."""
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
    """Writes a random two-layer Llama with a context of 256 tokens, and its tokenizer."""
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
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer of `tiny_llama` and its context length: all that a task reads, without weights."""
    folder = tmp_path_factory.mktemp("models") / "tiny-tokenizer"
    make_tokenizer(folder)
    (folder / "config.json").write_text('{"model_type": "llama", "max_position_embeddings": 256}')
    return folder


@pytest.fixture(scope="session")
def bos_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "bos-tokenizer"
    make_tokenizer(folder, bos=True)
    return folder


def random_ids(n: int, seed: int = 0) -> list[int]:
    """Returns `n` random tokens of `make_llama`'s vocabulary, none of them special."""
    import numpy as np

    return list(np.random.default_rng(seed).integers(2, VOCABULARY, n).tolist())


def load_task(name: str, **metadata: Any) -> Any:
    """Loads one of our tasks; the harness' own are not indexed, which would take seven seconds."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata)
    return manager.load([name])["tasks"][name]


def simple_evaluate(**arguments: Any) -> Any:
    """The harness' own, which describes the machine with the output of ten commands: here once per process."""
    import lm_eval
    from torch.utils import collect_env

    if not hasattr(collect_env.get_pretty_env_info, "cache_info"):
        collect_env.get_pretty_env_info = functools.cache(collect_env.get_pretty_env_info)
    return lm_eval.simple_evaluate(**arguments)


def evaluate(model: Any, task: str, limit: int | None = None, metadata: Any = None, **model_args: Any) -> Any:
    """Runs simple_evaluate with our tasks only. `model`: a registered name, or a model object."""
    from lm_eval.tasks import TaskManager

    merged = model_args | (metadata or {})
    return simple_evaluate(
        model=model,
        model_args=model_args if isinstance(model, str) else None,
        tasks=[task],
        limit=limit,
        device="cpu" if model == "hf" else None,
        batch_size=merged.pop("batch", None),
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False, metadata=merged),
    )


def run(*command: str | Path, env: dict[str, str] | None = None, cwd: Path | None = None) -> Any:
    """Runs a command of this environment, as a user would type it, and returns the process with its text output."""
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
