"""Lets a model answer prompts, and writes the answers' token ids: ``python -m lmeval_ext.answers``.

`compare traces` starts this in a process of its own. Any model of the harness that returns token ids will do; the
unquantized original is meant. The format of the file is that of `lmeval_ext.traces`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmeval_ext import _hook
from lmeval_ext.errors import UserError, first_line, install_excepthook
from lmeval_ext.files import write_atomically
from lmeval_ext.requests import AnswerSettings, answer_request
from lmeval_ext.tokens import PROBE, tokenizer_sha256
from lmeval_ext.traces import trace_bytes

PROMPTS = Path(__file__).with_name("prompts.json")


@dataclass(frozen=True)
class TracePrompt:
    """A question as a user would ask it. kind: what it is about, e.g. "code"."""

    name: str
    kind: str
    text: str


def read_prompts(path: str | Path = PROMPTS) -> list[TracePrompt]:
    """Read a JSON list of texts, or of objects with `prompt`, and perhaps `name` and `kind`. Raises UserError."""
    try:
        rows = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"prompts={str(path)!r} cannot be read as JSON ({first_line(error)}); give a list") from error
    prompts = []
    for number, row in enumerate(rows if isinstance(rows, list) else []):
        fields = {"prompt": row} if isinstance(row, str) else row if isinstance(row, dict) else {}
        text = fields.get("prompt")
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"prompts={str(path)!r}, entry {number}: expected a text, or an object with `prompt`")
        prompts.append(TracePrompt(str(fields.get("name") or number), str(fields.get("kind") or ""), text))
    if not prompts:
        raise UserError(f"prompts={str(path)!r}: expected a JSON list of prompts")
    return prompts


def answer(model: Any, prompts: Sequence[TracePrompt], settings: AnswerSettings, use_template: bool = True) -> bytes:
    """The content of the trace file of this model's answers.

    model: a harness model that returns token ids. settings: `max_new` is lowered where the context ends before.
    use_template: put each prompt into the model's chat template, if it has one. Raises UserError if a prompt does not
    fit the model.
    """
    template = _chat_template(model) if use_template else None
    limit = int(getattr(model, "window_limit", model.max_length))
    requests = []
    for number, prompt in enumerate(prompts):
        text = prompt.text
        if template:
            text = model.apply_chat_template([{"role": "user", "content": prompt.text}])
        ids = [int(i) for i in model.tok_encode(text)]
        room = limit - len(ids)
        if not ids or room < 1:
            raise UserError(
                f"prompt {prompt.name!r} has {len(ids)} tokens, which leave no room for an answer in this model's "
                f"context of {limit}; leave it out, or raise max_length"
            )
        own = settings._replace(max_new=min(settings.max_new, room))
        requests.append(answer_request(prompt.name, ids, own, {}, ("traces", number, 1)))
    answers = model.generate_token_ids(requests)
    rows = [
        {
            "name": prompt.name,
            "kind": prompt.kind,
            "prompt": prompt.text,
            "prompt_ids": request.prompt_ids,
            "response_ids": ids,
            "response": model.tok_decode(ids),
        }
        for prompt, request, ids in zip(prompts, requests, answers, strict=True)
    ]
    probe = [int(i) for i in model.tok_encode(PROBE, add_special_tokens=False)]
    header = {
        "model": _facts(model),
        "tokenizer": {"name": str(model.tokenizer_name), "sha256": tokenizer_sha256(probe)},
        "chat_template": hashlib.sha256(template.encode()).hexdigest() if template else None,
        "generation": {
            "max_tokens": settings.max_new,
            "temperature": settings.temperature,
            "seed": settings.seed if settings.temperature else None,
        },
    }
    return trace_bytes(header, rows)


def _chat_template(model: Any) -> str | None:
    """The model's chat template as text; None if it has none."""
    own = getattr(getattr(model, "tokenizer", None), "chat_template", None)
    return (own if isinstance(own, str) else None) or model.chat_template(True) or None


def _facts(model: Any) -> dict[str, Any]:
    from lmeval_ext.divergence.weights import weights_sha256

    facts, path = model.describe(), model.checkpoint()
    names = ("label", "engine", "engine_version", "dtype", "device", "kernel")
    arguments = getattr(getattr(model, "reference_arguments", None), "others", {})
    return {
        **{name: getattr(facts, name) for name in names},
        "checkpoint": path,
        "weights_sha256": weights_sha256(path),
        "arguments": arguments,
    }


def _load(name: str, arguments: str, device: str | None) -> Any:
    """The harness model of this name. Raises UserError if it is unknown or does not return token ids."""
    _hook.install()
    import lm_eval.models  # noqa: F401 (registers the models)
    from lm_eval.api.registry import get_model
    from lm_eval.utils import simple_parse_args_string

    from lmeval_ext.models.adapter import Adapter

    given = json.loads(arguments) if arguments.lstrip().startswith("{") else simple_parse_args_string(arguments)
    try:
        kind = get_model(name)
    except (KeyError, ValueError) as error:
        raise UserError(f"--model {name}: the harness knows no such model") from error
    if not issubclass(kind, Adapter):
        raise UserError(
            f"--model {name} returns text, not the token ids that it generated; use vllm_nvfp4, hf_quant, llamacpp, "
            "exllamav3 or exllamav2"
        )
    return kind.create_from_arg_obj(given, {"device": device})


def main(argv: Sequence[str] | None = None) -> int:
    """Answer the prompts and write the file. UserErrors end the process with code 1 and one line."""
    install_excepthook()
    parser = argparse.ArgumentParser(prog="python -m lmeval_ext.answers", allow_abbrev=False)
    parser.add_argument("--model", required=True)
    parser.add_argument("--model_args", default="")
    parser.add_argument("--device")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--prompts", type=Path, default=PROMPTS)
    parser.add_argument("--max_tokens", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--no_chat_template", action="store_true")
    options = parser.parse_args(argv)
    prompts = read_prompts(options.prompts)
    settings = AnswerSettings(options.max_tokens, temperature=options.temperature, seed=options.seed)
    model = _load(options.model, options.model_args, options.device)
    write_atomically(options.output, answer(model, prompts, settings, not options.no_chat_template))
    return 0


if __name__ == "__main__":
    sys.exit(main())
