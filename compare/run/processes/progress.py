"""The progress of a harness process, read from the progress bars in its log."""

from __future__ import annotations

import re
from dataclasses import dataclass

from compare.text import clean

# tqdm's line: "Scoring windows (x):  35%|███▌  | 7/20 [00:12<00:22,  1.75s/window]"
BAR = re.compile(
    r"(?:^|\s)(?P<what>[^|\r\n]*?):?\s+\d+%[^|]*\|(?:[^|]*\|)?\s*(?P<done>\d+)/(?P<total>\d+) \[(?P<times>[^\],]+)"
)
_SCORING = re.compile(r"Scoring windows|Processed prompts|Running \w+ requests", re.IGNORECASE)


@dataclass(frozen=True)
class Progress:
    """The state of a log's last progress bar.

    what: its description. elapsed: seconds. scoring: it counts windows or requests; else it belongs to loading.
    """

    what: str
    done: int
    total: int
    elapsed: float
    scoring: bool

    def words(self, eval_len: int | None) -> str:
        """``"window 7 of 20, 1,234 tokens/s, 22 s to go"``; eval_len: tokens per window."""
        if not self.scoring:
            return f"{clean(self.what) or 'loading'} {self.done}/{self.total}"
        words = [f"window {self.done} of {self.total}"]
        if eval_len and self.elapsed and self.done:
            words.append(f"{self.done * eval_len / self.elapsed:,.0f} tokens/s")
        if self.remaining is not None:
            words.append(f"{duration(self.remaining)} to go")
        return ", ".join(words)

    @property
    def remaining(self) -> float | None:
        """Seconds to go at the average speed so far; None at the start."""
        return self.elapsed * (self.total - self.done) / self.done if self.done and self.elapsed else None


def parse_progress(text: str) -> Progress | None:
    """The last progress bar in a piece of log; a scoring bar takes precedence over later bars of other steps."""
    bars = [
        Progress(
            what=match["what"].strip(),
            done=int(match["done"]),
            total=int(match["total"]),
            elapsed=_seconds(match["times"].partition("<")[0]),
            scoring=bool(_SCORING.search(match["what"])),
        )
        for line in re.split(r"[\r\n]", text)
        if (match := BAR.search(line))
    ]
    return next((bar for bar in reversed(bars) if bar.scoring), bars[-1] if bars else None)


def _seconds(clock: str) -> float:
    """``"1:02:03"`` in seconds; parts that are not numbers count 0."""
    total = 0.0
    for part in clock.strip().split(":"):
        total = total * 60 + (float(part) if part.replace(".", "", 1).isdigit() else 0)
    return total


def duration(seconds: float) -> str:
    """Seconds as text: ``"22 s"``, ``"14 min"``, ``"2.5 h"``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} h"
