"""What survives kill -9 of the child and of the parent, Ctrl-C, SIGTERM and a full disk. Signals and disks are real."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.compare.run.conftest import Workshop, usual_signals


def _hanging(workshop: Workshop) -> tuple[int, int]:
    """Wait for the hanging stub: (its pid, a descriptor that ends with the stub)."""
    alive = os.open(workshop.fifo, os.O_RDONLY)
    pid = b""
    while not pid.endswith(b"\n"):
        pid += os.read(alive, 1)
    return int(pid), alive


def _ended(alive: int) -> None:
    """Return once no process holds the other end."""
    assert os.read(alive, 1) == b""
    os.close(alive)


def _parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[1])


def _goes_on(workshop: Workshop, runs: list[str]) -> None:
    """The same command again does what is missing, and nothing else."""
    (workshop.root / "models/b/hang").unlink()
    workshop.calls()
    assert workshop.run() == 0
    assert workshop.calls() == runs
    assert workshop.labels() == ["Model a", "Model b", "Model c"]
    assert not list((workshop.results / ".work").iterdir())


def test_child_killed(workshop: Workshop) -> None:
    workshop.mark("b", "hang")
    process = workshop.start()
    pid, alive = _hanging(workshop)
    os.kill(pid, signal.SIGKILL)
    out, _ = process.communicate(timeout=60)
    _ended(alive)
    assert process.returncode == 3
    assert "Model b: failed after" in out
    assert "exit code 137" in out
    assert "hint: killed from outside (signal 9)" in out
    assert "Model c: 6.00 bpw" in out
    _goes_on(workshop, ["b"])


def test_keeper_of_the_child_killed(workshop: Workshop) -> None:
    """The process between the two: the engine must not go on without it."""
    workshop.mark("b", "hang")
    process = workshop.start()
    pid, alive = _hanging(workshop)
    keeper = _parent_of(pid)
    assert keeper != process.pid
    os.kill(keeper, signal.SIGKILL)
    out, _ = process.communicate(timeout=60)
    _ended(alive)
    assert "Model b: failed after" in out
    _goes_on(workshop, ["b"])


def test_keeper_killed_with_nobody_to_see_it(workshop: Workshop) -> None:
    workshop.mark("b", "hang")
    process = workshop.start()
    pid, alive = _hanging(workshop)
    process.send_signal(signal.SIGSTOP)
    os.kill(_parent_of(pid), signal.SIGKILL)
    _ended(alive)
    process.send_signal(signal.SIGCONT)
    process.communicate(timeout=60)
    _goes_on(workshop, ["b"])


def test_parent_killed(workshop: Workshop) -> None:
    workshop.mark("b", "hang")
    process = workshop.start()
    _, alive = _hanging(workshop)
    process.kill()
    process.communicate(timeout=60)
    _ended(alive)  # the engine ends with its parent
    assert workshop.labels() == ["Model a"]
    assert list((workshop.results / ".work").iterdir())  # left behind, swept by the next run
    _goes_on(workshop, ["b", "c"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted(workshop: Workshop, number: signal.Signals) -> None:
    workshop.mark("b", "hang")
    process = workshop.start()
    _, alive = _hanging(workshop)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    _ended(alive)
    assert process.returncode == 130
    assert err == "compare: stopped: 1 of 3 done and kept; the same command goes on from here\n"
    assert not list((workshop.results / ".work").iterdir())
    _goes_on(workshop, ["b", "c"])


def test_interrupted_at_a_terminal(workshop: Workshop) -> None:
    """The live display, and Ctrl-C typed: the terminal is left in order."""
    workshop.mark("b", "hang")
    master, slave = pty.openpty()
    # a session of its own whose terminal this is, so that the typed ^C reaches it as a signal
    process = workshop.start(stdin=slave, stdout=slave, stderr=slave, start_new_session=True, preexec_fn=_own_terminal)
    os.close(slave)
    _, alive = _hanging(workshop)
    shown = b""
    while b"window 5 of 20, 5,120 tokens/s, 6 s to go" not in shown:  # the stub's bar: 5 windows in 2 s
        shown += os.read(master, 4096)
    os.write(master, b"\x03")
    shown += b"".join(_rest(master))
    assert process.wait(60) == 130
    _ended(alive)
    text = shown.decode()
    assert "Model a: 4.00 bpw (decoder), 16.00 bpw (head), perplexity 7.500000" in text
    assert "1 of 3 done, 1 waiting (Model c)" in text
    assert "stopped: 1 of 3 done and kept" in text
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l")  # the cursor is back


def _own_terminal() -> None:
    import fcntl
    import termios

    usual_signals()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _rest(master: int) -> Iterator[bytes]:
    try:
        while data := os.read(master, 4096):
            yield data
    except OSError:  # Linux says EIO when the other end is closed
        return


def test_log_that_cannot_be_written(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    """/dev/full: the kernel's own "No space left on device"."""
    workshop.run()
    log = next((workshop.results / "logs").glob("Model-b-*.log"))
    log.unlink()
    log.symlink_to("/dev/full")
    workshop.calls()
    assert workshop.run("-cc") == 3
    assert workshop.calls() == ["a", "c"]
    out = capsys.readouterr().out
    assert "No space left on device" in out
    assert "hint: the disk is full" in out


def test_full_disk(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    """One model's output fills the disk; it is cleared away, and the next model has room."""
    workshop.results.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "compare", str(workshop.results)]
    if subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a small tmpfs: run as root")
    try:
        workshop.mark("b", "fill")
        assert workshop.run() == 3
        out = capsys.readouterr().out
        assert "Model b: failed after 0 s: OSError: [Errno 28] No space left on device (exit code 1)" in out
        assert "hint: the disk is full" in out
        assert workshop.labels() == ["Model a", "Model c"]
        # no room for anything at all: what is finished is still read and shown
        _fill(workshop.results / "ballast")
        assert workshop.run() == 3
        assert capsys.readouterr().out.count("(kept)") == 2
    finally:
        subprocess.run(["umount", "-l", str(workshop.results)], check=True)


def _fill(file: Path) -> None:
    with contextlib.suppress(OSError), file.open("wb", buffering=0) as stream:
        while True:
            stream.write(bytes(4096))


def test_results_folder_that_cannot_be_written(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    workshop.results.write_text("a file")
    assert workshop.run() == 1
    assert "--results" in capsys.readouterr().err
    assert workshop.calls() == []


def test_work_of_other_machines_is_left_alone(workshop: Workshop) -> None:
    """A results folder that several machines share: a process number says nothing about another machine."""
    dead = subprocess.Popen(["true"])
    dead.wait()
    theirs = workshop.results / f".work/0123-elsewhere-{dead.pid}"
    theirs.mkdir(parents=True)
    assert workshop.run() == 0
    assert theirs.exists()


def test_half_a_result_is_run_again(workshop: Workshop) -> None:
    workshop.run()
    file = next(workshop.results.glob("*/results_*.json"))
    file.write_bytes(file.read_bytes()[:50])
    workshop.calls()
    assert workshop.run() == 0
    assert len(workshop.calls()) == 1
    assert workshop.labels() == ["Model a", "Model b", "Model c"]


def test_two_at_a_time(workshop: Workshop) -> None:
    """With --jobs 2 two engines run at once, and one signal ends both."""
    workshop.mark("a", "hang")
    workshop.mark("b", "hang")
    process = workshop.start("--jobs", "2")
    first, alive = _hanging(workshop)
    second = b""
    while not second.endswith(b"\n"):  # both hold the pipe: neither has ended when the other writes
        second += os.read(alive, 1)
    assert first != int(second)
    process.terminate()
    process.communicate(timeout=60)
    _ended(alive)
    assert sorted(workshop.calls()) == ["a", "b"]
