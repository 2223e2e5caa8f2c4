"""Explains a failed run from its log: the line with the reason, and a hint what to do."""

from __future__ import annotations

import re
from collections.abc import Sequence

from compare.text import clean

# The first match counts. Patterns are messages of the harness 0.4.13, PyTorch, vLLM, Transformers, llama.cpp and Linux.
_HINTS: tuple[tuple[str, str], ...] = (
    (r"No space left on device|Errno 28", "the disk is full: free space, or name another folder with --results"),
    (
        r"CUDA out of memory|OutOfMemoryError|CUBLAS_STATUS_ALLOC_FAILED|No available memory for the cache blocks"
        r"|larger than the available KV cache|less than desired GPU memory",
        "GPU memory is short: close other programs on the GPU, lower gpu_memory_utilization, max_model_len or "
        'batch_size ("args", "options" in the spec), or use fewer --jobs',
    ),
    (r"MemoryError|Cannot allocate memory|std::bad_alloc", "memory is short: use fewer --jobs, or a larger machine"),
    (
        r"is out of reach|couldn't connect|We couldn't|LocalEntryNotFoundError|OfflineModeIsEnabled"
        r"|Max retries exceeded|Name or service not known|Temporary failure in name resolution",
        'the hub cannot be reached: give a local folder as "model_dir", and the text as "text_path" in the data spec',
    ),
    (r"gated repo|401 Client Error|Access to model", "the model is gated: accept its terms and set HF_TOKEN"),
    (
        r"not a valid model identifier|is not a local folder|Repository Not Found|404 Client Error",
        "there is no such folder, nor a model of this name on the hub; paths count from the spec file",
    ),
    (
        r"Model '?[\w-]+'? not found|not found in registry|Attempted to load model|is not in the registry",
        "this harness has no such model: `lm_eval ls` lists tasks, the README our models; its engine may be missing",
    ),
    (r"Tasks? (were )?not found|No tasks? specified|TaskManager", "`lm_eval ls tasks` lists the tasks"),
    (r"No module named|needs? .* install", "install the engine's extra: pip install 'lmeval-ext[…]'"),
    (r"unexpected keyword argument", 'this model does not take one of the arguments in "args"'),
)

# By exit code, which is 128 + signal for a killed process.
_CODES: dict[int, str] = {
    137: "killed from outside (signal 9): most often by the system, out of memory; use fewer --jobs or a smaller model",
    143: "ended from outside (signal 15)",
    139: "crashed in the engine's own code (signal 11): try another version of the engine",
    134: "aborted in the engine's own code (signal 6): see its message in the log",
    127: "the harness' command was not found",
}
_EXCEPTION = re.compile(r"^(?:[\w.]+\.)?\w*(?:Error|Exception|Exit)\b(?:: .*)?$")
_OWN_ERROR = re.compile(r"^lmeval-ext: error: (.+)$")


def explain(code: int | None, lines: Sequence[str]) -> str | None:
    """A hint for a process that ended with exit code `code` and these log lines; None where none applies."""
    text = "\n".join(lines)
    for pattern, hint in _HINTS:
        if re.search(pattern, text):
            return hint
    return _CODES.get(code) if code is not None else None


def own_error(lines: Sequence[str]) -> str | None:
    """The error message of one of our adapters or tasks, which needs no hint; None where there is none."""
    return next((clean(match[1]) for line in reversed(lines) if (match := _OWN_ERROR.match(line))), None)


def reason(code: int | None, lines: Sequence[str]) -> str:
    """The reason of a failure in one line: the last exception in the log, if any, and the exit code."""
    raised = next((clean(line) for line in reversed(lines) if _EXCEPTION.match(line)), None)
    if code is None or code == 0:
        return raised or "ended without a result file"
    return f"{raised} (exit code {code})" if raised else f"exit code {code}"
