"""The size of the KV cache against what engines keep: Transformers' cache, vLLM's specifications, llama.cpp's log."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmeval_ext.storage.kv_cache import kv_cache
from lmeval_ext.storage.kv_families import FAMILIES
from tests.storage.builders import finish_gguf
from tests.storage.test_kv_cache import folder_with

pytestmark = pytest.mark.engine


def test_usual_values_are_those_of_the_config_classes():
    """The values that published configs leave out, in the installed Transformers."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    compared = 0
    for model_type, family in FAMILIES.items():
        if model_type not in CONFIG_MAPPING:
            continue
        config_class = CONFIG_MAPPING[model_type]
        names = config_class.attribute_map
        usual = {field.name: field.default for field in dataclasses.fields(config_class)}
        for key, value in family.usual.items():
            # A latent's head_dim is that of the rotary key, and is not read
            if names.get(key, key) in usual and not (key == "head_dim" and "kv_lora_rank" in usual):
                assert usual[names.get(key, key)] == value, (model_type, key)
                compared += 1
    if not compared:
        pytest.skip("config classes of this Transformers are no dataclasses")
    assert compared > 300


SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "sliding_window": 16,
    "pad_token_id": 0,
}  # fmt: skip
GDN = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
KINDS: dict[str, dict[str, Any]] = {
    "mistral": {},
    "gemma2": {},
    "cohere2": {},
    "olmo3": {},
    "gemma4_text": {"num_hidden_layers": 12, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8,
                    "vocab_size_per_layer_input": 64, "global_head_dim": 32},
    "qwen3_next": {**GDN, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16,
                   "shared_expert_intermediate_size": 16},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 3, "mamba_n_heads": 8,
                         "mamba_d_head": 16, "mamba_d_state": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
}  # fmt: skip


@pytest.mark.parametrize("model_type", KINDS)
def test_figure_matches_the_cache_of_transformers(tmp_path, model_type):
    """Keys and values after 40 tokens; Transformers keeps one token less than the window between two forwards."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = CONFIG_MAPPING[model_type](**SMALL | KINDS[model_type])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        cache = model(torch.arange(40)[None], use_cache=True).past_key_values
    tensors = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    kept = sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
    stated = json.loads(config.to_json_string(use_diff=False)) | {"dtype": "float32"}
    if model_type != "granitemoehybrid":
        stated.pop("layer_types", None)  # the table's own pattern
    found = kv_cache(folder_with(tmp_path / "m", **stated))
    assert found.exact
    assert sum(size * min(40, window - 1 if window else 40) for size, window in found.groups) == kept


def test_bytes_per_token_are_vllms_page_sizes():
    """Pages of one token: plain heads, a latent, NVFP4; and states."""
    pytest.importorskip("vllm")
    import torch
    from vllm.model_executor.layers.mamba.mamba_utils import MambaStateShapeCalculator as Shapes
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec, MLAAttentionSpec

    from lmeval_ext.storage.kv_cache import _per_token
    from lmeval_ext.storage.kv_layers import LayerCache

    heads = {"block_size": 1, "num_kv_heads": 8, "head_size": 128}
    plain = LayerCache(keys=8 * 128, values=8 * 128)
    for dtype, name in ((torch.bfloat16, "bfloat16"), (torch.float32, "float32"), (torch.float8_e4m3fn, "fp8")):
        assert FullAttentionSpec(**heads, dtype=dtype).page_size_bytes == _per_token(plain, name, name)
    latent = MLAAttentionSpec(block_size=1, num_kv_heads=1, head_size=576, dtype=torch.bfloat16)
    assert latent.page_size_bytes == _per_token(LayerCache(keys=576), "bfloat16", "bfloat16")

    def bytes_of(shapes: Any) -> int:
        return MambaSpec(block_size=1, shapes=shapes, dtypes=(torch.bfloat16, torch.float32)).page_size_bytes

    def ours(model_type: str) -> int:
        from lmeval_ext.storage.kv_families import Fields

        family = FAMILIES[model_type]
        conv, recurrent = family.state(Fields({}, family.usual))
        return 2 * conv + 4 * recurrent

    assert ours("qwen3_next") == bytes_of(Shapes.gated_delta_net_state_shape(1, 16, 32, 128, 128, 4))
    assert ours("jamba") == bytes_of(Shapes.mamba1_state_shape(1, 8192, 16, 4))
    assert ours("nemotron_h") == bytes_of(Shapes.mamba2_state_shape(1, 128 * 64, 8, 128, 64, 128, 4))


def write_model(path: Path, arch: str, keys: dict[str, Any], tensors: dict[str, tuple[int, ...]]) -> Path:
    """Write a GGUF model of zeros that llama.cpp loads. tensors: shapes, outermost dimension first."""
    import gguf

    writer = gguf.GGUFWriter(path, arch)
    for key, value in keys.items():
        if isinstance(value, list):
            writer.add_array(f"{arch}.{key}", value)
        elif isinstance(value, float):
            writer.add_float32(f"{arch}.{key}", value)
        else:
            writer.add_uint32(f"{arch}.{key}", value)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(32)
    for name, shape in tensors.items():
        writer.add_tensor(name, np.zeros(shape, dtype=np.float32))
    finish_gguf(writer)
    return path


def decoder(layers: int, norms: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Return keys and tensors of a decoder: width 512, 4 heads of 128, 2 KV heads."""
    keys = {"block_count": layers, "context_length": 4096, "embedding_length": 512, "feed_forward_length": 64,
            "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 128,
            "attention.value_length": 128, "attention.layer_norm_rms_epsilon": 1e-5,
            "rope.dimension_count": 128}  # fmt: skip
    shapes = {"attn_q": (512, 512), "attn_k": (256, 512), "attn_v": (256, 512), "attn_output": (512, 512),
              "ffn_gate": (64, 512), "ffn_up": (64, 512), "ffn_down": (512, 64)}  # fmt: skip
    shapes |= {name: (128,) if name in ("attn_q_norm", "attn_k_norm") else (512,) for name in norms}
    tensors = {"token_embd.weight": (32, 512), "output_norm.weight": (512,)}
    tensors |= {f"blk.{n}.{name}.weight": shape for n in range(layers) for name, shape in shapes.items()}
    return keys, tensors


PLAIN_NORMS = ("attn_norm", "ffn_norm")
GEMMA_3_NORMS = (*PLAIN_NORMS, "attn_q_norm", "attn_k_norm", "post_attention_norm", "post_ffw_norm")
LINE = re.compile(r"llama_kv_cache: size = +([\d.]+) MiB \( *(\d+) cells, +(\d+) layers")


# In a process of its own: the adapter's log callback, once set, stays for the whole process
ALLOCATE = """
import sys, llama_cpp
path, type_k, type_v = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
flash = bool(getattr(llama_cpp, "LLAMA_FLASH_ATTN_TYPE_ENABLED", 1))
llama_cpp.Llama(path, n_ctx=4096, n_batch=512, n_ubatch=512, type_k=type_k, type_v=type_v, flash_attn=flash,
                swa_full=False, n_gpu_layers=0, verbose=True).close()
"""


@pytest.mark.parametrize(("type_k", "type_v"), [(1, 1), (8, 1), (8, 8)], ids=["F16", "Q8_0 and F16", "Q8_0"])
@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_figure_matches_what_llama_cpp_allocates(tmp_path, arch, type_k, type_v):
    """Bytes per cell of each cache that llama.cpp's log names, of full and of windowed layers."""
    pytest.importorskip("llama_cpp")
    keys, tensors = decoder(12, PLAIN_NORMS if arch == "llama" else GEMMA_3_NORMS)
    if arch == "gemma3":
        keys["attention.sliding_window"] = 512
    path = write_model(tmp_path / "m.gguf", arch, keys, tensors)
    command = [sys.executable, "-c", ALLOCATE, path, str(type_k), str(type_v)]
    log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    allocated = [(float(mib), int(cells), int(layers)) for mib, cells, layers in LINE.findall(log)]
    found = kv_cache(path, type_k, type_v)
    assert len(allocated) == len(found.groups) == (1 if arch == "llama" else 2), log
    assert [layers for _, _, layers in allocated] == ([12] if arch == "llama" else [2, 10])
    for (mib, cells, _), (size, window) in zip(allocated, found.groups, strict=True):
        assert mib == pytest.approx(size * cells / 1024**2, abs=0.006)
        # A window and one batch, in blocks of 256
        assert cells == (4096 if window is None else window + 512)


RECURRENT = re.compile(r"llama_memory_recurrent: size = +([\d.]+) MiB \( *(\d+) cells, +(\d+) layers")
SSM = {"ssm.conv_kernel": 4, "ssm.inner_size": 1024, "ssm.state_size": 128}


def layers_of(count: int, *shapes: dict[str, tuple[int, ...]], norm: str = "output_norm") -> dict[str, tuple[int, ...]]:
    """Return an embedding, the last norm, and tensors for each of `count` layers; the layers have `shapes` in turn."""
    tensors = {"token_embd.weight": (32, 512), f"{norm}.weight": (512,)}
    for layer in range(count):
        tensors |= {f"blk.{layer}.{name}": shape for name, shape in shapes[layer % len(shapes)].items()}
    return tensors


FEED_FORWARD = {"ffn_gate.weight": (64, 512), "ffn_up.weight": (64, 512), "ffn_down.weight": (512, 64)}
ATTENTION = {"attn_q.weight": (512, 512), "attn_k.weight": (256, 512), "attn_v.weight": (256, 512),
             "attn_output.weight": (512, 512), "attn_norm.weight": (512,)}  # fmt: skip
LATENT = {
    "attn_q_a.weight": (64, 512), "attn_q_a_norm.weight": (64,), "attn_q_b.weight": (4 * 192, 64),
    "attn_kv_a_mqa.weight": (576, 512), "attn_kv_a_norm.weight": (512,), "attn_k_b.weight": (4, 512, 128),
    "attn_v_b.weight": (4, 128, 512), "attn_output.weight": (512, 512), "attn_norm.weight": (512,),
    "ffn_norm.weight": (512,), **FEED_FORWARD,
}  # fmt: skip
MAMBA = {
    "attn_norm.weight": (512,), "ssm_in.weight": (2048, 512), "ssm_conv1d.weight": (1024, 4),
    "ssm_conv1d.bias": (1024,),
    "ssm_x.weight": (32 + 256, 1024), "ssm_dt.weight": (1024, 32), "ssm_dt.bias": (1024,), "ssm_a": (1024, 128),
    "ssm_d": (1024,), "ssm_out.weight": (512, 1024),
}  # fmt: skip
MAMBA_2 = {
    "ssm_in.weight": (2048 + 512 + 16, 512), "ssm_conv1d.weight": (1024 + 512, 4), "ssm_conv1d.bias": (1536,),
    "ssm_dt.bias": (16,), "ssm_a": (16, 1), "ssm_d": (16, 1), "ssm_norm.weight": (2, 512),
    "ssm_out.weight": (512, 1024), "ffn_norm": (512,), **ATTENTION, **FEED_FORWARD,
}  # fmt: skip
CONVOLUTION = {"shortconv.conv.weight": (512, 64), "shortconv.in_proj.weight": (1536, 512),
               "shortconv.out_proj.weight": (512, 512), "attn_norm.weight": (512,), "ffn_norm.weight": (512,),
               **FEED_FORWARD}  # fmt: skip
NORMED = {"attn_q_norm.weight": (128,), "attn_k_norm.weight": (128,), "ffn_norm.weight": (512,), **ATTENTION,
          **FEED_FORWARD}  # fmt: skip
HYBRID = layers_of(4, CONVOLUTION, NORMED, norm="token_embd_norm")
LATENT_KEYS = {
    "attention.head_count_kv": 1, "attention.q_lora_rank": 64, "attention.kv_lora_rank": 512,
    "attention.key_length": 576, "attention.value_length": 512, "attention.key_length_mla": 192,
    "attention.value_length_mla": 128, "rope.dimension_count": 64, "leading_dense_block_count": 4, "expert_count": 0,
    "expert_shared_count": 0, "expert_feed_forward_length": 64,
}  # fmt: skip
# Metadata beside that of `decoder`, and tensors
KEPT: dict[str, tuple[str, dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "a latent": ("deepseek2", LATENT_KEYS, layers_of(4, LATENT)),
    "states": ("mamba", {**SSM, "ssm.time_step_rank": 32, "attention.head_count": 0, "attention.head_count_kv": 0},
               layers_of(4, MAMBA)),
    "keys, values and states": ("falcon-h1", {**SSM, "ssm.time_step_rank": 16, "ssm.group_count": 2},
                                layers_of(4, MAMBA_2)),
    "states, or keys and values": ("lfm2", {"shortconv.l_cache": 64, "attention.head_count_kv": [0, 2, 0, 2]},
                                   HYBRID),
    "states, or a window": ("lfm2", {"shortconv.l_cache": 64, "attention.head_count_kv": [0, 2, 0, 2],
                                     "attention.sliding_window": 512}, HYBRID),
}  # fmt: skip


@pytest.mark.parametrize("kept", KEPT)
def test_latents_and_states_match_what_llama_cpp_allocates(tmp_path, kept):
    """Bytes per cell of the keys and values, and those of the states of one sequence, which llama.cpp's log names."""
    pytest.importorskip("llama_cpp")
    arch, more, tensors = KEPT[kept]
    path = write_model(tmp_path / "m.gguf", arch, decoder(4, PLAIN_NORMS)[0] | more, tensors)
    done = subprocess.run([sys.executable, "-c", ALLOCATE, path, "1", "1"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, [x for x in done.stderr.splitlines() if "error" in x]
    found = kv_cache(path, 1, 1)
    assert found.exact, found.note
    states = RECURRENT.findall(done.stderr)
    assert sum(float(mib) for mib, _, _ in states) == pytest.approx(found.state_bytes / 1024**2, abs=0.006)
    assert bool(states) == ("states" in kept)
    allocated = [(float(mib), int(cells)) for mib, cells, _ in LINE.findall(done.stderr) if float(mib)]
    assert len(allocated) == len(found.groups) == (0 if kept == "states" else 1), done.stderr
    for (mib, cells), (size, window) in zip(allocated, found.groups, strict=True):
        assert mib == pytest.approx(size * cells / 1024**2, abs=0.006)
        assert cells == (4096 if window is None else window + 512)
