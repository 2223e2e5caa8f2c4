"""Makes a trace file in a process of its own: ``python -m lmeval_ext.answers``, started as a harness process is."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from compare.console import say
from compare.errors import NOTHING_USABLE, CompareError, os_reason
from compare.run.processes.failure_hints import explain, own_error, reason
from compare.run.processes.harness_process import HarnessProcess, last_lines

_COMMAND = (sys.executable, "-m", "lmeval_ext.answers")
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class TracesRequest:
    """What one ``compare traces`` was asked to do.

    model, model_args, device: as `lm_eval` takes them. prompts: a file, None for the package's own. max_tokens: of an
    answer. chat_template: apply the model's, if it has one.
    """

    model: str
    model_args: str
    output: Path
    device: str | None = None
    prompts: Path | None = None
    max_tokens: int = 512
    temperature: float = 0.0
    seed: int = 1234
    chat_template: bool = True

    @property
    def words(self) -> list[str]:
        """The command that answers the prompts."""
        options = {
            "model": self.model,
            "model_args": self.model_args,
            "device": self.device,
            "output": self.output,
            "prompts": self.prompts,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
        }
        words = [f"--{name}={value}" for name, value in options.items() if value is not None]
        return [*_COMMAND, *words, *([] if self.chat_template else ["--no_chat_template"])]


def make_traces(request: TracesRequest) -> int:
    """Make the trace file and return the exit code. Raises CompareError if it cannot be written or the model fails.

    The log stands beside the file until the file is written.
    """
    output = request.output
    if output.is_dir() or not output.parent.is_dir():
        raise CompareError(
            f"-o {output}: {'is a folder' if output.is_dir() else 'its folder is not there'}; name a file"
        )
    log = output.with_name(f"{output.name}.log")
    try:
        process = HarnessProcess(request.words, log, {})
    except OSError as error:
        raise CompareError(f"-o {output}: cannot be written ({os_reason(error)}); name another place") from error
    say(f"answering prompts; progress is in {log}")
    try:
        while (code := process.poll()) is None:
            time.sleep(_POLL_SECONDS)
    except BaseException:
        process.stop()
        raise
    if code:
        lines = last_lines(log)
        message, hint = own_error(lines), explain(code, lines)
        why = message or "; ".join(part for part in (reason(code, lines), hint) if part)
        raise CompareError(f"{request.model}: {why} (log: {log})", NOTHING_USABLE)
    log.unlink(missing_ok=True)
    answers = [len(row["response_ids"]) for row in json.loads(output.read_text(encoding="utf-8"))["rows"]]
    print(f"{output}: {len(answers)} answers, {sum(answers):,} tokens")
    return 0
