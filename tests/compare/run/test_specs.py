"""Spec files: the guide's JSON and our YAML, the job of each entry, and the messages about mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compare.errors import CompareError
from compare.run.plan.job import Job
from compare.run.plan.job_settings import GIB, JobSettings
from compare.run.specs.engines import LOAD_FNS
from compare.run.specs.loading import load_data, load_models

ROOT = Path(__file__).parents[3]

GUIDE_DATA = {
    "tokenize_fn": "transformers",
    "tokenizer_dir": "model/",
    "dataset": "wiki2",
    "eval_stride": 512,
    "eval_len": 2048,
    "max_rows": 20,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"max_position_embeddings": 131072}))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    return tmp_path


def write(folder: Path, content: Any, name: str = "models.json") -> str:
    file = folder / name
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(file)


def jobs(folder: Path, models: Any, data: Any = None, name: str = "models.json", **shared: Any) -> list[Job]:
    entries, problems = load_models([write(folder, models, name)])
    assert problems == []
    data_file = Path(write(folder, GUIDE_DATA if data is None else data, "data.json"))
    settings = JobSettings(load_data(data_file), data_file, **shared)
    return [settings.job(entry) for entry in entries]


def job(folder: Path, entry: dict[str, Any], data: Any = None, **shared: Any) -> Job:
    return jobs(folder, [entry], data, **shared)[0]


def test_guide_json_works_unchanged(folder: Path) -> None:
    made = job(folder, {"load_fn": "vllm", "fwd_fn": "vllm", "label": "vLLM NVFP4", "model_dir": "model"})
    model = str(folder / "model")
    assert (made.label, made.model, made.tasks) == ("vLLM NVFP4", "vllm_nvfp4", ("wiki2_strided",))
    assert made.args == {"pretrained": model, "max_model_len": 2560}  # compare_q loads for window + 512
    assert made.metadata == {
        "tokenizer": model,
        "dataset": "wiki2",
        "eval_len": 2048,
        "stride": 512,
        "max_rows": 20,
        "blank_rows": "keep",
    }
    words = made.arguments(folder / "out")
    assert words[:3] == ["run", "--model", "vllm_nvfp4"]
    assert json.loads(words[words.index("--model_args") + 1])["label"] == "vLLM NVFP4"


@pytest.mark.parametrize(
    ("load_fn", "model", "args"),
    [
        ("transformers", "hf_quant", {"dtype": "float16"}),
        ("transformers_auto", "hf_quant", {"dtype": "float16", "parallelize": True}),
        ("transformers_auto_bf16", "hf_quant", {"dtype": "bfloat16", "parallelize": True}),
        ("transformers_mm", "hf_quant", {"dtype": "float16", "multimodal": True}),
        ("anyprecision", "hf_quant", {"dtype": "float16"}),
        ("qtip", "hf_quant", {"dtype": "float16"}),
        ("exllamav2", "exllamav2", {}),
        ("exllamav3", "exllamav3", {}),
    ],
)
def test_load_fn_selects_model_and_arguments(folder: Path, load_fn: str, model: str, args: dict[str, Any]) -> None:
    made = job(folder, {"load_fn": load_fn, "model_dir": "model", "label": "x"})
    assert (made.model, made.args, made.unavailable) == (model, {**args, "pretrained": str(folder / "model")}, None)


def test_llamacpp_gets_the_tokenizer_of_the_data_spec(folder: Path) -> None:
    made = job(folder, {"load_fn": "llamacpp", "fwd_fn": "llamacpp", "model_dir": "model.gguf"})
    expected = {"pretrained": str(folder / "model.gguf"), "tokenizer": str(folder / "model"), "max_length": 2560}
    assert made.args == expected
    assert made.label == "model.gguf"


def test_precisions_of_one_folder_are_models_of_their_own(folder: Path) -> None:
    """compare_q has one folder per precision; a file with several takes `precision` among the engine's arguments."""
    entry = {"load_fn": "anyprecision", "fwd_fn": "anyprecision", "model_dir": "model"}
    three, four = (job(folder, {**entry, "label": f"{bits}", "args": {"precision": bits}}) for bits in (3, 4))
    assert three.args == {"dtype": "float16", "pretrained": str(folder / "model"), "precision": 3}
    assert three.fingerprint() != four.fingerprint()


def test_model_dir_with_overrides_becomes_arguments(folder: Path) -> None:
    made = job(folder, {"load_fn": "exllamav3", "label": "x", "model_dir": ["model", ["model.gguf"]]})
    assert made.args == {"pretrained": str(folder / "model"), "override_tensors": [str(folder / "model.gguf")]}


def test_override_figures_are_shown(folder: Path) -> None:
    overrides = {"override_bpw_layer": 4.0, "override_bpw_head": 16, "override_vram_bits": 8 * GIB * 5}
    made = job(folder, {"load_fn": "vllm", "label": "x", "model_dir": "model", "out_logits": "y", **overrides})
    assert (made.shown.layer_bpw, made.shown.head_bpw, made.shown.vram_gb) == (4.0, 16.0, 5.0)
    assert (made.first, made.shown.reference) == (True, False)  # a quantized model may write it, too


def test_data_spec_with_all_fields_becomes_metadata(folder: Path) -> None:
    data = GUIDE_DATA | {
        "dataset": "c4",
        "chat_template": True,
        "warmup_tokens": 128,
        "dataset_split": "train[:10]",
        "max_text_rows": 1000,
        "max_rows": 30,
    }
    made = job(folder, {"load_fn": "vllm", "label": "x", "model_dir": "model"}, data)
    assert made.tasks == ("text_strided",)
    assert made.args["max_model_len"] == 3072
    assert made.metadata == {
        "tokenizer": str(folder / "model"),
        "dataset": "c4",
        "eval_len": 2048,
        "stride": 512,
        "max_rows": 30,
        "blank_rows": "drop",
        "chat_template": True,
        "warmup_tokens": 128,
        "dataset_split": "train[:10]",
        "max_text_rows": 1000,
    }


@pytest.mark.parametrize(
    ("data", "task", "blank", "rows"),
    [
        ({"dataset": "wiki2"}, "wiki2_strided", "keep", 0),  # no max_rows: all, as in compare_q
        ({"dataset": "WikiText2", "max_rows": 5}, "wiki2_strided", "keep", 5),
        ({"dataset": "wiki2", "blank_rows": "drop"}, "wiki2_strided", "drop", 0),
        ({"dataset": "sample"}, "sample_strided", "keep", 0),
        ({"dataset": "ptb"}, "text_strided", "drop", 0),
        ({"dataset": "wiki2", "dataset_name": "wikitext-103-raw-v1"}, "text_strided", "drop", 0),
        ({"dataset": "someone/texts"}, "text_strided", "drop", 0),
    ],
)
def test_data_set_selects_task_and_blank_rows(
    folder: Path, data: dict[str, Any], task: str, blank: str, rows: int
) -> None:
    made = job(folder, {"load_fn": "vllm", "label": "x", "model_dir": "model"}, data)
    assert (made.tasks, made.metadata["blank_rows"], made.metadata["max_rows"]) == ((task,), blank, rows)


def test_yaml_in_our_own_form_becomes_jobs(folder: Path) -> None:
    text = """
    models:
      - model: hf
        args: {pretrained: model, dtype: bfloat16}
        label: Stock
        family: full precision
        reference: true
        tasks: [arc_easy, hellaswag]
        options: {num_fewshot: 5, batch_size: auto}
      - model: llamacpp
        args: {pretrained: someone/hub-id}
    """
    first, second = jobs(folder, text, name="m.yaml")
    assert (first.model, first.tasks, first.label) == ("hf", ("arc_easy", "hellaswag"), "Stock")
    assert (first.shown.family, first.shown.reference) == ("full precision", True)
    words = first.arguments(folder)
    assert "label" not in json.loads(words[words.index("--model_args") + 1])  # stock models do not take it
    assert words[words.index("--num_fewshot") + 1] == "5"
    assert words[words.index("--tasks") + 1] == "arc_easy,hellaswag"
    assert (second.args["pretrained"], second.label, second.unavailable) == ("someone/hub-id", "hub-id", None)
    assert "max_length" not in second.args  # our own form names all its arguments


def test_data_spec_with_tasks_only_leaves_their_settings(folder: Path) -> None:
    (folder / "mine").mkdir()
    data = {"tasks": ["wiki2_strided"], "options": {"include_path": "mine"}}
    made = job(folder, {"load_fn": "vllm", "label": "x", "model_dir": "model"}, data)
    assert (made.tasks, made.metadata) == (("wiki2_strided",), {})  # the task's own settings
    assert made.options == {"include_path": str(folder / "mine")}


def test_tasks_flag_replaces_tasks_of_specs(folder: Path) -> None:
    made = job(
        folder, {"load_fn": "vllm", "label": "x", "model_dir": "model", "tasks": ["a"]}, tasks=("mmlu",), limit=5
    )
    assert made.tasks == ("mmlu",)
    assert "eval_len" not in made.metadata
    assert "max_model_len" not in made.args  # a window's length does not limit other tasks
    words = made.arguments(folder)
    assert words[words.index("--limit") + 1] == "5"


def test_entry_without_task_is_refused(folder: Path) -> None:
    entries, _ = load_models([write(folder, [{"model": "hf", "args": {}}])])
    with pytest.raises(CompareError, match=r"models.json: entry 1: no task: give a data spec"):
        JobSettings().job(entries[0])


def test_globs_keep_order_and_list_each_file_once(folder: Path) -> None:
    for name in ("b", "a"):
        write(folder, [{"load_fn": "vllm", "label": name, "model_dir": "model"}], f"m_{name}.json")
    entries, _ = load_models([str(folder / "m_*.json"), str(folder / "m_a.json")])
    assert [entry.spec.label for entry in entries] == ["a", "b"]


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"load_fn": "vlm", "model_dir": "m"}, "'vlm' is unknown; did you mean 'vllm'?"),
        ({"load_fn": "vllm", "model_dir": "m", "lable": "x"}, "field \"lable\" is unknown; did you mean 'label'?"),
        ({"load_fn": "vllm", "label": "x"}, 'field "model_dir" is missing'),
        ({"load_fn": "vllm", "model_dir": ["a", "b"]}, "model_dir as [folder, overrides] is for exllamav3"),
        ({"load_fn": "vllm", "fwd_fn": "llamacpp", "model_dir": "m"}, "fwd_fn 'llamacpp' does not go with load_fn"),
        ({"load_fn": "vllm", "model_dir": 3}, 'field "model_dir": input should be a valid string, found 3'),
        ({"load_fn": "vllm", "model_dir": "m", "override_bpw_layer": -1}, 'field "override_bpw_layer"'),
        ({"modell": "hf"}, "did you mean 'model'?"),
        (
            {"model": "hf", "options": {"few_shot": 1}},
            "field \"options.few_shot\" is unknown; did you mean 'num_fewshot'?",
        ),
        ({"model": "hf", "reference": "yes"}, 'field "reference"'),
        ("text", "found str"),
    ],
)
def test_mistake_is_reported_with_file_entry_and_field(folder: Path, entry: Any, words: str) -> None:
    good = {"load_fn": "vllm", "label": "good", "model_dir": "m"}
    entries, problems = load_models([write(folder, [good, entry])])
    assert len(entries) == 1
    assert len(problems) == 1
    assert problems[0].startswith(f"{folder}/models.json: entry 2")
    assert words in problems[0]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[{]", "is not JSON (line 1, column 3"),
        ("[]", "holds no model"),
        ("3", "expected a list of models"),
        (json.dumps(GUIDE_DATA), "this is a data spec: give it to -d"),
    ],
)
def test_file_without_models_is_refused(folder: Path, content: str, words: str) -> None:
    with pytest.raises(CompareError) as caught:
        load_models([write(folder, content)])
    assert str(caught.value).startswith(f"{folder}/models.json: ")
    assert words in str(caught.value)


def test_missing_or_broken_file_is_refused(folder: Path) -> None:
    write(folder, "[]", "llama.json")
    with pytest.raises(CompareError, match=r"lama\.json: no such file; did you mean 'llama\.json'"):
        load_models([str(folder / "lama.json")])
    with pytest.raises(CompareError, match="no file matches"):
        load_models([str(folder / "nothing*.json")])
    with pytest.raises(CompareError, match="is not YAML"):
        load_models([write(folder, "models: [", "x.yaml")])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"eval_lenn": 1}, "field \"eval_lenn\" is unknown; did you mean 'eval_len'?"),
        ({"max_rows": "20"}, 'field "max_rows"'),
        ({"eval_stride": 0}, 'field "eval_stride"'),
        ({"warmup_tokens": 2047}, "warmup_tokens 2047 leaves nothing to score"),
        ({"dataset": None}, "names no text"),
        ({"blank_rows": "maybe"}, "'maybe' is unknown"),
        ({"tokenize_fn": "llama"}, "(one of transformers)"),
    ],
)
def test_mistake_in_a_data_spec_is_reported_with_field(folder: Path, change: dict[str, Any], words: str) -> None:
    content = {k: v for k, v in (GUIDE_DATA | change).items() if v is not None}
    with pytest.raises(CompareError) as caught:
        load_data(Path(write(folder, content, "data.json")))
    assert str(caught.value).startswith(f"{folder}/data.json: ")
    assert words in str(caught.value)


def test_missing_tokenizer_folder_is_refused(folder: Path) -> None:
    with pytest.raises(CompareError, match=r"data\.json: no such file or folder: .*/nowhere"):
        job(folder, {"load_fn": "vllm", "model_dir": "model"}, GUIDE_DATA | {"tokenizer_dir": "./nowhere"})


def test_old_field_names_of_compare_q_are_accepted(folder: Path) -> None:
    data = GUIDE_DATA | {
        "split": "train",
        "max_dataset_rows": 7,
        "dataset_data_files": "x/*.parquet",
        "display_rows": 3,
    }
    metadata = job(folder, {"load_fn": "vllm", "label": "x", "model_dir": "model"}, data).metadata
    assert (metadata["dataset_split"], metadata["max_text_rows"], metadata["dataset_files"]) == (
        "train",
        7,
        "x/*.parquet",
    )


DATA_SPECS = ["wiki2_llama3.json", "demo/data.json", "more/c4_llama3.json", "more/wiki2_gemma3_chat.json"]
SPECS = sorted(f for f in (ROOT / "specs").rglob("*") if f.suffix in (".json", ".yaml"))
MODEL_SPECS = [f for f in SPECS if str(f.relative_to(ROOT / "specs")) not in DATA_SPECS]


@pytest.mark.parametrize("name", DATA_SPECS)
def test_shipped_data_spec_is_valid(name: str) -> None:
    load_data(ROOT / "specs" / name)


@pytest.mark.parametrize("file", MODEL_SPECS, ids=lambda f: f.name)
def test_shipped_model_spec_is_valid(file: Path) -> None:
    entries, problems = load_models([str(file)])
    assert problems == []
    assert len({entry.spec.label for entry in entries}) == len(entries)


def test_shipped_specs_use_every_engine() -> None:
    entries, _ = load_models([str(f) for f in MODEL_SPECS])
    shown = {getattr(entry.spec, "load_fn", None) for entry in entries}
    assert set(LOAD_FNS) <= shown


def test_data_spec_among_model_specs_is_skipped(folder: Path) -> None:
    models = write(folder, [{"load_fn": "vllm", "label": "x", "model_dir": "model"}])
    data = write(folder, GUIDE_DATA, "wiki2.json")
    entries, problems = load_models([data, models])
    assert (len(entries), problems) == (1, [])
    with pytest.raises(CompareError, match="these are data specs"):
        load_models([data, write(folder, GUIDE_DATA, "more.json")])
