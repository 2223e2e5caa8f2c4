"""The code that both ExLlama adapters share, on a float32 Llama instead of an engine, compared with stock `hf`."""

from __future__ import annotations

import json
import subprocess
import sys
import types
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.config.evaluate_config import EvaluatorConfig

from lmeval_ext.errors import MissingEngineError, UserError
from lmeval_ext.models.exllama import batching
from lmeval_ext.models.exllama.adapter import CACHE_UNUSED, ExLlamaLM
from lmeval_ext.models.exllama.config import context_length, stop_tokens
from lmeval_ext.models.exllama.generation import GenerationJob, generate
from lmeval_ext.models.exllama.loading import (
    Package,
    check_gpu,
    check_unknown,
    numbers,
    parse_cache_bits,
    require,
    single_device,
)
from lmeval_ext.models.exllama.memory import default_cache_tokens
from lmeval_ext.models.exllama.messages import import_error, load_error
from lmeval_ext.models.exllama.v2.loading import PACKAGE as V2
from lmeval_ext.models.exllama.v3.loading import PACKAGE as V3
from lmeval_ext.models.sampling import Sampling
from lmeval_ext.models.shared_contexts import group_requests, shared_batches, split_groups
from lmeval_ext.storage.rounding import ceil_div, round_up
from tests.conftest import VOCABULARY, make_llama, make_tokenizer
from tests.models.exllama.tiny_engine import TinyExLlama
from tests.models.test_adapters import (
    adapter_scores,
    assert_scores_equal_transformers,
    requests_of,
    transformers_scores,
    windows,
)

pytestmark = pytest.mark.engine

QUESTION = "Iceland is an island country in the North Atlantic Ocean, and its capital is"
CHOICES = [" Reykjavik", " a large town in the north", " a", " a volcano that erupts every year."]
TEXT = "Iceland is an island country in the North Atlantic. " * 20


@pytest.fixture(scope="module")
def stock(tiny_llama: Path) -> Any:
    """Returns the harness' `hf` on the tiny Llama, in float32."""
    return get_model("hf")(pretrained=str(tiny_llama), dtype="float32", device="cpu")


def pairs(*arguments: tuple[str, str]) -> list[Instance]:
    """Returns log-likelihood requests of (context, continuation)."""
    return requests_of("loglikelihood", *arguments)


def assert_like(ours: list[tuple[float, bool]], theirs: list[tuple[float, bool]]) -> None:
    """Asserts close log-likelihoods (10⁻⁵ relative) and equal first choices."""
    np.testing.assert_allclose([a for a, _ in ours], [b for b, _ in theirs], rtol=1e-5, atol=1e-4)
    assert [g for _, g in ours] == [g for _, g in theirs]


# ---------------------------------------------------------------------- windows


@pytest.mark.parametrize("batch_size", [1, 4, "auto"])
def test_window_scores_equal_transformers(tiny_llama: Path, batch_size: int | str) -> None:
    model = TinyExLlama(str(tiny_llama), batch_size=batch_size)
    assert_scores_equal_transformers(model, tiny_llama)
    assert [rows for rows, _ in model.engine.shapes] == {1: [1] * 6, 4: [4, 2], "auto": [6]}[batch_size]


def test_scores_keep_the_order_of_windows_of_different_shapes(tiny_llama: Path) -> None:
    long, short = windows(3), windows(2, length=40, context=1)
    scores = TinyExLlama(str(tiny_llama))._loglikelihood_tokens([long[0], short[0], long[1], short[1], long[2]])
    assert [len(s.logprobs) for s in scores] == [63, 39, 63, 39, 63]
    np.testing.assert_allclose(scores[3].logprobs, transformers_scores(tiny_llama, short)[0][1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", [{"batch_size": 1}, {"batch_size": 4}, {"batch_size": "auto", "max_length": 128}])
def test_score_depends_on_the_window_alone(tiny_llama: Path, settings: dict[str, Any]) -> None:
    """In any batch, order and sufficient context, and whatever ran before: the score of the window alone."""
    requests = [*windows(3), *windows(2, length=40, context=1), *windows(2, length=64, context=60)]
    alone = [transformers_scores(tiny_llama, [request])[0][0] for request in requests]
    model = TinyExLlama(str(tiny_llama), **settings)
    model.loglikelihood([Instance("loglikelihood", {}, ("The river", " in the city"), 0)], disable_tqdm=True)
    for order in (range(7), (6, 5, 4, 3, 2, 1, 0), (3, 0, 5, 0, 6, 2), (4,)):
        scores = model._loglikelihood_tokens([requests[i] for i in order])
        for i, found in zip(order, scores, strict=True):
            np.testing.assert_allclose(found.logprobs, alone[i], rtol=1e-5, atol=1e-5)


def test_scores_do_not_change_with_small_chunks_of_logits(tiny_llama: Path) -> None:
    model = TinyExLlama(str(tiny_llama))
    model.batching.logit_bytes = 2 * model.engine.columns * 10  # ten positions at a time
    assert_scores_equal_transformers(model, tiny_llama)


@pytest.mark.parametrize("batch_size", ["auto", 6])
def test_batches_are_halved_when_memory_runs_out(tiny_llama: Path, batch_size: int | str, caplog: Any) -> None:
    model = TinyExLlama(str(tiny_llama), batch_size=batch_size, memory=200)
    assert_scores_equal_transformers(model, tiny_llama)
    assert "going on with 3 at a time" in caplog.text
    # 6 and 3 windows of 96 do not fit, 1 does; 2 would
    assert {rows for rows, _ in model.engine.shapes} == {1}
    adapter_scores(model, windows())  # sizes that did not fit are not tried again
    assert caplog.text.count("going on with") == 2


def test_too_little_memory_for_one_window_is_an_error(tiny_llama: Path) -> None:
    with pytest.raises(UserError, match="out of GPU memory with a single sequence of 96 tokens"):
        adapter_scores(TinyExLlama(str(tiny_llama), memory=50), windows())


def test_chunks_of_logits_are_halved_when_memory_runs_out(tiny_llama: Path, monkeypatch: Any, caplog: Any) -> None:
    """Memory is enough for the logits of 30 positions at a time."""
    model = TinyExLlama(str(tiny_llama), batch_size=1)
    monkeypatch.setattr(batching, "MIN_LOGIT_BYTES", 2 * model.engine.columns * 20)
    model.batching.logit_bytes = 2 * model.engine.columns * 90
    logits = model.engine.logits

    def at_most_30(hidden: torch.Tensor) -> torch.Tensor:
        if hidden.shape[0] > 30:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. (a test)")
        return logits(hidden)

    monkeypatch.setattr(model.engine, "logits", at_most_30)
    assert_scores_equal_transformers(model, tiny_llama)
    assert caplog.text.count("its logits now in chunks of") == 2
    assert model.batching.logit_rows() == 22


def test_states_are_freed_before_a_smaller_batch_is_tried(tiny_llama: Path, monkeypatch: Any) -> None:
    """The hidden states are those of a batch of contexts whose logits did not fit."""
    model = TinyExLlama(str(tiny_llama))
    branch, logits, states, alive = model.engine.branch, model.engine.logits, [], []

    def recorded_branch(*arguments: Any) -> torch.Tensor:
        alive.extend(state() is not None for state in states)
        hidden = branch(*arguments)
        states.append(weakref.ref(hidden))
        return hidden

    def failing_once(hidden: torch.Tensor) -> torch.Tensor:
        if len(states) == 1:  # the first batch: both contexts
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. (a test)")
        return logits(hidden)

    monkeypatch.setattr(model.engine, "branch", recorded_branch)
    monkeypatch.setattr(model.engine, "logits", failing_once)
    requests = pairs(*((f"{QUESTION}{n}", c) for n in ("", "?") for c in CHOICES))
    expected = TinyExLlama(str(tiny_llama), share=False).loglikelihood(requests)
    assert_like(model.loglikelihood(requests), expected)
    assert model.engine.branched == [2, 1, 1]
    assert alive[0] is False


def test_error_other_than_out_of_memory_is_raised(tiny_llama: Path, monkeypatch: Any) -> None:
    model = TinyExLlama(str(tiny_llama))
    monkeypatch.setattr(model.engine, "hidden", lambda *a: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        adapter_scores(model, windows())


# ---------------------------------------------------------------------- log-likelihoods


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("memory", [None, 160])
def test_loglikelihoods_equal_hf(tiny_llama: Path, stock: Any, share: bool, memory: int | None) -> None:
    questions = [(f"{QUESTION}{n}", c) for n in ("", "?", " not") for c in CHOICES]
    requests = pairs(*questions, ("", "The capital"), ("A volcano ", "erupts"), ("x", TEXT[:200]))
    ours = TinyExLlama(str(tiny_llama), share=share, memory=memory)
    assert_like(ours.loglikelihood(requests), stock.loglikelihood(requests))
    assert bool(ours.engine.branched) == share


def test_shared_context_is_computed_once(tiny_llama: Path, stock: Any) -> None:
    shared, alone = (TinyExLlama(str(tiny_llama), share=share) for share in (True, False))
    requests = pairs(*((QUESTION, c) for c in CHOICES))
    assert_like(shared.loglikelihood(requests), alone.loglikelihood(requests))
    context = len(shared.tok_encode(QUESTION))
    assert sum(rows * length for rows, length in shared.engine.shapes) < context + 4 * 40
    assert sum(rows * length for rows, length in alone.engine.shapes) >= 4 * context


def test_choices_of_one_token_take_one_row(tiny_llama: Path, stock: Any) -> None:
    model = TinyExLlama(str(tiny_llama), share=False)
    context = list(range(3, 40))
    requests = [(None, context, [choice]) for choice in (5, 6, 7, 8)]
    result = model._loglikelihood_tokens(requests, disable_tqdm=True)
    assert_like(result, stock._loglikelihood_tokens(requests, disable_tqdm=True))
    assert [rows for rows, _ in model.engine.shapes] == [1]


@pytest.mark.parametrize("batch_size", [1, 3, "auto"])
def test_loglikelihoods_do_not_depend_on_order_and_batch_size(tiny_llama: Path, batch_size: int | str) -> None:
    rng = np.random.default_rng(0)
    requests = [
        (None, rng.integers(2, VOCABULARY, n).tolist(), rng.integers(2, VOCABULARY, m).tolist())
        for n, m in ((5, 3), (60, 1), (33, 7), (1, 1), (60, 2), (120, 30))
    ]
    expected = TinyExLlama(str(tiny_llama), batch_size=1)._loglikelihood_tokens(requests, disable_tqdm=True)
    order = rng.permutation(len(requests))
    mixed = TinyExLlama(str(tiny_llama), batch_size=batch_size)._loglikelihood_tokens(
        [requests[i] for i in order], disable_tqdm=True
    )
    assert_like(mixed, [expected[i] for i in order])


def test_long_contexts_are_cut_on_the_left_as_in_hf(tiny_llama: Path, stock: Any) -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(2, VOCABULARY, 400).tolist()
    # No two requests have the same tokens up to the last one: lm-eval 0.4.13 mixes up those whose continuations differ
    # in length
    requests = [(None, tokens[:n], tokens[n : n + m]) for n, m in ((300, 5), (256, 1), (250, 9), (2, 256), (140, 256))]
    ours = TinyExLlama(str(tiny_llama))._loglikelihood_tokens(requests, disable_tqdm=True)
    assert_like(ours, stock._loglikelihood_tokens(requests, disable_tqdm=True))


def test_context_of_white_space_becomes_the_prefix_token_as_in_hf(tmp_path: Path) -> None:
    """The harness moves white space to the continuation; without BOS, the context is then empty."""
    folder = make_llama(tmp_path)
    make_tokenizer(folder, bos=False)
    ours = TinyExLlama(str(folder), prefix_token_id=1)
    theirs = get_model("hf")(pretrained=str(folder), dtype="float32", device="cpu", prefix_token_id=1)
    contexts = (" ", "\n\n", "Iceland")
    encoded = [((c, "A volcano"), *theirs._encode_pair(c, "A volcano")) for c in contexts]
    assert [bool(context) for _, context, _ in encoded] == [False, False, True]
    expected = theirs._loglikelihood_tokens([(k, c or [1], t) for k, c, t in encoded], disable_tqdm=True)
    assert_like(ours.loglikelihood(pairs(*((c, "A volcano") for c in contexts))), expected)


@pytest.mark.parametrize(("tokens", "words"), [(257, "has 257 tokens, the model 256"), (0, "has no tokens")])
def test_empty_and_too_long_continuations_are_errors(tiny_llama: Path, tokens: int, words: str) -> None:
    requests = [(("a", "b"), [3], [4]), (("a", "an end"), [3], [4] * tokens)]
    with pytest.raises(UserError, match=f"^the continuation 'an end' of request 1 {words}") as caught:
        TinyExLlama(str(tiny_llama))._loglikelihood_tokens(requests, disable_tqdm=True)
    assert "\n" not in str(caught.value)


def test_rolling_loglikelihoods_equal_hf(tiny_llama: Path, stock: Any) -> None:
    texts = requests_of("loglikelihood_rolling", (TEXT,), ("Short.",), (TEXT[:300],))
    ours = TinyExLlama(str(tiny_llama)).loglikelihood_rolling(texts)
    np.testing.assert_allclose(ours, stock.loglikelihood_rolling(texts), rtol=1e-5)


def test_scores_go_to_the_request_cache(tiny_llama: Path) -> None:
    model = TinyExLlama(str(tiny_llama))
    kept: dict[Any, Any] = {}
    model.cache_hook = types.SimpleNamespace(add_partial=lambda kind, key, value: kept.update({(kind, *key): value}))
    (score,) = model.loglikelihood(pairs((QUESTION, CHOICES[0])))
    assert kept == {("loglikelihood", QUESTION, CHOICES[0]): score}


# ---------------------------------------------------------------------- groups


def test_groups_share_contexts_and_few_shot_examples() -> None:
    shots = list(range(100))
    requests = [(None, [*shots, 200 + q], [300 + c, 7]) for q in range(3) for c in range(4)]
    requests += [(None, [*shots, 210], [c]) for c in range(4)] + [(None, [1, 2, 3], [4])]
    shared, alone = split_groups(group_requests(requests, 1000))
    assert [g.context for g in alone] == [(1, 2)]
    assert [len(g.tails) for g in shared] == [4, 4, 4, 1] or sorted(len(g.tails) for g in shared) == [1, 4, 4, 4]
    (batch,) = shared_batches(shared, 4096, lambda c, t: True)
    assert len(batch.groups) == 4
    assert [b.fits for b in shared_batches(shared, 4096, lambda c, t: False)] == [False] * 4
    assert [len(b.groups) for b in shared_batches(shared, 4096, lambda c, t: len(c) <= 2)] == [2, 2]


# ---------------------------------------------------------------------- tokens


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"add_bos_token": True},
        {"add_bos_token": False},
        {"prefix_token_id": 1},
        {"prefix_token_id": 1, "add_bos_token": True},
    ],
)
@pytest.mark.parametrize("bos", [True, False])
def test_bos_is_added_as_in_hf(tmp_path: Path, bos: bool, arguments: dict[str, Any]) -> None:
    folder = make_llama(tmp_path)
    make_tokenizer(folder, bos=bos)
    ours = TinyExLlama(str(folder), **arguments)
    theirs = get_model("hf")(pretrained=str(folder), dtype="float32", device="cpu", **arguments)
    for text in ("Iceland", "<s>Iceland", "</s>x", " a b"):
        for special in (None, True, False):
            assert ours.tok_encode(text, special) == theirs.tok_encode(text, special)
    assert (ours.prefix_token_id, ours.eot_token_id, ours.max_length) == (
        theirs.prefix_token_id, theirs.eot_token_id, theirs.max_length,
    )  # fmt: skip
    requests = pairs(("", "The capital"), ("A volcano", " erupts"))
    assert_like(ours.loglikelihood(requests), theirs.loglikelihood(requests))


def test_chat_template_is_that_of_the_tokenizer(tmp_path: Path) -> None:
    folder = make_llama(tmp_path)
    file = folder / "tokenizer_config.json"
    template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}[{{ messages[0]['content'] }}]"
    )
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))
    ours = TinyExLlama(str(folder))
    assert ours.chat_template(True) == template
    history = [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}]
    assert ours.apply_chat_template(history) == "[Hi]"
    assert ours.tokenizer_name == str(folder).replace("/", "__")


# ---------------------------------------------------------------------- generation


def generation(context: str, **arguments: Any) -> Instance:
    """Returns a request for at most 8 greedy tokens up to an empty line, with `arguments` in place of these."""
    return requests_of(
        "generate_until", (context, {"until": ["\n\n"], "do_sample": False, "max_gen_toks": 8, **arguments})
    )[0]


def test_generated_texts_equal_hf(tiny_llama: Path, stock: Any) -> None:
    requests = [
        generation("Iceland is", max_gen_toks=12),
        generation("A volcano", max_gen_toks=5),
        generation(TEXT, max_gen_toks=20),  # cut on the left
    ]
    expected = stock.generate_until(requests)
    assert TinyExLlama(str(tiny_llama)).generate_until(requests) == expected
    stop = expected[0][3:5]
    requests = [generation("Iceland is", max_gen_toks=12, until=[stop])]
    assert TinyExLlama(str(tiny_llama)).generate_until(requests) == stock.generate_until(requests)


def test_job_has_the_arguments_of_the_request(tmp_path: Path) -> None:
    folder = make_llama(tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 9]}))
    model = TinyExLlama(str(folder))
    arguments = {"until": ["Q:", "<s>", ""], "max_gen_toks": 3, "do_sample": True, "temperature": 0.7, "top_p": 0.9}
    model.generate_until(requests_of("generate_until", ("Iceland", arguments)))
    (job,) = model.generator().submitted
    assert (job.max_new, job.stop_tokens, job.stop_strings) == (3, [0, 1, 9], ["Q:"])
    assert job.stop_conditions == [0, 1, 9, "Q:"]
    assert job.sampling == Sampling(temperature=0.7, top_p=0.9)
    # A token whose name contains a stop sequence stops, as in `hf`, which reads the text with special tokens
    job, _ = model.generation_job(0, "Iceland", {"until": ["s>"], "max_gen_toks": 3})
    assert (job.stop_tokens, job.stop_strings) == ([0, 1, 9], ["s>"])
    job, _ = model.generation_job(0, "Iceland", {"until": ["<s>x"], "max_gen_toks": 3})
    assert job.stop_tokens == [1, 9]


def test_stopping_token_is_not_part_of_the_text(tiny_llama: Path) -> None:
    model = TinyExLlama(str(tiny_llama))
    first = model.tok_encode(model.generate_until([generation("Iceland is", max_gen_toks=1)])[0])
    job = GenerationJob(0, model.tok_encode("Iceland is"), 5, stop_tokens=[*range(VOCABULARY)])
    ((index, ids),) = generate(model.generator(), [job])
    assert (index, len(ids)) == (0, 1)
    assert model.generated_text([*first, 1], ["</s>"]) == model.tok_decode(first)


def test_text_up_to_the_end_of_thinking_is_cut_as_in_hf(tiny_llama: Path) -> None:
    model = TinyExLlama(str(tiny_llama), think_end_token="island")
    ids = model.tok_encode("an island is. Iceland\n\nmore")
    assert model.generated_text(ids, ["\n\n"]) == "is. Iceland"
    model = TinyExLlama(str(tiny_llama), think_end_token=5)
    assert model.generated_text([7, 5, 8, 5, *model.tok_encode(" Iceland")], []) == "Iceland"


@pytest.mark.parametrize(
    ("arguments", "model_arguments", "words"),
    [
        ({"max_gen_toks": 256}, {}, "max_gen_toks=256: expected at least 1 and less than the model's max_length=256"),
        ({"max_gen_toks": 60}, {"cache_tokens": 32}, "the KV cache holds 32; set cache_tokens=256"),
        ({"num_beams": 4}, {}, "num_beams=4: ExLlama cannot do that"),
        ({"typical_p": 0.5}, {}, "typical_p=0.5 is not known"),
    ],
)
def test_unsupported_generation_arguments_are_errors(
    tiny_llama: Path, arguments: dict[str, Any], model_arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        TinyExLlama(str(tiny_llama), **model_arguments).generate_until([generation("Iceland is", **arguments)])


def test_failed_job_is_an_error_and_clears_the_queue(tiny_llama: Path, monkeypatch: Any) -> None:
    model = TinyExLlama(str(tiny_llama))
    failure = {"stage": "error", "identifier": 0, "eos": True, "error": ValueError("cache is broken")}
    monkeypatch.setattr(model.generator(), "step", lambda: [failure])
    with pytest.raises(ValueError, match="cache is broken"):
        model.generate_until([generation("Iceland is"), generation("A volcano")])
    assert model.generator().jobs == []


# ---------------------------------------------------------------------- configs


def test_context_and_stop_tokens_are_read_as_in_hf(tmp_path: Path) -> None:
    assert context_length({"max_position_embeddings": 77}) == 77
    assert context_length({"text_config": {"max_position_embeddings": 55}, "max_position_embeddings": 77}) == 55
    assert context_length({}, types.SimpleNamespace(model_max_length=99)) == 99
    assert context_length({}, types.SimpleNamespace(model_max_length=int(1e30))) == 2048
    assert stop_tokens(tmp_path, {"eos_token_id": 2}) == [2]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    assert stop_tokens(tmp_path, {"eos_token_id": 2}) == [3, 4]


def test_arguments_accept_several_spellings_of_numbers() -> None:
    assert numbers("gpu_split", "20/24") == numbers("gpu_split", [20, 24]) == numbers("gpu_split", "20,24") == [20, 24]
    assert numbers("gpu_split", None) is None
    assert numbers("gpu_split", 20) == [20]
    assert parse_cache_bits("q4", (4, 6, 8)) == parse_cache_bits(4, (4, 6, 8)) == (4, 4)
    assert parse_cache_bits("8/4", (4, 8)) == (8, 4)
    assert parse_cache_bits("fp16", (4,)) is None
    with pytest.raises(UserError, match="gpu_split='much': expected numbers"):
        numbers("gpu_split", "much")
    for wrong in ("5", "4/4/4", "four"):
        with pytest.raises(UserError, match=f"cache_bits='{wrong}': expected 4, 6, 8 or fp16"):
            parse_cache_bits(wrong, (4, 6, 8))


def test_unknown_argument_is_an_error() -> None:
    check_unknown(V3, {})
    with pytest.raises(UserError, match="swa=1 is not an argument of exllamav3"):
        check_unknown(V3, {"swa": 1})


def test_ceil_div_and_round_up_by_hand() -> None:
    assert [ceil_div(n, 32) for n in (0, 1, 32, 33)] == [0, 1, 1, 2]
    assert [round_up(n, 32) for n in (0, 1, 32, 33)] == [0, 32, 32, 64]


def test_default_cache_is_a_tenth_of_the_gpu_within_limits() -> None:
    gib = 1024**3
    assert default_cache_tokens(80 * gib, 131072, 131072, False) == 32768  # 8 GiB would hold twice as much
    assert default_cache_tokens(10 * gib, 131072, 131072, False) == 8192
    assert default_cache_tokens(10 * gib, 131072, 2048, False) == 8192
    assert default_cache_tokens(10 * gib, None, 2000, False) == 2048
    assert default_cache_tokens(10 * gib, 131072, 16000, True) == 16128


# ---------------------------------------------------------------------- messages


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError("CUDA_HOME environment variable is not set. Please set it to your CUDA install root."), "nvcc"),
        (RuntimeError("Ninja is required to load C++ extensions"), "pip install ninja"),
        (RuntimeError("Error building extension 'exllamav3_ext'\nlong\nlog"), r"C\+\+ compiler"),
        (ImportError("x.so: undefined symbol: _ZN3c10"), "reinstall exllamav3"),
        (ModuleNotFoundError("No module named 'marisa_trie'", name="marisa_trie"), r"lmeval-ext\[exl3\]"),
    ],
)
def test_failed_import_is_one_line_with_the_next_step(error: Exception, words: str) -> None:
    explained = import_error(error, V3)
    assert isinstance(explained, MissingEngineError)
    assert "\n" not in str(explained)
    with pytest.raises(MissingEngineError, match=words):
        raise explained


def test_missing_engine_is_an_error() -> None:
    with pytest.raises(MissingEngineError, match=r"no_such_engine is not installed.*lmeval-ext\[x\]"):
        require(Package("no_such_engine", "x", (8, 0)))
    if not torch.cuda.is_available():
        with pytest.raises(MissingEngineError, match="json needs a GPU"):
            require(Package("json", "x", (8, 0)))
        for name in ("exllamav3", "exl3", "exllamav2", "exl2"):
            with pytest.raises(MissingEngineError, match=r"exllamav[23] (is not installed|needs a GPU)"):
                get_model(name)


def test_old_gpu_is_an_error(monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (6, 1))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "GTX 1080")
    with pytest.raises(UserError, match=r"GTX 1080 \(cuda:0\) has compute capability 6.1, exllamav3 needs 7.5"):
        check_gpu(V3, 0)
    check_gpu(V2, 0)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "out of GPU memory while loading"),
        (RuntimeError("Insufficient VRAM in split for model and cache"), "out of GPU memory while loading"),
        (
            AssertionError("Unknown architecture Gemma3ForCausalLM in config.json"),
            "exllamav3 does not know this architecture",
        ),
        (RuntimeError("CUDA error: no kernel image is available for execution"), "compiled for"),
        (AssertionError("mat1 and mat2"), "hidden_size=64 is not a multiple of 128"),
        (AssertionError("quantized cache must be from 2 to 8 bits"), "cache_bits is 2 to 8"),
    ],
)
def test_failed_load_is_one_line_with_the_next_step(tiny_llama: Path, error: Exception, words: str) -> None:
    config = json.loads((tiny_llama / "config.json").read_text())
    explained = load_error(error, V3, tiny_llama, config)
    assert "\n" not in str(explained)
    with pytest.raises(UserError, match=words):
        raise explained


def test_device_and_gpu_split_choose_the_gpu(monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert single_device("cuda:1", None, False) == 1
    assert single_device(None, None, False) is None
    assert single_device("cuda", [20, 20], False) is None
    assert single_device("cuda:0", None, False) == 0
    for device, split, words in (
        ("cpu", None, "runs on GPUs only"),
        ("cuda:1", [1.0], "names one GPU"),
        ("cuda:2", None, "sees 2"),
        ("gpu", None, "expected cuda"),
    ):
        with pytest.raises(UserError, match=words):
            single_device(device, split, False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert single_device(None, None, False) == 0
    assert single_device(None, None, True) is None


def test_default_device_of_the_harness_allows_gpu_split(monkeypatch: Any) -> None:
    """The harness passes its default device; another default would make `gpu_split=` an error."""
    default = EvaluatorConfig(tasks="wiki2_strided").device
    assert default == "cuda:0"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert single_device(default, [20, 20], False) is None
    assert single_device(default, None, True) is None


WITH_A_PROCESS = """
import multiprocessing, sys
from lmeval_ext.models.exllama.v3.processes import end_at_exit

class Model:  # the methods of exllamav3.Model that start and end processes
    def __init__(self, case):
        self.case, self.mp_children, self.stop = case, [], multiprocessing.Event()

    def load(self):
        self.mp_children = [multiprocessing.Process(target=self.stop.wait), None]
        self.mp_children[0].start()
        if self.case != "loaded":
            raise SystemExit("no room")

    def unload(self):
        if self.case == "loaded":
            self.destroy_tp_context()

    def destroy_tp_context(self):
        if self.case == "confused":
            raise IndexError
        self.stop.set()
        self.mp_children = []

if __name__ == "__main__":
    model = Model(sys.argv[1])
    end_at_exit(model)
    model.load()
"""


@pytest.mark.parametrize(("case", "code"), [("loaded", 0), ("failed", 1), ("confused", 1)])
def test_processes_of_a_model_end_with_the_program(case: str, code: int, tmp_path: Path) -> None:
    """Python waits for child processes at exit, so that without `end_at_exit` the program would never end."""
    script = tmp_path / "program.py"
    script.write_text(WITH_A_PROCESS)
    assert subprocess.run([sys.executable, script, case], timeout=120).returncode == code


def test_missing_checkpoint_is_an_error(tmp_path: Path) -> None:
    for pretrained, words in ((str(tmp_path), "no config.json there"), ("nowhere/nothing", "no such folder")):
        with pytest.raises(UserError, match=words):
            TinyExLlama(pretrained)


def test_record_names_engine_and_storage(tiny_llama: Path) -> None:
    facts = TinyExLlama(str(tiny_llama)).get_model_info()["quantization"]
    assert (facts["engine"], facts["scoring"], facts["kernel"], facts["dtype"]) == ("tiny", "engine", "tiny", "float32")
    assert ExLlamaLM.dtype == torch.float16  # of the real engines
    assert facts["layer_bpw"] == 32.0
    assert facts["kv_bytes_per_token"] == 2 * 2 * 2 * 16 * 2  # layers × (K, V) × KV heads × head_dim × float16


def test_result_says_that_a_quantized_cache_is_not_in_the_scores_of_windows(tiny_llama: Path) -> None:
    model = TinyExLlama(str(tiny_llama))
    assert CACHE_UNUSED not in model.describe().notes
    model.cache_bits = (4, 4)
    assert CACHE_UNUSED in model.describe().notes
