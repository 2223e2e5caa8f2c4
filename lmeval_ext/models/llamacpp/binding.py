"""llama.cpp's Python binding, and what llama.cpp says while it works.

llama.cpp has one log for the whole process. `captured` collects what it says while a model loads; at other times its
errors are printed, and everything with verbose=True.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from lmeval_ext.errors import MissingEngineError, first_line

try:
    import llama_cpp
except ImportError as error:
    raise MissingEngineError(
        f"llamacpp needs llama-cpp-python ({first_line(error)}); install it with pip install 'lmeval-ext[gguf]'"
    ) from error

ENGINE_VERSION = f"llama-cpp-python {llama_cpp.__version__}"

WARNING, ERROR, CONTINUED = 3, 4, 5  # ggml_log_level in ggml.h
# Warnings that say nothing about scores: memory, speed, and what every vocabulary has
_OF_NO_CONSEQUENCE = re.compile(
    r"using full-size SWA cache|sharing with layer|compute buffer|pipeline parallelism|mmap|madvise|fadvise|mlock"
    r"|munmap|not recommended|[Ff]alling back to buffered"
)
_FUNCTION = re.compile(r"^[A-Za-z_][\w:~]*:(?: +|$)")  # most lines begin with the name of the function that logs them
_DETAIL = re.compile(r"'[^']*'|\d+")


@dataclass
class LoadMessages:
    """Lines that llama.cpp logged, as (level, text)."""

    lines: list[tuple[int, str]] = field(default_factory=list)

    def add(self, level: int, text: str) -> None:
        """Takes one piece of the log; a line may come in several."""
        if level == CONTINUED and self.lines:
            last_level, last = self.lines[-1]
            self.lines[-1] = (last_level, last + text)
        else:
            self.lines.append((level, text))

    def errors(self) -> list[str]:
        """The lines of errors, without the names of functions."""
        return _texts(text for level, text in self.lines if level == ERROR)

    def warnings(self) -> list[str]:
        """Warnings and errors that may concern scores: one of each kind, with the number of others of that kind."""
        kinds: dict[str, list[str]] = {}
        for line in _texts(text for level, text in self.lines if level in (WARNING, ERROR)):
            if not _OF_NO_CONSEQUENCE.search(line):
                kinds.setdefault(_DETAIL.sub("*", line), []).append(line)
        return [same[0] + (f" (and {len(same) - 1} more like this)" if same[1:] else "") for same in kinds.values()]


def _texts(lines: Iterator[str]) -> list[str]:
    """Texts without the names of functions; decoration is left out."""
    texts = [_FUNCTION.sub("", line.strip()).strip() for line in lines]
    return [text for text in texts if re.search(r"\w", text)]


_messages: LoadMessages | None = None
_verbose = False
_printing = False  # whether the present line is printed, for pieces that continue it


@llama_cpp.llama_log_callback
def _receive(level: int, text: bytes, _user_data: Any) -> None:
    global _printing
    words = text.decode(errors="replace")
    if _messages is not None:
        _messages.add(level, words)
    if level != CONTINUED:
        _printing = _verbose or (level == ERROR and _messages is None)
    if _printing:
        print(words, end="", file=sys.stderr, flush=True)


@contextlib.contextmanager
def captured(verbose: bool) -> Iterator[LoadMessages]:
    """Collects what llama.cpp logs meanwhile. verbose: whether everything is printed too, now and later."""
    global _messages, _verbose
    llama_cpp.llama_log_set(_receive, None)
    _messages, _verbose = LoadMessages(), verbose
    try:
        yield _messages
    finally:
        _messages = None
