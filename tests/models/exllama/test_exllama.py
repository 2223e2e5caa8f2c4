"""The ExLlama adapters without an engine: the shared class on a float32 Llama, compared with the harness' own `hf`."""

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
from lmeval_ext.models.exllama import batching as exllama_batching
from lmeval_ext.models.exllama import messages
from lmeval_ext.models.exllama.adapter import ExLlamaLM
from lmeval_ext.models.exllama.config import cache_bits, context_length, numbers, stop_tokens
from lmeval_ext.models.exllama.generation import GenerationJob, generate
from lmeval_ext.models.exllama.memory import default_cache_tokens
from lmeval_ext.models.exllama.v2.rope import read_rope, tell_v2_rope
from lmeval_ext.models.sampling import Sampling
from lmeval_ext.models.shared_contexts import group_requests, shared_batches, split_groups
from tests.conftest import VOCABULARY, make_llama, make_tokenizer
from tests.models.exllama.tiny_engine import PagedTinyEngine, TinyExLlama
from tests.models.test_adapters import answers, by_hand, requests_of, windows

QUESTION = "Iceland is an island country in the North Atlantic Ocean, and its capital is"
CHOICES = [" Reykjavik", " a large town in the north", " a", " a volcano that erupts every year."]
TEXT = "Iceland is an island country in the North Atlantic. " * 20


@pytest.fixture(scope="module")
def stock(tiny_llama: Path) -> Any:
    return get_model("hf")(pretrained=str(tiny_llama), dtype="float32", device="cpu")


def pairs(*arguments: tuple[str, str]) -> list[Instance]:
    return requests_of("loglikelihood", *arguments)


def assert_like(ours: list[tuple[float, bool]], theirs: list[tuple[float, bool]]) -> None:
    np.testing.assert_allclose([a for a, _ in ours], [b for b, _ in theirs], rtol=1e-5, atol=1e-4)
    assert [g for _, g in ours] == [g for _, g in theirs]


# ---------------------------------------------------------------------- windows


@pytest.mark.parametrize("batch_size", [1, 4, "auto"])
def test_windows_by_hand(tiny_llama: Path, batch_size: int | str) -> None:
    model = TinyExLlama(str(tiny_llama), batch_size=batch_size)
    requests = windows()
    logprobs, greedy = answers(model, requests)
    expected, matches = by_hand(tiny_llama, requests)
    np.testing.assert_allclose(logprobs, expected, rtol=1e-5, atol=1e-6)
    assert (greedy == matches).all()
    assert [rows for rows, _ in model.engine.shapes] == {1: [1] * 6, 4: [4, 2], "auto": [6]}[batch_size]


def test_windows_of_different_shapes_keep_their_order(tiny_llama: Path) -> None:
    long, short = windows(3), windows(2, length=40, context=1)
    scores = TinyExLlama(str(tiny_llama))._loglikelihood_tokens([long[0], short[0], long[1], short[1], long[2]])
    assert [len(s.logprobs) for s in scores] == [63, 39, 63, 39, 63]
    np.testing.assert_allclose(scores[3].logprobs, by_hand(tiny_llama, short)[0][1], rtol=1e-5, atol=1e-6)


def test_logits_in_small_chunks_are_the_same(tiny_llama: Path) -> None:
    model = TinyExLlama(str(tiny_llama))
    model.batching.logit_bytes = 2 * model.engine.columns * 10  # ten positions at a time
    np.testing.assert_allclose(answers(model, windows())[0], by_hand(tiny_llama, windows())[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch_size", ["auto", 6])
def test_batches_are_halved_when_memory_runs_out(tiny_llama: Path, batch_size: int | str, caplog: Any) -> None:
    model = TinyExLlama(str(tiny_llama), batch_size=batch_size, memory=200)
    logprobs, _ = answers(model, windows())
    np.testing.assert_allclose(logprobs, by_hand(tiny_llama, windows())[0], rtol=1e-5, atol=1e-6)
    assert "going on with 3 at a time" in caplog.text
    # 6 and 3 windows of 96 do not fit, 1 does; 2 would
    assert {rows for rows, _ in model.engine.shapes} == {1}
    answers(model, windows())  # what does not fit is not tried again
    assert caplog.text.count("going on with") == 2


def test_memory_for_no_window_at_all(tiny_llama: Path) -> None:
    with pytest.raises(UserError, match="out of GPU memory with a single sequence of 96 tokens"):
        answers(TinyExLlama(str(tiny_llama), memory=50), windows())


def test_one_window_gets_its_logits_in_smaller_chunks(tiny_llama: Path, monkeypatch: Any, caplog: Any) -> None:
    """What does not fit may be the logits: 30 positions at a time here."""
    model = TinyExLlama(str(tiny_llama), batch_size=1)
    monkeypatch.setattr(exllama_batching, "_LEAST_LOGIT_BYTES", 2 * model.engine.columns * 20)
    model.batching.logit_bytes = 2 * model.engine.columns * 90
    logits = model.engine.logits

    def short(hidden: torch.Tensor) -> torch.Tensor:
        if hidden.shape[0] > 30:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. (a test)")
        return logits(hidden)

    monkeypatch.setattr(model.engine, "logits", short)
    np.testing.assert_allclose(answers(model, windows())[0], by_hand(tiny_llama, windows())[0], rtol=1e-5, atol=1e-6)
    assert caplog.text.count("its logits now in chunks of") == 2
    assert model.batching.logit_rows() == 22


def test_states_that_were_too_much_are_let_go(tiny_llama: Path, monkeypatch: Any) -> None:
    """Before memory is released and a smaller batch tried."""
    model = TinyExLlama(str(tiny_llama))
    branch, pick, states, alive = model.engine.branch, model.scorer._pick, [], []

    def branched(*arguments: Any) -> torch.Tensor:
        alive.extend(state() is not None for state in states)
        hidden = branch(*arguments)
        states.append(weakref.ref(hidden))
        return hidden

    def picked(hidden: torch.Tensor, groups: Any) -> Any:
        if len(groups) > 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. (a test)")
        return pick(hidden, groups)

    monkeypatch.setattr(model.engine, "branch", branched)
    monkeypatch.setattr(model.scorer, "_pick", picked)
    requests = pairs(*((f"{QUESTION}{n}", c) for n in ("", "?") for c in CHOICES))
    expected = TinyExLlama(str(tiny_llama), share=False).loglikelihood(requests)
    assert_like(model.loglikelihood(requests), expected)
    assert alive[0] is False


def test_other_errors_are_not_taken_for_memory(tiny_llama: Path, monkeypatch: Any) -> None:
    model = TinyExLlama(str(tiny_llama))
    monkeypatch.setattr(model.engine, "hidden", lambda *a: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        answers(model, windows())


# ---------------------------------------------------------------------- log-likelihoods


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("memory", [None, 160])
def test_loglikelihoods_are_those_of_hf(tiny_llama: Path, stock: Any, share: bool, memory: int | None) -> None:
    questions = [(f"{QUESTION}{n}", c) for n in ("", "?", " not") for c in CHOICES]
    requests = pairs(*questions, ("", "The capital"), ("A volcano ", "erupts"), ("x", TEXT[:200]))
    ours = TinyExLlama(str(tiny_llama), share=share, memory=memory)
    assert_like(ours.loglikelihood(requests), stock.loglikelihood(requests))
    assert bool(ours.engine.branched) == share


def test_a_context_is_computed_once(tiny_llama: Path, stock: Any) -> None:
    shared, alone = (TinyExLlama(str(tiny_llama), share=share) for share in (True, False))
    requests = pairs(*((QUESTION, c) for c in CHOICES))
    assert_like(shared.loglikelihood(requests), alone.loglikelihood(requests))
    context = len(shared.tok_encode(QUESTION))
    assert sum(rows * length for rows, length in shared.engine.shapes) < context + 4 * 40
    assert sum(rows * length for rows, length in alone.engine.shapes) >= 4 * context


def test_one_token_choices_need_one_row(tiny_llama: Path, stock: Any) -> None:
    model = TinyExLlama(str(tiny_llama), share=False)
    context = list(range(3, 40))
    requests = [(None, context, [choice]) for choice in (5, 6, 7, 8)]
    result = model._loglikelihood_tokens(requests, disable_tqdm=True)
    assert_like(result, stock._loglikelihood_tokens(requests, disable_tqdm=True))
    assert [rows for rows, _ in model.engine.shapes] == [1]


@pytest.mark.parametrize("batch_size", [1, 3, "auto"])
def test_neither_order_nor_batch_size_matter(tiny_llama: Path, batch_size: int | str) -> None:
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
    # Lengths such that no two have the same context and continuation but for its last token: lm-eval 0.4.13 mixes those
    # up where the continuations' lengths differ
    requests = [(None, tokens[:n], tokens[n : n + m]) for n, m in ((300, 5), (256, 1), (250, 9), (2, 256), (140, 256))]
    ours = TinyExLlama(str(tiny_llama))._loglikelihood_tokens(requests, disable_tqdm=True)
    assert_like(ours, stock._loglikelihood_tokens(requests, disable_tqdm=True))


def test_a_context_of_white_space_gets_the_prefix_token_as_in_hf(tmp_path: Path) -> None:
    """The harness moves white space to the continuation; where no BOS is added, no context is left."""
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
def test_continuations_that_cannot_be_scored(tiny_llama: Path, tokens: int, words: str) -> None:
    requests = [(("a", "b"), [3], [4]), (("a", "an end"), [3], [4] * tokens)]
    with pytest.raises(UserError, match=f"^the continuation 'an end' of request 1 {words}") as caught:
        TinyExLlama(str(tiny_llama))._loglikelihood_tokens(requests, disable_tqdm=True)
    assert "\n" not in str(caught.value)


def test_rolling_log_likelihood_is_that_of_hf(tiny_llama: Path, stock: Any) -> None:
    texts = requests_of("loglikelihood_rolling", (TEXT,), ("Short.",), (TEXT[:300],))
    ours = TinyExLlama(str(tiny_llama)).loglikelihood_rolling(texts)
    np.testing.assert_allclose(ours, stock.loglikelihood_rolling(texts), rtol=1e-5)


def test_answers_go_to_the_request_cache_at_once(tiny_llama: Path) -> None:
    model = TinyExLlama(str(tiny_llama))
    kept: dict[Any, Any] = {}
    model.cache_hook = types.SimpleNamespace(add_partial=lambda kind, key, value: kept.update({(kind, *key): value}))
    (answer,) = model.loglikelihood(pairs((QUESTION, CHOICES[0])))
    assert kept == {("loglikelihood", QUESTION, CHOICES[0]): answer}


# ---------------------------------------------------------------------- plans


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


@pytest.mark.parametrize("pages", [64, 18])
def test_paged_branches_are_exact(tiny_llama: Path, pages: int) -> None:
    """ExLlamaV3's pages: shared where they are full, copied where a context ends within one, the trunk kept."""
    rng = np.random.default_rng(3)
    tokens = rng.integers(2, VOCABULARY, 200).tolist()
    engine = PagedTinyEngine(tiny_llama, pages=pages)
    batches = [
        ([tokens[:40], tokens[:50]], [[[5], [6, 7, 8]], [[9, 10], [11], [12]]]),  # a trunk of 40
        ([[*tokens[:32], 3, 4, 5]], [[[1, 2, 3]]]),  # cut back to 32, one tail
        ([tokens[:48], [*tokens[:48], *tokens[100:130]]], [[[7], [8]], [[9, 9]]]),  # two pages more, mixed
        ([[3, 4, 5], [6]], [[[7], [8, 9]], [[5, 6, 7]]]),  # nothing shared
        ([[]], [[[7, 8], [9]]]),  # no context
    ]
    done = 0
    for contexts, tails in batches:
        if not engine.branches.fit(contexts, tails):
            continue
        done += 1
        expected = [
            engine._forward(torch.tensor([[*context, *tail]])).last_hidden_state[0, -len(tail) :]
            for context, rows in zip(contexts, tails, strict=True)
            for tail in rows
        ]
        torch.testing.assert_close(engine.branch(contexts, tails), torch.cat(expected), rtol=1e-4, atol=1e-4)
    assert done == {64: 5, 18: 4}[pages]


def test_paged_branches_in_the_adapter(tiny_llama: Path, stock: Any, monkeypatch: Any) -> None:
    questions = [(f"{QUESTION}{n}", c) for n in ("", " still", " not") for c in CHOICES]
    model = TinyExLlama(str(tiny_llama))
    engine = PagedTinyEngine(tiny_llama, pages=48)
    model.engine = model.scorer.engine = model.batching.engine = engine
    assert_like(model.loglikelihood(pairs(*questions)), stock.loglikelihood(pairs(*questions)))
    context = len(model.tok_encode(QUESTION))
    assert engine.branched
    assert engine.tokens < 3 * context + 12 * 32 + 3 * 64


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
def test_bos_has_the_meaning_of_hf(tmp_path: Path, bos: bool, arguments: dict[str, Any]) -> None:
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


def test_chat_template_is_the_tokenizers(tmp_path: Path) -> None:
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
    return requests_of(
        "generate_until", (context, {"until": ["\n\n"], "do_sample": False, "max_gen_toks": 8, **arguments})
    )[0]


def test_generations_are_those_of_hf(tiny_llama: Path, stock: Any) -> None:
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


def test_what_a_job_is_told(tmp_path: Path) -> None:
    folder = make_llama(tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 9]}))
    model = TinyExLlama(str(folder))
    arguments = {"until": ["Q:", "<s>", ""], "max_gen_toks": 3, "do_sample": True, "temperature": 0.7, "top_p": 0.9}
    model.generate_until(requests_of("generate_until", ("Iceland", arguments)))
    (prompt,) = model.generators[0].prompts
    assert (prompt.max_new, prompt.stop_tokens, prompt.stop_strings) == (3, [0, 1, 9], ["Q:"])
    assert prompt.sampling == Sampling(temperature=0.7, top_p=0.9)
    # A token stops where its name has a stop sequence in it, as in `hf`, which looks at the text with special tokens
    prompt, _ = model._prompt(0, "Iceland", {"until": ["s>"], "max_gen_toks": 3})
    assert (prompt.stop_tokens, prompt.stop_strings) == ([0, 1, 9], ["s>"])
    prompt, _ = model._prompt(0, "Iceland", {"until": ["<s>x"], "max_gen_toks": 3})
    assert prompt.stop_tokens == [1, 9]


def test_a_stopping_token_is_not_text(tiny_llama: Path) -> None:
    model = TinyExLlama(str(tiny_llama))
    first = model.tok_encode(model.generate_until([generation("Iceland is", max_gen_toks=1)])[0])
    model.generators[0].prompts.clear()
    prompt = GenerationJob(0, model.tok_encode("Iceland is"), 5, stop_tokens=[*range(VOCABULARY)])
    ((index, ids),) = generate(model.generators[0], [prompt])
    assert (index, len(ids)) == (0, 1)
    assert model._text([*first, 1], ["</s>"]) == model.tok_decode(first)


def test_thinking_is_cut_off_as_in_hf(tiny_llama: Path) -> None:
    model = TinyExLlama(str(tiny_llama), think_end_token="island")
    ids = model.tok_encode("an island is. Iceland\n\nmore")
    assert model._text(ids, ["\n\n"]) == "is. Iceland"
    model = TinyExLlama(str(tiny_llama), think_end_token=5)
    assert model._text([7, 5, 8, 5, *model.tok_encode(" Iceland")], []) == "Iceland"


@pytest.mark.parametrize(
    ("arguments", "model_arguments", "words"),
    [
        ({"max_gen_toks": 256}, {}, "max_gen_toks=256: expected at least 1 and less than the model's max_length=256"),
        ({"max_gen_toks": 60}, {"cache_tokens": 32}, "the KV cache holds 32; set cache_tokens=256"),
        ({"num_beams": 4}, {}, "num_beams=4: the ExLlama engines cannot do that"),
        ({"typical_p": 0.5}, {}, "typical_p=0.5 is not known"),
    ],
)
def test_generations_that_cannot_be(
    tiny_llama: Path, arguments: dict[str, Any], model_arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        TinyExLlama(str(tiny_llama), **model_arguments).generate_until([generation("Iceland is", **arguments)])


def test_a_failed_job_is_an_error_and_leaves_no_others(tiny_llama: Path, monkeypatch: Any) -> None:
    model = TinyExLlama(str(tiny_llama))
    failure = {"stage": "error", "identifier": 0, "eos": True, "error": ValueError("cache is broken")}
    monkeypatch.setattr(model.generators[0], "step", lambda: [failure])
    with pytest.raises(ValueError, match="cache is broken"):
        model.generate_until([generation("Iceland is"), generation("A volcano")])
    assert model.generators[0].jobs == []


# ---------------------------------------------------------------------- configs


def test_context_and_stop_tokens(tmp_path: Path) -> None:
    assert context_length({"max_position_embeddings": 77}) == 77
    assert context_length({"text_config": {"max_position_embeddings": 55}, "max_position_embeddings": 77}) == 55
    assert context_length({}, types.SimpleNamespace(model_max_length=99)) == 99
    assert context_length({}, types.SimpleNamespace(model_max_length=int(1e30))) == 2048
    assert stop_tokens(tmp_path, {"eos_token_id": 2}) == [2]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    assert stop_tokens(tmp_path, {"eos_token_id": 2}) == [3, 4]


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ORIGINAL = {"original_max_position_embeddings": 8192}


def v2_config() -> Any:
    """What ExLlamaV2Config.prepare() of 0.3.2 leaves behind for a config of Transformers 5."""
    return types.SimpleNamespace(
        rotary_embedding_base=10000.0, scale_pos_emb=1.0, alt_rope_method=None, partial_rotary_factor=1.0
    )


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"rope_parameters": {"rope_theta": 1e5, "rope_type": "default"}}, {"rotary_embedding_base": 1e5}),
        ({"rope_theta": 5e5}, {"rotary_embedding_base": 5e5}),
        ({"rope_theta": 5e5, "rope_scaling": None}, {"rotary_embedding_base": 5e5, "scale_pos_emb": 1.0}),
        ({"text_config": {"rope_parameters": {"rope_theta": 7e4}}}, {"rotary_embedding_base": 7e4}),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 4.0}}, {"scale_pos_emb": 4.0}),
        (
            {"rope_parameters": {**LLAMA3, **ORIGINAL, "rope_theta": 5e5}},
            {"alt_rope_method": "llama3", "l3_rope_factor": 8.0, "l3_rope_original_max_position_embeddings": 8192},
        ),
        (
            {
                "original_max_position_embeddings": 4096,
                "rope_scaling": {"type": "longrope", "long_factor": [2.0], "short_factor": [1.0]},
            },
            {"alt_rope_method": "su", "scale_long_factor": [2.0], "original_max_seq_len": 4096},
        ),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, {"partial_rotary_factor": 0.5}),
    ],
)
def test_exllamav2_is_told_of_rotary_embeddings(config: dict[str, Any], expected: dict[str, Any]) -> None:
    v2 = v2_config()
    tell_v2_rope(v2, config, "model")
    assert {name: getattr(v2, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, **ORIGINAL}}, "of the kind 'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "of the kind 'dynamic'"),
        ({"rope_parameters": LLAMA3}, "names no original_max_position_embeddings"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "differ by layer type"),
    ],
)
def test_exllamav2_refuses_other_rotary_embeddings(config: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=f"^model: .*{words}"):
        tell_v2_rope(v2_config(), config, "model")


def test_rope_as_transformers_saves_it(tiny_llama: Path) -> None:
    """The trap: what Transformers 5 writes has no top-level rope_theta."""
    config = json.loads((tiny_llama / "config.json").read_text())
    assert read_rope(config).theta == 10000.0
    assert "rope_theta" not in config, "Transformers writes it again: ExLlamaV2 then needs less telling"


def test_figures_in_arguments() -> None:
    assert numbers("gpu_split", "20/24") == numbers("gpu_split", [20, 24]) == numbers("gpu_split", "20,24") == [20, 24]
    assert numbers("gpu_split", None) is None
    assert numbers("gpu_split", 20) == [20]
    assert cache_bits("q4", (4, 6, 8)) == cache_bits(4, (4, 6, 8)) == (4, 4)
    assert cache_bits("8/4", (4, 8)) == (8, 4)
    assert cache_bits("fp16", (4,)) is None
    with pytest.raises(UserError, match="gpu_split='much': expected figures"):
        numbers("gpu_split", "much")
    for wrong in ("5", "4/4/4", "four"):
        with pytest.raises(UserError, match=f"cache_bits='{wrong}': expected 4, 6, 8 or fp16"):
            cache_bits(wrong, (4, 6, 8))


def test_default_cache() -> None:
    gib = 1024**3
    assert default_cache_tokens(80 * gib, 131072, 131072, False) == 32768  # 8 GiB of it would hold twice as much
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
def test_a_failed_import_says_what_helps(error: Exception, words: str) -> None:
    found = messages.import_error(error, "exllamav3", "exl3")
    assert isinstance(found, MissingEngineError)
    assert "\n" not in str(found)
    with pytest.raises(MissingEngineError, match=words):
        raise found


def test_engines_that_are_not_there() -> None:
    with pytest.raises(MissingEngineError, match=r"no_such_engine is not installed.*lmeval-ext\[x\]"):
        messages.require("no_such_engine", "x")
    if not torch.cuda.is_available():
        with pytest.raises(MissingEngineError, match="json needs a GPU"):
            messages.require("json", "x")
        for name in ("exllamav3", "exl3", "exllamav2", "exl2"):
            with pytest.raises(MissingEngineError, match=r"exllamav[23] (is not installed|needs a GPU)"):
                get_model(name)


def test_an_old_gpu_is_refused(monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (6, 1))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "GTX 1080")
    with pytest.raises(UserError, match=r"GTX 1080 \(cuda:0\) has compute capability 6.1, exllamav3 needs 7.5"):
        messages.check_gpu("exllamav3", (7, 5), [0])
    messages.check_gpu("exllamav2", (6, 0), [0])


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "out of GPU memory while loading"),
        (RuntimeError("Insufficient VRAM in split for model and cache"), "out of GPU memory while loading"),
        (AssertionError("Unknown architecture Gemma3ForCausalLM in config.json"), "does not know this architecture"),
        (RuntimeError("CUDA error: no kernel image is available for execution"), "compiled for"),
        (AssertionError("mat1 and mat2"), "hidden_size=64 is no multiple of 128"),
    ],
)
def test_a_failed_load_is_one_line(tiny_llama: Path, error: Exception, words: str) -> None:
    config = json.loads((tiny_llama / "config.json").read_text())
    found = messages.load_error(error, "exllamav3", tiny_llama, config, multiple=128)
    assert "\n" not in str(found)
    with pytest.raises(UserError, match=words):
        raise found


def test_where_to_load(monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert messages.single_device("cuda:1", None, False) == 1
    assert messages.single_device(None, None, False) is None
    assert messages.single_device("cuda", [20, 20], False) is None
    assert messages.single_device("cuda:0", None, False) == 0
    for device, split, words in (
        ("cpu", None, "runs on GPUs only"),
        ("cuda:1", [1.0], "names one GPU"),
        ("cuda:2", None, "sees 2"),
        ("gpu", None, "expected cuda"),
    ):
        with pytest.raises(UserError, match=words):
            messages.single_device(device, split, False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert messages.single_device(None, None, False) == 0
    assert messages.single_device(None, None, True) is None


def test_the_device_that_the_harness_says_by_itself_is_no_wish(monkeypatch: Any) -> None:
    """Where it says another one day, `gpu_split=` through its command line is refused."""
    unasked = EvaluatorConfig(tasks="wiki2_strided").device
    assert unasked == "cuda:0"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert messages.single_device(unasked, [20, 20], False) is None
    assert messages.single_device(unasked, None, True) is None


WITH_A_PROCESS = """
import multiprocessing, sys
from lmeval_ext.models.exllama.v3.processes import end_at_exit

class Model:  # as far as ExLlamaV3's has to do with it
    def __init__(self, what):
        self.what, self.mp_children, self.stop = what, [], multiprocessing.Event()

    def load(self):
        self.mp_children = [multiprocessing.Process(target=self.stop.wait), None]
        self.mp_children[0].start()
        if self.what != "loaded":
            raise SystemExit("no room")

    def unload(self):
        if self.what == "loaded":
            self.destroy_tp_context()

    def destroy_tp_context(self):
        if self.what == "confused":
            raise IndexError
        self.stop.set()
        self.mp_children = []

if __name__ == "__main__":
    model = Model(sys.argv[1])
    end_at_exit(model)
    model.load()
"""


@pytest.mark.parametrize(("what", "code"), [("loaded", 0), ("failed", 1), ("confused", 1)])
def test_a_models_processes_end_with_the_program(what: str, code: int, tmp_path: Path) -> None:
    """Python waits for them at exit; without `end_at_exit` for ever, as `timeout` shows."""
    script = tmp_path / "program.py"
    script.write_text(WITH_A_PROCESS)
    assert subprocess.run([sys.executable, script, what], timeout=120).returncode == code


def test_checkpoints_that_are_not_there(tmp_path: Path) -> None:
    for pretrained, words in ((str(tmp_path), "no config.json there"), ("nowhere/nothing", "no such folder")):
        with pytest.raises(UserError, match=words):
            TinyExLlama(pretrained)


def test_the_record(tiny_llama: Path) -> None:
    facts = TinyExLlama(str(tiny_llama)).get_model_info()["quantization"]
    assert (facts["engine"], facts["scoring"], facts["kernel"], facts["dtype"]) == ("tiny", "engine", "tiny", "float32")
    assert ExLlamaLM.dtype == torch.float16  # the real engines', of which this one is none
    assert facts["layer_bpw"] == 32.0
    assert facts["kv_bytes_per_token"] == 2 * 2 * 2 * 16 * 2  # layers × (K, V) × KV heads × head_dim × float16
