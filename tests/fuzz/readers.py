"""The readers to fuzz: for each, sound files to damage, and a check of what it returns or refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz.mutations import damage, damage_json, dump


class Unsound(AssertionError):
    """A reader's message has several lines, or does not name its file."""


def check_message(message: str, name: str, longest: int = 2000) -> None:
    """Raises Unsound unless the message is one line of at most `longest` characters that contains `name`."""
    if "\n" in message or len(message) > longest or name not in message:
        raise Unsound(f"expected one line that names {name}, got {message[:300]!r}")


@dataclass(frozen=True)
class Reader:
    """A reader under test.

    make: returns damaged files, by name, from a random source. read: runs the reader on their folder, and raises on any
    mistake.
    """

    name: str
    make: Callable[[Random], dict[str, bytes]]
    read: Callable[[Path], None]

    def prepare(self, folder: Path, random: Random) -> dict[str, bytes]:
        """Writes the files of one case and returns them."""
        files = self.make(random)
        for name, data in files.items():
            (folder / name).write_bytes(data)
        return files


# ------------------------------------------------------------------ checkpoints


def _header() -> dict[str, Any]:
    from tests.storage.builders import dense, header_of

    header, _ = header_of(dense(layers=1, hidden=8, inner=8, vocab=8))
    return {"__metadata__": {"format": "pt"}, **header}


def _file(header: bytes, size: int) -> bytes:
    return len(header).to_bytes(8, "little") + header + bytes(size)


def _size(header: dict[str, Any]) -> int:
    return max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")


def _safetensors(random: Random) -> dict[str, bytes]:
    header = _header()
    if random.random() < 0.5:
        return {"model.safetensors": damage(_file(json.dumps(header).encode(), _size(header)), random)}
    return {"model.safetensors": _file(dump(damage_json(header, random), random), _size(header))}


def _inspect(name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        from lmeval_ext.storage import StorageError, StorageInfo, inspect

        try:
            info = inspect(folder / name)
        except StorageError as error:
            check_message(str(error), str(folder))
            return
        if not isinstance(info, StorageInfo):
            raise Unsound(f"inspect returned {type(info)}")
        json.dumps(info.to_dict(), allow_nan=False)

    return read


def _gguf_file() -> bytes:
    """Returns a GGUF file from llama.cpp's own Python writer, with scalars, strings and arrays in its metadata."""
    import tempfile

    import gguf
    import numpy as np

    from tests.storage.builders import finish_gguf

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_token_list(["a", "b", "c"])
        writer.add_token_scores([0.0, 1.0, 2.0])
        writer.add_block_count(1)
        writer.add_file_type(0)
        for name in ("token_embd.weight", "blk.0.ffn_up.weight", "output.weight"):
            writer.add_tensor(name, np.zeros((4, 32), np.float32))
        finish_gguf(writer)
        return path.read_bytes()


def _gguf(random: Random) -> dict[str, bytes]:
    return {"model.gguf": damage(_cached(_gguf_file), random)}


_cache: dict[Callable[[], Any], Any] = {}


def _cached(make: Callable[[], Any]) -> Any:
    if make not in _cache:
        _cache[make] = make()
    return _cache[make]


def _index(random: Random) -> dict[str, bytes]:
    header = _header()
    names = [name for name in header if name != "__metadata__"]
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    raw = dump(damage_json(index, random), random) if random.random() < 0.7 else damage(dump(index, random), random)
    return {
        "model.safetensors.index.json": raw,
        "model-00001-of-00001.safetensors": _file(json.dumps(header).encode(), _size(header)),
    }


CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 1, "hidden_size": 8,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "max_position_embeddings": 64, "vocab_size": 8,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "sliding_window": None, "layer_types": ["full_attention"],
    "text_config": {"num_hidden_layers": 1},
    "quantization_config": {
        "quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "bits": 4, "group_size": 16,
        "config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 16, "type": "float"}}},
        "ignore": ["lm_head"], "kv_cache_scheme": {"num_bits": 8, "type": "float"},
    },
}  # fmt: skip


def _config(random: Random) -> dict[str, bytes]:
    header = _header()
    raw = dump(damage_json(CONFIG, random), random) if random.random() < 0.7 else damage(dump(CONFIG, random), random)
    return {"config.json": raw, "model.safetensors": _file(json.dumps(header).encode(), _size(header))}


# ------------------------------------------------------------------ compare


def _results() -> list[dict[str, Any]]:
    from tests.compare.conftest import result
    from tests.compare.divergence_files import divergent
    from tests.compare.harness_files import suite

    return [result(), suite(), result(quantized=False), divergent()[0], divergent("BF16", "full precision")[0]]


def _result(random: Random) -> dict[str, bytes]:
    document = random.choice(_cached(_results))
    raw = damage_json(document, random) if random.random() < 0.7 else None
    data = damage(json.dumps(document).encode(), random) if raw is None else dump(raw, random)
    return {"results_1.json": data, "results_2.json": json.dumps(_cached(_results)[1]).encode()}


def _read_results(folder: Path) -> None:
    from compare.comparison.build import build_comparisons
    from compare.comparison.comparison import Options
    from compare.errors import CompareError
    from compare.results.provenance import command
    from compare.results.reading import read_results
    from compare.table.formats import render_csv, render_json, render_markdown

    reading = read_results([folder])
    for problem in reading.problems:
        if "\n" in problem.reason or len(problem.reason) > 500:
            raise Unsound(f"expected one line, got {problem.reason[:300]!r}")
    for record in reading.records:
        command(record.run, record.task)
    _draw_distributions(reading.records)
    task = reading.records[0].task
    metric = next(iter(reading.records[0].metrics))
    for options in (Options(metrics=(f"{task}/{metric}",), pareto=True, budget=8.0, context=100),
                    Options(metrics=("mmlu/acc",), subtasks=True, mean=True),
                    Options(metrics=("mmlu/acc", "gsm8k/exact_match"))):  # fmt: skip
        try:
            comparisons = build_comparisons(reading.records, options)
        except CompareError as error:
            check_message(str(error), "", 20_000)
            continue
        for render in (render_json, render_csv, render_markdown):
            render(comparisons)


def _draw_distributions(records: list[Any]) -> None:
    """Computes the points of divergence plots and their places, without drawing them."""
    from compare.comparison.build import build_comparison
    from compare.comparison.comparison import Options
    from compare.errors import CompareError
    from compare.plot import distributions, series
    from compare.plot.pictures import histogram, spread

    try:
        comparison = build_comparison(records, Options(metrics=("wiki2_strided/kld",)))
    except CompareError as error:
        check_message(str(error), "", 20_000)
        return
    series.arrange(comparison, None)
    spread.lowest(distributions.boxes(comparison), True)
    for point in distributions.histograms(comparison).points:
        histogram.outside(point)
        histogram._steps(point)


def _samples(random: Random) -> dict[str, bytes]:
    """Returns two runs with samples; those of the second are damaged, as JSON in one line or as bytes."""
    files: dict[str, bytes] = {}
    for number, (content, lines) in enumerate(_cached(_runs)):
        files[f"results_{number}.json"] = json.dumps(content).encode()
        raw = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        if number:
            raw = damage(raw, random) if random.random() < 0.4 else b"\n".join(_damaged(lines, random))
        files[f"samples_wiki2_strided_{number}.jsonl"] = raw
    return files


def _damaged(lines: list[dict[str, Any]], random: Random) -> list[bytes]:
    chosen = random.randrange(len(lines))
    return [dump(damage_json(line, random), random) if i == chosen else json.dumps(line).encode()
            for i, line in enumerate(lines)]  # fmt: skip


def _runs() -> list[Any]:
    from tests.compare.divergence_files import divergent

    return [divergent("a", windows=20), divergent("b", windows=20, size=0.05, seed=2)]


def _read_samples(folder: Path) -> None:
    from compare.comparison.build import build_comparisons
    from compare.comparison.comparison import Options
    from compare.comparison.pairs import check_formed, measure_pairs
    from compare.errors import CompareError
    from compare.results.reading import read_results
    from compare.table.formats import render_csv, render_json, render_markdown

    for comparison in build_comparisons(read_results([folder]).records, Options(metrics=("kld", "token_perplexity"))):
        comparison.pairs = measure_pairs(comparison.points, comparison.metric, "a")
        for pair in comparison.pairs.pairs.values():
            if pair.reason:
                check_message(pair.reason, "")
        try:
            check_formed("a", [comparison.pairs])
        except CompareError as error:
            check_message(str(error), "")
        for render in (render_json, render_csv, render_markdown):
            render([comparison])


MODELS: list[dict[str, Any]] = [
    {"load_fn": "transformers", "model_dir": "m", "label": "A", "override_bpw_layer": 4.5, "gpus": 1, "tasks": ["t"]},
    {"model": "vllm_nvfp4", "args": {"pretrained": "m", "dtype": "bfloat16"}, "label": "[red] B", "reference": True,
     "options": {"num_fewshot": 2, "seed": 1, "gen_kwargs": {"a": 1}}},
    {"load_fn": "exllamav3", "model_dir": ["m", {"a": 1}], "label": "C", "family": "EXL3"},
]  # fmt: skip
DATA: dict[str, Any] = {
    "tokenize_fn": "transformers", "tokenizer_dir": "t", "dataset": "wiki2", "eval_stride": 512, "eval_len": 2048,
    "max_rows": 20, "chat_template": False, "warmup_tokens": 3, "bos": "once", "metadata": {"a": 1}, "tasks": ["a"],
    "options": {"batch_size": "auto"},
}  # fmt: skip
YAML = b"""\
- &a {load_fn: transformers, model_dir: m, label: "A", date: 2001-01-01}
- model: hf_quant
  args: {pretrained: m, n: 0x1f, time: 1:30, x: .inf, y: ~, anchors: [&b 1, *b]}
  label: |
    B
- <<: *a
  label: C
"""


def _spec(random: Random) -> dict[str, bytes]:
    files = {}
    for name, document in (("models.json", MODELS), ("data.json", DATA)):
        raw = dump(damage_json(document, random), random)
        files[name] = raw if random.random() < 0.7 else damage(json.dumps(document).encode(), random)
    files["models.yaml"] = damage(YAML if random.random() < 0.6 else files["models.json"], random)
    return files


def _read_specs(folder: Path) -> None:
    from compare.errors import CompareError
    from compare.run.plan.job_settings import JobSettings
    from compare.run.specs.loading import load_data, load_models

    data = None
    try:
        data = load_data(folder / "data.json")
    except CompareError as error:
        check_message(str(error), str(folder / "data.json"), 20_000)
    for name in ("models.json", "models.yaml"):
        try:
            entries, problems = load_models([str(folder / name)])
            for problem in problems:
                check_message(problem, name, 20_000)
            plan = JobSettings(data, folder / "data.json" if data else None, (), None)
            for entry in entries:
                plan.job(entry)
        except CompareError as error:
            check_message(str(error), str(folder), 20_000)  # or data.json, whose text is what is wrong


def _labels(random: Random) -> dict[str, bytes]:
    index = {
        "version": 1,
        "results": {"KEY": [{"label": "A [red]", "family": "gguf", "reference": True, "vram_gb": 3.0}]},
    }
    raw = dump(damage_json(index, random), random) if random.random() < 0.7 else damage(dump(index, random), random)
    return {"compare_run.json": raw}


def _read_labels(folder: Path) -> None:
    from compare.errors import CompareError
    from compare.results.reading import read_results

    key = folder / "KEY"
    if not key.exists():
        key.mkdir()
        (key / "results_1.json").write_text(json.dumps(_cached(_results)[0]))
    try:
        read_results([key])
    except CompareError as error:
        check_message(str(error), str(folder))


READERS = {
    reader.name: reader
    for reader in (
        Reader("safetensors", _safetensors, _inspect("model.safetensors")),
        Reader("gguf", _gguf, _inspect("model.gguf")),
        Reader("index", _index, _inspect("")),
        Reader("config", _config, _inspect("")),
        Reader("result", _result, _read_results),
        Reader("samples", _samples, _read_samples),
        Reader("spec", _spec, _read_specs),
        Reader("labels", _labels, _read_labels),
    )
}
