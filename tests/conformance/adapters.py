"""Every adapter on one tiny model, and the harness' own `hf` in float32 on the same weights and tokenizer."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import random
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from tests.conftest import ROOT, VOCABULARY, make_llama, make_tokenizer
from tests.models.exllama.tiny_engine import TinyExLlama

ADAPTERS = ("hf_quant", "vllm_nvfp4", "llamacpp", "exllama")
LENGTH = 256  # the model's context, everywhere but in vLLM
# vLLM generates a token after every prompt and is fed the last token of a continuation, which others leave out: where
# `hf` takes max_length + 1 tokens of context and continuation, it takes max_model_len - 1.
VLLM_LENGTH = LENGTH + 2
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


# What the model writes after a digit. A token has one successor, so no two of these share a token.
SPEECHES = {
    "1": ["é", " of", "Q", ":", "X"],  # a stop sequence of two tokens
    "2": ["🌋", "!", "</s>", "$"],  # a character of four tokens; the end of the text
    "3": [b"\xff", "+", "*", "</s>"],  # a byte that no UTF-8 text has
    "4": ["=", "<s>", "#", "%", "</s>"],  # a special token that does not end a text
    "5": ["\n", "&", ";", "~", "@", "^", "`"],
}


def make_checkpoint(folder: Path, bos: bool = False, dtype: str = "float32") -> Path:
    """A random Llama with heads of 32 (vLLM's attention on a CPU takes no smaller ones) and a chat template.

    Every token has a successor that is much likelier than all others, so that engines which round differently write the
    same; `SPEECHES` are given, the others random. The random part is large enough for log-probabilities to differ.
    """
    make_llama(
        folder, dtype, hidden_size=128, max_position_embeddings=VLLM_LENGTH, initializer_range=0.08, bos_token_id=0,
        eos_token_id=1,
    )  # fmt: skip
    make_tokenizer(folder, bos=bos)
    _give_successors(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": TEMPLATE}))
    return folder


def _give_successors(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    chains = [[_ids(tokenizer, part) for part in [start, *speech]] for start, speech in SPEECHES.items()]
    given = {a: b for chain in chains for a, b in itertools.pairwise(itertools.chain.from_iterable(chain))}
    assert len(given) == sum(len(list(itertools.chain.from_iterable(c))) - 1 for c in chains), "a token twice"
    ascii_ = set(range(33, 127)) | {ord("Ġ")}  # so that nothing else writes characters in parts
    plain = [
        i for i in range(2, VOCABULARY) if i not in given.values() and {*map(ord, tokenizer.id_to_token(i))} <= ascii_
    ]
    others = [i for i in range(VOCABULARY) if i not in given]
    file = folder / "model.safetensors"
    tensors = load_file(file)
    rows = tensors["model.embed_tokens.weight"].float() * 4  # they outweigh what the layers add
    head = tensors["lm_head.weight"].float()
    successors = given | dict(zip(others, random.Random(0).choices(plain, k=len(others)), strict=True))
    for token, successor in successors.items():
        head[successor] += 1.2 * rows[token] / rows[token].norm()
    changed = {"model.embed_tokens.weight": rows, "lm_head.weight": head}
    changed |= {k: v.float() / 4 for k, v in tensors.items() if "o_proj" in k or "down_proj" in k}
    dtype = tensors["lm_head.weight"].dtype
    save_file(tensors | {k: v.to(dtype) for k, v in changed.items()}, file, metadata={"format": "pt"})


def _ids(tokenizer: Tokenizer, part: str | bytes) -> list[int]:
    if isinstance(part, bytes):  # ByteLevel shows a byte as a character
        return [tokenizer.token_to_id({b"\xff": "ÿ"}[part])]
    return list(tokenizer.encode(part, add_special_tokens=False).ids)


@dataclasses.dataclass
class Bench:
    """Checkpoint folders, and models on them; what is slow to load is loaded once."""

    root: Path
    loaded: dict[Any, Any] = dataclasses.field(default_factory=dict)

    def folder(self, bos: bool = False, dtype: str = "float32") -> Path:
        """The checkpoint: its weights are the same with either tokenizer."""
        return self._once((bos, dtype), lambda: make_checkpoint(self.root / f"tiny-{dtype}-bos{bos}", bos, dtype))

    def gguf(self, bos: bool = False, dtype: str = "float32") -> Path:
        def make() -> Path:
            file = self.root / f"tiny-{dtype}-bos{bos}.gguf"
            _to_gguf(self.folder(bos, dtype), file, {"float32": "F32", "bfloat16": "BF16"}[dtype])
            return file

        return self._once(("gguf", bos, dtype), make)

    def stock(self, bos: bool = False, dtype: str = "float32", **arguments: Any) -> Any:
        """The harness' `hf` in float32.

        Without its cache of logits: of requests with the same tokens but other borders between context and
        continuation, lm-eval 0.4.13 then scores the wrong ones.
        """
        arguments = {"max_length": LENGTH, "batch_size": 1, "logits_cache": False, **arguments}
        folder = str(self.folder(bos, dtype))
        key = ("hf", folder, *sorted(arguments.items()))
        return self._once(key, lambda: get_model("hf")(pretrained=folder, dtype="float32", device="cpu", **arguments))

    def model(self, name: str, bos: bool = False, dtype: str = "float32", **arguments: Any) -> Any:
        """A new adapter object."""
        folder = str(self.folder(bos, dtype))
        if name == "hf_quant":
            if arguments.get("batch_size") == "auto":
                arguments["max_batch_size"] = 4  # finding out how much fits takes long
            return get_model(name)(pretrained=folder, dtype=dtype, device="cpu", max_length=LENGTH, **arguments)
        if name == "exllama":
            return TinyExLlama(folder, max_length=LENGTH, **arguments)
        if name == "llamacpp":
            cache = "f32" if dtype == "float32" else "f16"
            return get_model(name)(
                pretrained=str(self.gguf(bos, dtype)),
                type_k=cache,
                type_v=cache,
                max_length=LENGTH,
                n_threads=1,
                n_threads_batch=1,
                **arguments,
            )
        engine = self._once(("vllm", dtype), lambda: self._vllm(str(self.folder(False, dtype)), dtype))
        with _engine_reused(engine):
            return get_model(name)(pretrained=folder, dtype=dtype, max_model_len=VLLM_LENGTH, **arguments)

    def _vllm(self, folder: str, dtype: str) -> Any:
        return get_model("vllm_nvfp4")(
            pretrained=folder, dtype=dtype, max_model_len=VLLM_LENGTH, max_num_seqs=8, kv_cache_memory_bytes=1 << 26
        )

    def first(self, key: Any, make: Any) -> Any:
        """What the first caller with this key made."""
        return self._once(("answers", key), make)

    def _once(self, key: Any, make: Any) -> Any:
        if key not in self.loaded:
            self.loaded[key] = make()
        return self.loaded[key]


def _to_gguf(folder: Path, file: Path, kind: str) -> None:
    """The demo's script, in this process: it imports what is imported here already."""
    script = ROOT / "demo" / "to_gguf.py"
    arguments = [str(script), str(folder), str(file), "--type", kind]
    with mock.patch.object(sys, "argv", arguments), mock.patch.object(sys, "path", [str(script.parent), *sys.path]):
        runpy.run_path(str(script), run_name="__main__")


@contextlib.contextmanager
def _engine_reused(loaded: Any) -> Iterator[None]:
    """A vLLM engine takes ten seconds to start: adapters made in here get the one of `loaded`."""
    with (
        mock.patch("lm_eval.models.vllm_causallms.LLM", return_value=loaded.model),
        mock.patch.object(type(loaded), "_engine_scoring", return_value=(loaded._engine, loaded._why_not_engine)),
    ):
        yield


def pairs(*arguments: tuple[str, str]) -> list[Instance]:
    """Requests for log-likelihoods: (context, continuation)."""
    return [Instance("loglikelihood", {}, a, i) for i, a in enumerate(arguments)]


def texts(*arguments: str) -> list[Instance]:
    """Requests for rolling log-likelihoods."""
    return [Instance("loglikelihood_rolling", {}, (a,), i) for i, a in enumerate(arguments)]


def prompts(*arguments: str, **kwargs: Any) -> list[Instance]:
    """Requests to generate, with the same arguments."""
    kwargs = {"until": ["\n\n"], "do_sample": False, "max_gen_toks": 12} | kwargs
    return [Instance("generate_until", {}, (a, dict(kwargs)), i) for i, a in enumerate(arguments)]
