"""Results survive kill -9 of child and parent, Ctrl-C, SIGTERM and a full disk. Signals and disks are real."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.compare.run.conftest import Workshop, default_signals, parent_of, read_pid, wait_for_end, whole_seconds

pytestmark = pytest.mark.slow


@pytest.fixture(params=["command", "forked"])
def workshop(tmp_path: Path, request: pytest.FixtureRequest) -> Workshop:
    return Workshop(tmp_path, forked=request.param == "forked")


def _assert_continues(workshop: Workshop, runs: list[str]) -> None:
    """The same command again runs the models in `runs`, and nothing else."""
    (workshop.root / "models/b/hang").unlink()
    workshop.calls()
    assert workshop.run() == 0
    assert workshop.calls() == runs
    assert workshop.labels() == ["Model a", "Model b", "Model c"]
    assert not list((workshop.results / ".work").iterdir())


def test_killed_engine_fails_and_the_others_run(workshop: Workshop) -> None:
    workshop.mark("b", "hang")
    process = workshop.start()
    pid, alive = workshop.wait_for_hanging_stub()
    os.kill(pid, signal.SIGKILL)
    out, _ = process.communicate(timeout=60)
    wait_for_end(alive)
    assert process.returncode == 3
    assert "Model b: failed after" in out
    assert "exit code 137" in out
    assert "hint: killed from outside (signal 9)" in out
    assert "Model c: 6.00 bpw" in out
    _assert_continues(workshop, ["b"])


def test_killed_supervisor_ends_its_engine(workshop: Workshop) -> None:
    """The supervisor is the process between the command and the engine."""
    workshop.mark("b", "hang")
    process = workshop.start()
    pid, alive = workshop.wait_for_hanging_stub()
    supervisor = parent_of(pid)
    assert supervisor != process.pid
    os.kill(supervisor, signal.SIGKILL)
    out, _ = process.communicate(timeout=60)
    wait_for_end(alive)
    assert "Model b: failed after" in out
    _assert_continues(workshop, ["b"])


def test_killed_supervisor_ends_its_engine_while_the_parent_is_stopped(workshop: Workshop) -> None:
    workshop.mark("b", "hang")
    process = workshop.start()
    pid, alive = workshop.wait_for_hanging_stub()
    process.send_signal(signal.SIGSTOP)
    os.kill(parent_of(pid), signal.SIGKILL)
    wait_for_end(alive)
    process.send_signal(signal.SIGCONT)
    process.communicate(timeout=60)
    _assert_continues(workshop, ["b"])


def test_killed_parent_ends_the_engine_and_keeps_finished_results(workshop: Workshop) -> None:
    workshop.mark("b", "hang")
    process = workshop.start()
    _, alive = workshop.wait_for_hanging_stub()
    process.kill()
    process.communicate(timeout=60)
    wait_for_end(alive)  # the engine ends with its parent
    assert workshop.labels() == ["Model a"]
    assert list((workshop.results / ".work").iterdir())  # left behind, and removed by the next run
    _assert_continues(workshop, ["b", "c"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_ends_the_run_and_keeps_finished_results(workshop: Workshop, number: signal.Signals) -> None:
    workshop.mark("b", "hang")
    process = workshop.start()
    _, alive = workshop.wait_for_hanging_stub()
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    wait_for_end(alive)
    assert process.returncode == 130
    assert err == "compare: stopped: 1 of 3 done and kept; the same command goes on from here\n"
    assert not list((workshop.results / ".work").iterdir())
    _assert_continues(workshop, ["b", "c"])


def test_ctrl_c_at_a_terminal_restores_the_terminal(workshop: Workshop) -> None:
    """With the live display, and Ctrl-C typed: the cursor is visible again afterwards."""
    workshop.mark("b", "hang")
    master, slave = pty.openpty()
    # its own session with this terminal, so that the typed ^C reaches it as a signal
    process = workshop.start_command(
        stdin=slave, stdout=slave, stderr=slave, start_new_session=True, preexec_fn=_own_terminal
    )
    os.close(slave)
    _, alive = workshop.wait_for_hanging_stub()
    shown = b""
    while b"window 5 of 20, 5,120 tokens/s, 6 s to go" not in shown:  # the stub's bar: 5 windows in 2 s
        shown += os.read(master, 4096)
    os.write(master, b"\x03")
    shown += b"".join(_read_to_end(master))
    assert process.wait(60) == 130
    wait_for_end(alive)
    text = shown.decode()
    assert "Model a: 4.00 bpw (decoder), 16.00 bpw (head), perplexity 7.500000" in text
    assert "1 of 3 done, 1 waiting (Model c)" in text
    assert "stopped: 1 of 3 done and kept" in text
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l")  # the cursor is back


def _own_terminal() -> None:
    import fcntl
    import termios

    default_signals()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _read_to_end(master: int) -> Iterator[bytes]:
    try:
        while data := os.read(master, 4096):
            yield data
    except OSError:  # Linux raises EIO when the other end is closed
        return


def test_children_that_an_engine_leaves_behind_are_ended(workshop: Workshop) -> None:
    workshop.mark("b", "leave")
    process = workshop.start()
    alive = os.open(workshop.fifo, os.O_RDONLY)  # returns when the child has opened it
    process.communicate(timeout=60)
    wait_for_end(alive)
    assert process.returncode == 0
    assert workshop.labels() == ["Model a", "Model b", "Model c"]


def test_unwritable_log_fails_that_model_only(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_full_disk_fails_that_model_and_frees_the_space(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    """One model's output fills the disk; it is removed, and the next model has room."""
    workshop.results.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "compare", str(workshop.results)]
    if subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a small tmpfs: run as root")
    try:
        workshop.mark("b", "fill")
        assert workshop.run() == 3
        out = capsys.readouterr().out
        reason = "OSError: [Errno 28] No space left on device (exit code 1)"
        assert f"Model b: failed after 0 s: {reason}" in whole_seconds(out)
        assert "hint: the disk is full" in out
        assert workshop.labels() == ["Model a", "Model c"]
        # no free space at all: finished results are still read and shown
        _fill(workshop.results / "ballast")
        assert workshop.run() == 3
        assert capsys.readouterr().out.count("(kept)") == 2
        workshop.entries[0]["label"] = "Renamed"
        workshop.write()
        assert workshop.run() == 1  # the index of labels cannot be written
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert f"--results {workshop.results}: cannot be written (" in err
        assert "No space left on device); free space, or name another folder" in err
        assert workshop.labels() == ["Model a", "Model c"]
    finally:
        subprocess.run(["umount", "-l", str(workshop.results)], check=True)


def _fill(file: Path) -> None:
    with contextlib.suppress(OSError), file.open("wb", buffering=0) as stream:
        while True:
            stream.write(bytes(4096))


def test_unwritable_results_folder_is_refused_before_any_run(
    workshop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    workshop.results.write_text("a file")
    assert workshop.run() == 1
    assert "--results" in capsys.readouterr().err
    assert workshop.calls() == []


def test_work_folders_of_other_machines_are_kept(workshop: Workshop) -> None:
    """Several machines may share a results folder: a pid tells nothing about processes of another machine."""
    dead = subprocess.Popen(["true"])
    dead.wait()
    theirs = workshop.results / f".work/0123-elsewhere-{dead.pid}"
    theirs.mkdir(parents=True)
    assert workshop.run() == 0
    assert theirs.exists()


def test_truncated_result_is_run_again(workshop: Workshop) -> None:
    workshop.run()
    file = next(workshop.results.glob("*/results_*.json"))
    file.write_bytes(file.read_bytes()[:50])
    workshop.calls()
    assert workshop.run() == 0
    assert len(workshop.calls()) == 1
    assert workshop.labels() == ["Model a", "Model b", "Model c"]


def test_one_signal_ends_both_of_two_jobs(workshop: Workshop) -> None:
    """With --jobs 2 two engines run at once, and one signal ends both."""
    workshop.mark("a", "hang")
    workshop.mark("b", "hang")
    process = workshop.start("--jobs", "2")
    first, alive = workshop.wait_for_hanging_stub()
    second = read_pid(alive)  # both hold the pipe: neither has ended when the other writes
    assert first != second
    process.terminate()
    process.communicate(timeout=60)
    wait_for_end(alive)
    assert sorted(workshop.calls()) == ["a", "b"]
