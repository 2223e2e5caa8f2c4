"""Adapters on tiny models: scores by hand, batch sizes, the harness' other request types, and messages of errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from lmeval_ext.errors import UserError
from lmeval_ext.requests import WindowRequest, window_request
from tests.conftest import VOCABULARY, make_llama

pytestmark = pytest.mark.engine


def windows(n: int = 6, length: int = 96, context: int = 33) -> list[WindowRequest]:
    """Returns `n` windows of random tokens; all after the first `context` tokens are scored."""
    rng = np.random.default_rng(0)
    rows = rng.integers(2, VOCABULARY, size=(n, length)).tolist()
    return [window_request(str(i), row, context, {}, (None, None, None)) for i, row in enumerate(rows)]


def transformers_scores(folder: Path, requests: list[WindowRequest]) -> tuple[np.ndarray, np.ndarray]:
    """Returns log-probabilities and first choices of the targets by Transformers, log-softmax in float64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([r.ids for r in requests])
    with torch.no_grad():
        logits = model(ids).logits.double()
    keep = len(requests[0].target_ids)
    table = torch.log_softmax(logits, dim=-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    greedy = logits[:, :-1].argmax(-1) == ids[:, 1:]
    return table[:, -keep:].numpy(), greedy[:, -keep:].numpy()


def adapter_scores(model: Any, requests: list[WindowRequest]) -> tuple[np.ndarray, np.ndarray]:
    """Returns log-probabilities and first choices of the targets by an adapter."""
    scores = model._loglikelihood_tokens(requests)
    return np.array([s.logprobs for s in scores]), np.array([s.greedy for s in scores])


def assert_scores_equal_transformers(model: Any, folder: Path, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """Asserts that an adapter's scores of `windows()` are those of Transformers for the checkpoint in `folder`."""
    logprobs, greedy = adapter_scores(model, windows())
    expected, matches = transformers_scores(folder, windows())
    np.testing.assert_allclose(logprobs, expected, rtol=rtol, atol=atol)
    assert (greedy == matches).all()


@pytest.fixture(scope="module")
def tiny_gguf(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.models.conftest import demo

    file = tmp_path_factory.mktemp("gguf") / "tiny-F32.gguf"
    demo("to_gguf.py", tiny_llama, file, "--type", "F32")
    return file


@pytest.mark.parametrize("batch_size", [1, 4, "auto"])
def test_hf_quant_scores_equal_transformers(tiny_llama: Path, batch_size: int | str) -> None:
    model = get_model("hf_quant")(pretrained=str(tiny_llama), dtype="float32", batch_size=batch_size)
    assert_scores_equal_transformers(model, tiny_llama)


def test_hf_quant_in_bfloat16_does_not_depend_on_the_batch_size(tiny_llama: Path) -> None:
    requests = windows()
    one, four = (
        adapter_scores(get_model("hf_quant")(pretrained=str(tiny_llama), dtype="bfloat16", batch_size=n), requests)[0]
        for n in (1, 4)
    )
    assert np.exp(-one.mean()) == pytest.approx(np.exp(-four.mean()), rel=1e-3)


def test_hf_quant_keeps_the_order_of_windows_of_different_shapes(tiny_llama: Path) -> None:
    model = get_model("hf_quant")(pretrained=str(tiny_llama), dtype="float32", batch_size=2)
    long, short = windows(3), windows(2, length=40, context=1)
    mixed = [long[0], short[0], long[1], short[1], long[2]]
    scores = model._loglikelihood_tokens(mixed)
    assert [len(s.logprobs) for s in scores] == [63, 39, 63, 39, 63]
    np.testing.assert_allclose(scores[3].logprobs, transformers_scores(tiny_llama, short)[0][1], rtol=1e-5, atol=1e-6)


def test_llamacpp_scores_equal_transformers(tiny_llama: Path, tiny_gguf: Path) -> None:
    """Weights and cache are float32 (llama.cpp's default cache is float16); batches are smaller than a window."""
    model = get_model("llamacpp")(pretrained=str(tiny_gguf), n_batch=40, n_ubatch=40, type_k="f32", type_v="f32")
    assert_scores_equal_transformers(model, tiny_llama, rtol=1e-4, atol=1e-4)


def test_llamacpp_scores_do_not_change_with_a_shared_context(tiny_gguf: Path) -> None:
    model = get_model("llamacpp")(pretrained=str(tiny_gguf))
    rng = np.random.default_rng(1)
    context = rng.integers(2, VOCABULARY, 50).tolist()
    choices = [(None, context, rng.integers(2, VOCABULARY, n).tolist()) for n in (1, 3, 3, 2)]
    together = model._loglikelihood_tokens(choices, disable_tqdm=True)
    for choice, score in zip(choices, together, strict=True):
        model.scorer.forget()
        (alone,) = model._loglikelihood_tokens([choice], disable_tqdm=True)
        assert score[0] == pytest.approx(alone[0], abs=1e-3)


def requests_of(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    """Returns harness requests of one type, one for each tuple of arguments."""
    return [Instance(kind, {}, a, 0) for a in arguments]  # type: ignore[arg-type]


def test_llamacpp_serves_harness_requests_as_hf(tiny_llama: Path, tiny_gguf: Path) -> None:
    ours = get_model("llamacpp")(pretrained=str(tiny_gguf))
    stock = get_model("hf")(pretrained=str(tiny_llama), dtype="float32", device="cpu")
    pairs = requests_of("loglikelihood", ("Iceland is", " an island"), ("", "The capital"), ("A volcano ", "erupts"))
    for (a, _), (b, _) in zip(ours.loglikelihood(pairs), stock.loglikelihood(pairs), strict=True):
        assert a == pytest.approx(b, abs=5e-3)
    texts = requests_of("loglikelihood_rolling", ("Iceland is an island country in the North Atlantic. " * 20,))
    assert ours.loglikelihood_rolling(texts)[0] == pytest.approx(stock.loglikelihood_rolling(texts)[0], rel=1e-3)
    prompts = requests_of("generate_until", ("Iceland is", {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False}))
    assert ours.generate_until(prompts) == stock.generate_until(prompts)


@pytest.mark.parametrize("name", ["hf_quant", "llamacpp"])
def test_ids_beyond_the_vocabulary_and_long_windows_are_errors(name: str, tiny_llama: Path, tiny_gguf: Path) -> None:
    model = get_model(name)(pretrained=str(tiny_gguf if name == "llamacpp" else tiny_llama))
    with pytest.raises(UserError, match=f"token id {VOCABULARY} is beyond this model's vocabulary of {VOCABULARY}"):
        model._loglikelihood_tokens([window_request("w", [5, 6, VOCABULARY], 1, {}, (None, None, None))])
    with pytest.raises(UserError, match="eval_len=257 is beyond this model's context of 256"):
        model._loglikelihood_tokens([window_request("w", [5] * 257, 1, {}, (None, None, None))])


def test_padding_of_the_vocabulary_is_not_scored() -> None:
    """Columns of the output matrix beyond the config's vocabulary are an engine's padding."""
    from lmeval_ext.models.target_logprobs import logprobs_of_targets

    logits = torch.randn(7, 10)
    targets = torch.randint(0, 6, (7,))
    expected = torch.log_softmax(logits[:, :6].double(), -1).gather(1, targets[:, None])[:, 0]
    logits[:, 6:] = 1e4
    logprobs, _ = logprobs_of_targets(logits, targets, vocabulary=6)
    np.testing.assert_allclose(logprobs, expected.numpy(), rtol=1e-5)


@pytest.mark.parametrize("name", ["hf_quant", "vllm_nvfp4"])
@pytest.mark.parametrize(
    ("breakage", "words"),
    [
        ("truncated", "truncated"),
        ("no tokenizer", "no tokenizer|could not be loaded"),
        ("config", "config.json"),
        ("model_type", "could not be loaded|does not know"),
    ],
)
def test_damaged_checkpoint_is_an_error_in_one_line(
    name: str, breakage: str, words: str, tiny_llama: Path, tmp_path: Path
) -> None:
    for file in tiny_llama.iterdir():
        if breakage != "no tokenizer" or not file.name.startswith("tokenizer"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    if breakage == "truncated":
        weights.write_bytes(weights.read_bytes()[:60_000])
    elif breakage == "config":
        config.write_text("{not json")
    elif breakage == "model_type":
        config.write_text(config.read_text().replace('"llama"', '"no-such-model"').replace("LlamaFor", "NoSuchFor"))
    with pytest.raises(UserError, match=words) as caught:
        get_model(name)(pretrained=str(tmp_path))
    assert "\n" not in str(caught.value)


def test_unknown_arguments_are_errors_that_name_them(tiny_llama: Path, tiny_gguf: Path) -> None:
    with pytest.raises(UserError, match="n_thread=1 is not an argument of llamacpp; did you mean n_threads"):
        get_model("llamacpp")(pretrained=str(tiny_gguf), n_thread=1)
    with pytest.raises(UserError, match="bfloat61"):
        get_model("hf_quant")(pretrained=str(tiny_llama), dtype="bfloat61")
    with pytest.raises(UserError, match="two names of one argument"):
        get_model("llamacpp")(pretrained=str(tiny_gguf), n_ctx=64, max_length=128)


def test_models_without_logits_to_keep_are_scored_alike(tiny_llama: Path) -> None:
    model = get_model("hf_quant")(pretrained=str(tiny_llama), dtype="float32")
    forward = model.model.forward

    def plain(input_ids: Any, use_cache: bool = False) -> Any:
        return forward(input_ids=input_ids, use_cache=use_cache)

    model.model.forward, model._keeps = plain, False
    requests = windows(2)
    np.testing.assert_allclose(
        adapter_scores(model, requests)[0], transformers_scores(tiny_llama, requests)[0], rtol=1e-5, atol=1e-6
    )


def test_model_quantized_at_load_is_not_full_precision(tiny_llama: Path) -> None:
    """For load_in_4bit, Transformers sets quantization_config on the running model's config, not in the checkpoint."""
    model = get_model("hf_quant")(pretrained=str(tiny_llama), dtype="float32")
    model.model.config.quantization_config = {"quant_method": "bitsandbytes"}
    facts = model.get_model_info()["quantization"]
    assert (facts["family"], facts["layer_bpw"], facts["weight_bytes"]) == ("bitsandbytes", None, None)
    assert any("quantized at load" in note for note in facts["notes"])


def test_failed_description_becomes_a_note(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_model("hf_quant")(pretrained=str(tiny_llama), dtype="float32")
    monkeypatch.setattr(type(model), "describe", lambda self: 1 / 0)
    facts = model.get_model_info()["quantization"]
    assert facts["label"] == model.label
    assert "division by zero" in facts["notes"][0]


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("hf_quant", {"pretrained": "/nowhere/model"}, "/nowhere/model"),
        ("vllm_nvfp4", {"pretrained": "/nowhere/model"}, "no config.json there"),
        ("llamacpp", {"pretrained": "/nowhere/model.gguf"}, "no such file"),
    ],
)
def test_missing_checkpoint_is_an_error_that_names_it(name: str, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        get_model(name)(**arguments)


def test_files_that_are_not_gguf_are_errors(tmp_path: Path, tiny_gguf: Path) -> None:
    other, truncated = tmp_path / "other.gguf", tmp_path / "truncated.gguf"
    other.write_bytes(b"not a GGUF file")
    truncated.write_bytes(tiny_gguf.read_bytes()[:5000])
    with pytest.raises(UserError, match="is not a GGUF file"):
        get_model("llamacpp")(pretrained=str(other))
    with pytest.raises(UserError, match=r"llama\.cpp could not load"):
        get_model("llamacpp")(pretrained=str(truncated))
    with pytest.raises(UserError, match=r"holds 2 GGUF models. Name one of: other\.gguf, truncated\.gguf"):
        get_model("llamacpp")(pretrained=str(tmp_path))


def test_pickles_are_never_loaded(tiny_llama: Path, tmp_path: Path) -> None:
    for file in tiny_llama.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        get_model("hf_quant")(pretrained=str(tmp_path))


def test_tokenizer_that_differs_from_the_vocabulary_is_an_error(tiny_gguf: Path, tmp_path: Path) -> None:
    from tests.conftest import load_task, make_tokenizer

    make_tokenizer(tmp_path, vocabulary=VOCABULARY - 20)
    with pytest.raises(UserError, match=r"disagree on this text: token \d+ is \d+ \("):
        load_task("sample_strided", pretrained=str(tiny_gguf), tokenizer=str(tmp_path), eval_len=64, stride=64)


def test_gguf_vocabulary_gives_the_tokens_of_the_original_tokenizer(tiny_gguf: Path, tiny_llama: Path) -> None:
    from tests.conftest import load_task

    settings = {"eval_len": 64, "stride": 64}
    own = load_task("sample_strided", pretrained=str(tiny_gguf), **settings)
    theirs = load_task("sample_strided", pretrained=str(tiny_llama), **settings)
    assert own.tokens.ids.tolist() == theirs.tokens.ids.tolist()
    differences = own.tokens.byte_ends - theirs.tokens.byte_ends  # inside a character of several tokens only
    assert own.tokens.byte_ends[-1] == theirs.tokens.byte_ends[-1]
    assert (np.abs(differences) <= 3).all()
    assert (differences == 0).mean() > 0.98


def test_emulated_kernel_equals_compressed_tensors_arithmetic() -> None:
    """A W4A4 layer in float32 is compared with the format's own library: weight × fake-quantized input."""
    from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
    from compressed_tensors.quantization import preset_name_to_scheme
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    from lmeval_ext.models.vllm.cpu_kernel import emulated_kernel

    generator = torch.Generator().manual_seed(0)
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.5, -6.0])
    codes = values[torch.randint(0, len(values), (32, 128), generator=generator)]
    scales = (torch.rand(32, 8, generator=generator) * 400 + 1).to(torch.float8_e4m3fn)
    weight_divisor = torch.tensor(1234.5)
    weight = (codes.view(32, 8, 16) * (scales.float() / weight_divisor)[..., None]).view(32, 128)

    arguments = preset_name_to_scheme("NVFP4", ["Linear"]).input_activations
    x = torch.randn(64, 128, generator=generator) * torch.logspace(-2, 1, 64)[:, None]
    divisor = torch.tensor([448 * 6 / float(x.abs().max())])
    scale, zero = compute_dynamic_scales_and_zp(x, arguments, torch.nn.Linear(128, 8), global_scale=divisor)
    quantized = fake_quantize(x=x, scale=scale, zero_point=zero, args=arguments, global_scale=divisor)

    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(pack_fp4_to_uint8(codes), requires_grad=False)
    layer.weight_scale = torch.nn.Parameter(scales, requires_grad=False)
    layer.weight_global_scale = torch.nn.Parameter(1 / weight_divisor, requires_grad=False)  # vLLM's loader inverts it
    kernel = emulated_kernel()
    kernel.process_weights_after_loading(layer)
    torch.testing.assert_close(layer.weight.data, weight)
    torch.testing.assert_close(kernel.apply_weights(layer, x), x @ weight.T)  # weight-only: no input scale

    layer.input_global_scale_inv = divisor[0]
    ours, theirs = kernel.apply_weights(layer, x), quantized @ weight.T
    rows = ((ours - theirs).abs() > 1e-4 * theirs.abs().amax()).any(dim=1)
    assert rows.float().mean() < 0.1  # rows with a tie that float32 rounding decides
    assert (x @ weight.T - theirs).abs().max() > 0.02 * theirs.abs().max()  # the activations were quantized


def test_make_llama_is_deterministic(tmp_path: Path) -> None:
    a, b = make_llama(tmp_path / "a"), make_llama(tmp_path / "b")
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
