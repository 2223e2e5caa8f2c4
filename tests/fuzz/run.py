"""Fuzzes our own readers: ``python tests/fuzz/run.py [READER …] [--cases 100000] [--seed 1] [--engine atheris]``.

Each case is a sound file with damage; a reader may read it, or refuse it in one line that names the file. Anything else
is a failure: another exception, more than `--seconds` of processor time, or more than `--megabytes` above the start
(the process' own limit, so a MemoryError). The files of a failure are kept under `--keep` with its traceback; the same
seed and case number make them again. `--engine atheris` lets libFuzzer choose the random bytes by the code they reach
(`pip install atheris`); it stops at the first failure.
"""

from __future__ import annotations

import argparse
import resource
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from random import Random
from types import FrameType

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.fuzz.readers import READERS, Reader

_WARM_UP = 50  # cases before memory is measured: modules are imported, caches filled
_SHOWN = 10
_HANGS = 60.0  # seconds


class TooSlow(BaseException):
    """Not an Exception, so that a reader that catches everything does not swallow it."""


class Hangs(TooSlow):
    """Too slow by the clock, whatever the reader waits for."""


def _too_slow(number: int, _frame: FrameType | None) -> None:
    raise Hangs if number == signal.SIGALRM else TooSlow


def _limit(seconds: float) -> None:
    """Limits the processor time of one case (a busy machine must not fail it) and the wall time; 0: no limit."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, _HANGS if seconds else 0)


def _status(field: str) -> int:
    """Returns a size of this process from /proc/self/status, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def fuzz(reader: Reader, options: argparse.Namespace) -> int:
    """Runs all cases of one reader and returns the number of failures."""
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, _too_slow)
    kinds: dict[str, int] = {}
    slowest, started, before = (0.0, -1), time.monotonic(), 0
    with tempfile.TemporaryDirectory(dir=options.tmp) as name:
        folder = Path(name)
        for case in range(options.first, options.first + options.cases):
            if case == options.first + _WARM_UP:
                before = _status("VmHWM")
                limit = _status("VmSize") + options.megabytes * 2**20
                resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
            files = reader.prepare(folder, Random(f"{options.seed}/{reader.name}/{case}"))
            at = time.process_time()
            try:
                _limit(options.seconds if case >= options.first + _WARM_UP else _HANGS)
                reader.read(folder)
                _limit(0)
            except (Exception, TooSlow) as error:
                _limit(0)
                where = [at for at in traceback.extract_tb(error.__traceback__) if at.filename != __file__][-1]
                kind = f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}"
                kinds[kind] = kinds.get(kind, 0) + 1
                if kinds[kind] == 1:
                    _keep(options.keep, f"{reader.name}-{options.seed}-{case}", files, error)
            took = time.process_time() - at
            if case >= options.first + _WARM_UP:
                slowest = max(slowest, (took, case))
    seconds = time.monotonic() - started
    grown = (_status("VmHWM") - before) / 2**20
    print(
        f"{reader.name}: {options.cases:,} cases in {seconds:.0f} s, slowest {slowest[0] * 1000:.0f} ms (case "
        f"{slowest[1]}), peak memory {_status('VmHWM') / 2**20:.0f} MiB (+{grown:.0f}), {sum(kinds.values())} failures"
    )
    for kind, count in sorted(kinds.items(), key=lambda item: -item[1])[:_SHOWN]:
        print(f"  {count} × {kind}")
    sys.stdout.flush()
    return sum(kinds.values())


def _keep(keep: Path | None, case: str, files: dict[str, bytes], error: BaseException) -> None:
    if keep is None:
        return
    folder = keep / case
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / "traceback.txt").write_text("".join(traceback.format_exception(error)), errors="backslashreplace")


def by_atheris(reader: Reader, options: argparse.Namespace) -> None:
    """Runs libFuzzer's loop, with its own limits. Does not return."""
    import atheris

    class Bytes(Random):
        """Random numbers from the fuzzer's bytes; zeros after their end."""

        def __init__(self, data: bytes) -> None:
            super().__init__(0)
            self._data = atheris.FuzzedDataProvider(data)

        def random(self) -> float:
            return self._data.ConsumeIntInRange(0, 2**24 - 1) / 2**24

        def getrandbits(self, k: int) -> int:
            return self._data.ConsumeIntInRange(0, 2**k - 1)

        def randrange(self, start: int, stop: int | None = None, step: int = 1) -> int:
            low, high = (0, start) if stop is None else (start, stop)
            return self._data.ConsumeIntInRange(low, high - 1)

        def choice(self, seq):  # type: ignore[no-untyped-def]
            return seq[self.randrange(len(seq))]

    with tempfile.TemporaryDirectory(dir=options.tmp) as name:
        folder = Path(name)
        with atheris.instrument_imports(include=["compare", "lmeval_ext"]):
            for warm in range(3):
                reader.prepare(folder, Random(warm))
                reader.read(folder)
        arguments = [f"-runs={options.cases}", f"-timeout={max(1, round(options.seconds))}",
                     f"-rss_limit_mb={_status('VmRSS') // 2**20 + options.megabytes}", "-max_len=512", "-len_control=0",
                     f"-seed={options.seed}", "-print_final_stats=1"]  # fmt: skip

        def one(data: bytes) -> None:
            reader.prepare(folder, Bytes(data))
            reader.read(folder)

        atheris.Setup([sys.argv[0], *arguments], one)
        atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("readers", nargs="*", metavar="READER", help=f"of {', '.join(READERS)} (default: all)")
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0, help="processor time per case")
    parser.add_argument("--megabytes", type=int, default=512, help="limit of address space beyond the start's")
    parser.add_argument("--keep", type=Path, help="folder for the files of failures")
    parser.add_argument("--tmp", help="folder for the files under test (a memory disk is faster)")
    parser.add_argument("--engine", choices=("own", "atheris"), default="own")
    options = parser.parse_args()
    if options.engine == "atheris":
        by_atheris(READERS[options.readers[0]], options)
    import os

    failures = 0
    for name in options.readers or READERS:
        pid = os.fork()  # one process per reader, with its own peak and limits
        if pid == 0:
            os._exit(min(fuzz(READERS[name], options), 100))
        failures += os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
