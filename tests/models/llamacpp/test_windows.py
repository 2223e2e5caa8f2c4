"""A score depends on the window alone: not on the context, the batch, the order, or what ran before.

The models are random, in float32, with float32 keys and values, so that only the order of additions may differ.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from lmeval_ext.errors import UserError
from lmeval_ext.requests import WindowRequest, window_request
from tests.models.llamacpp import tiny_gguf

pytestmark = pytest.mark.engine
ROUNDING = {"rtol": 0, "atol": 2e-5}
# Within the original context of the LongRoPE model, at its end, and beyond it
LENGTHS = (40, 200, tiny_gguf.ORIGINAL, tiny_gguf.ORIGINAL + 1, tiny_gguf.ORIGINAL + 2, 300)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Files of `tiny_gguf`, each made once."""
    folder, files = tmp_path_factory.mktemp("gguf"), dict[str, Path]()

    def make(name: str) -> Path:
        if name not in files:
            files[name] = tiny_gguf.ARCHITECTURES[name](folder / f"{name}.gguf")
        return files[name]

    return make


def load(path: Path, **arguments: Any) -> Any:
    return get_model("llamacpp")(
        pretrained=str(path), **{"type_k": "f32", "type_v": "f32", "n_threads": 1, "n_threads_batch": 1} | arguments
    )


def window(length: int, seed: int = 0, scored: int | None = None) -> WindowRequest:
    """A window of random tokens of which the last `scored` are targets; None: all but the first."""
    ids = np.random.default_rng([length, seed]).integers(3, len(tiny_gguf.vocabulary()), length).tolist()
    context = 1 if scored is None else length - scored
    return window_request(f"{length}-{seed}", ids, context, {}, (None, None, None))


def scores(model: Any, windows: Sequence[WindowRequest]) -> dict[str, np.ndarray]:
    return {
        w.args[0]: np.asarray(s.logprobs)
        for w, s in zip(windows, model._loglikelihood_tokens(list(windows)), strict=True)
    }


@pytest.mark.parametrize("architecture", tiny_gguf.ARCHITECTURES)
def test_score_is_the_same_in_any_context_batch_and_order(made: Callable[[str], Path], architecture: str) -> None:
    windows = [window(length) for length in LENGTHS]
    whole = load(made(architecture), max_length=1024)
    alone = {}
    for w in windows:
        alone |= scores(load(made(architecture), max_length=len(w.ids)), [w])
    orders = ((0, 1, 2, 3, 4, 5), (5, 4, 3, 2, 1, 0), (3, 0, 5, 0, 4, 1))
    for order in orders:
        for key, found in scores(whole, [windows[i] for i in order]).items():
            np.testing.assert_allclose(found, alone[key], **ROUNDING, err_msg=f"{architecture}: {key} in {order}")
    small = load(made(architecture), max_length=512, n_batch=48, n_ubatch=16)
    for key, found in scores(small, windows).items():
        np.testing.assert_allclose(found, alone[key], **ROUNDING, err_msg=f"{architecture}: {key}, n_batch=48")


@pytest.mark.parametrize("swa_full", ["on", "off"])
@pytest.mark.parametrize("architecture", tiny_gguf.ARCHITECTURES)
def test_choices_that_share_a_context_score_as_windows(
    made: Callable[[str], Path], architecture: str, swa_full: str
) -> None:
    """A context is computed once for its choices; in a small sliding-window cache it was overwritten meanwhile."""
    model = load(made(architecture), max_length=1024, swa_full=swa_full, n_batch=64, n_ubatch=32)
    contexts = [window(length).ids for length in (230, 250, 280)]
    # The first one in order is longer than the small cache (256 positions), which then lacks the end of the context
    choices = [[3, *window(300, seed=1).ids], *([4 + n, *window(n, seed=1).ids] for n in (2, 9, 60))]
    requests = [(None, context, choice) for context, choice in itertools.product(contexts, choices)]
    windows = [window_request(str(i), c + k, len(c), {}, (None, None, None)) for i, (_, c, k) in enumerate(requests)]
    expected = [s.sum(dtype=np.float64) for s in scores(load(made(architecture), max_length=1024), windows).values()]
    found = [total for total, _ in model._loglikelihood_tokens(requests, disable_tqdm=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)
    again = [total for total, _ in model._loglikelihood_tokens(requests[::-1], disable_tqdm=True)]
    np.testing.assert_allclose(again[::-1], expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("architecture", tiny_gguf.ARCHITECTURES)
def test_generated_text_does_not_depend_on_the_prompt_before(made: Callable[[str], Path], architecture: str) -> None:
    """The last prompt shares a long beginning with the one before, whose positions left the sliding window."""
    shared = "the river in the city " * 10
    prompts = [shared + "and the music of the year " * 20, shared + "two", "the", shared + "two"]
    requests = [
        Instance("generate_until", {}, (p, {"until": [], "max_gen_toks": 12}), i) for i, p in enumerate(prompts)
    ]
    model = load(made(architecture), max_length=1024, swa_full="off", n_batch=64, n_ubatch=32)
    together = model.generate_until(requests, disable_tqdm=True)
    assert together[1] == together[3]
    for request, text in zip(requests, together, strict=True):
        assert load(made(architecture), max_length=1024).generate_until([request], disable_tqdm=True) == [text]


def transformers_phi3() -> tuple[Any, tiny_gguf.Tensors]:
    """A random Phi-3 with LongRoPE in Transformers, and its weights under llama.cpp's names."""
    import torch
    from transformers import Phi3Config, Phi3ForCausalLM

    short, long = tiny_gguf.phi3_factors()
    config = Phi3Config(
        vocab_size=len(tiny_gguf.vocabulary()),
        hidden_size=tiny_gguf.WIDTH,
        intermediate_size=tiny_gguf.FEED_FORWARD,
        num_hidden_layers=tiny_gguf.LAYERS,
        num_attention_heads=tiny_gguf.HEADS,
        num_key_value_heads=tiny_gguf.HEADS,
        max_position_embeddings=1024,
        original_max_position_embeddings=tiny_gguf.ORIGINAL,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": short.tolist(),
            "long_factor": long.tolist(),
            "original_max_position_embeddings": tiny_gguf.ORIGINAL,
            "attention_factor": 1.19,
        },
        initializer_range=0.2,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    model = Phi3ForCausalLM(config).float().eval()
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.qkv_proj": "attn_qkv",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    tensors = {}
    for name, tensor in model.state_dict().items():
        stem = name.removesuffix(".weight")
        if stem.startswith("model.layers."):
            _, _, layer, rest = stem.split(".", 3)
            target = f"blk.{layer}.{names[rest]}"
        else:
            target = names[stem]
        tensors[f"{target}.weight"] = tensor.numpy()
    return model, tensors


def by_transformers(model: Any, w: WindowRequest) -> np.ndarray:
    """Log-probabilities of a window's targets in float64; the last token is only predicted."""
    import torch

    with torch.no_grad():
        logits = model(torch.tensor([w.ids[:-1]])).logits[0].double()
    targets = torch.tensor(w.ids[1:])[:, None]
    return torch.log_softmax(logits, -1).gather(1, targets)[-len(w.target_ids) :, 0].numpy()


def test_longrope_has_the_factors_of_the_windows_length(tmp_path: Path) -> None:
    reference, tensors = transformers_phi3()
    path = tiny_gguf.phi3(tmp_path / "phi3.gguf", tensors)
    windows = [window(length) for length in LENGTHS]
    model = load(path, max_length=1024)
    for w, found in zip(windows, scores(model, windows).values(), strict=True):
        np.testing.assert_allclose(found, by_transformers(reference, w), rtol=0, atol=1e-4, err_msg=w.args[0])


def test_longrope_window_that_no_context_suits_is_refused(tmp_path: Path) -> None:
    """An original context of 300: llama.cpp allocates 512 for 290 tokens and takes the factors of longer ones."""
    model = load(tiny_gguf.phi3(tmp_path / "phi3.gguf", original=300), max_length=512)
    model._loglikelihood_tokens([window(257), window(302)])
    with pytest.raises(UserError, match="290 tokens is within the original context of 300") as caught:
        model._loglikelihood_tokens([window(291)])
    assert "at most 256" in str(caught.value)


def test_yarn_parameters_in_the_file_are_obeyed(tmp_path: Path) -> None:
    """Kimi-K2 has beta_fast = beta_slow = 1; llama-cpp-python and most of llama.cpp's architectures take 32 and 1."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    yarn = {"factor": 8.0, "original_max_position_embeddings": 256, "beta_fast": 4.0, "beta_slow": 0.5}
    config = LlamaConfig(
        vocab_size=len(tiny_gguf.vocabulary()), hidden_size=tiny_gguf.WIDTH, num_hidden_layers=tiny_gguf.LAYERS,
        intermediate_size=tiny_gguf.FEED_FORWARD, num_attention_heads=tiny_gguf.HEADS,
        num_key_value_heads=tiny_gguf.KV_HEADS, max_position_embeddings=2048, initializer_range=0.2,
        rms_norm_eps=1e-5, rope_parameters={"rope_type": "yarn", "rope_theta": 10000.0, **yarn},
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    reference = LlamaForCausalLM(config).float().eval()
    names = gguf_names(reference)

    def metadata(writer: Any) -> None:
        tiny_gguf.attention_metadata(writer)
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(yarn["factor"])
        writer.add_rope_scaling_orig_ctx_len(256)
        writer.add_rope_scaling_yarn_beta_fast(yarn["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(yarn["beta_slow"])

    path = tiny_gguf.write(tmp_path / "yarn.gguf", "llama", names, metadata, context=2048)
    w = window(200)
    found = scores(load(path, max_length=512), [w])[w.args[0]]
    np.testing.assert_allclose(found, by_transformers(reference, w), rtol=0, atol=1e-4)
    # An argument of the user overrides the file
    other = scores(load(path, max_length=512, yarn_beta_fast=32.0, yarn_beta_slow=1.0), [w])[w.args[0]]
    assert np.abs(other - found).max() > 1e-3


def gguf_names(model: Any) -> tiny_gguf.Tensors:
    """The weights of a Transformers Llama under llama.cpp's names, with rotated rows in its order."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, tiny_gguf.LAYERS)
    tensors = {}
    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        for projection, heads in (("q_proj", tiny_gguf.HEADS), ("k_proj", tiny_gguf.KV_HEADS)):
            if projection in name:  # `permute` in llama.cpp's convert_hf_to_gguf.py
                rows = values.reshape(heads, 2, tiny_gguf.HEAD // 2, tiny_gguf.WIDTH)
                values = rows.swapaxes(1, 2).reshape(values.shape)
        tensors[names.get_name(name, try_suffixes=(".weight",))] = values
    return tensors
