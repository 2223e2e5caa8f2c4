"""The fork server: one import for several processes, and what happens where it cannot be used."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from compare.run.processes import fork_server
from compare.run.processes.fork_servers import ForkServers
from compare.run.processes.harness_process import HarnessProcess
from tests.compare.run.conftest import Workshop, wait_for_end
from tests.compare.run.forked_compare import HARNESS

STUB = "tests.compare.run.stub_lm_eval"


def logs(workshop: Workshop) -> list[str]:
    return [log.read_text() for log in sorted((workshop.results / "logs").iterdir())]


def test_three_models_are_forked_from_one_server(workshop: Workshop) -> None:
    assert workshop.run() == 0
    assert len(workshop.servers()) == 1
    for log in logs(workshop):
        command, printed, *rest = log.splitlines()
        assert command.startswith("$ ")
        assert " -m tests.compare.run.stub_lm_eval run --model vllm_nvfp4 " in command
        assert printed == "imports of the stub"  # in each log, as if each process had imported
        assert rest[-1].startswith("Scoring windows")


def test_processes_of_two_gpus_have_a_server_each(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an import reads from CUDA_VISIBLE_DEVICES is never another process's."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert workshop.run("--jobs", "2") == 0
    assert len(set(workshop.servers())) == 2
    assert {event["gpus"] for event in workshop.stub_events() if "gpus" in event} == {"3", "5"}


@pytest.mark.parametrize(
    ("late", "reason"),
    [
        ("no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        (f"{STUB}.late.threads", "imports have started threads"),
    ],
)
def test_unsafe_imports_are_not_kept(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, late: str, reason: str
) -> None:
    """Each process then imports for itself, and its log says why."""
    monkeypatch.setenv("STUB_LATE", late)
    assert workshop.run() == 0
    assert workshop.calls() == ["a", "b", "c"]
    for log in logs(workshop):
        assert log.splitlines()[1] == f"compare: nothing imported beforehand: {reason}"
        assert "imports of the stub" not in log


@pytest.mark.slow
def test_crash_while_importing_is_not_the_end(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUB_LATE", f"{STUB}.late.crash")
    assert workshop.run() == 0
    assert workshop.calls() == ["a", "b", "c"]


def test_open_driver_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file stands for /dev/nvidia-uvm, which a process holds open once it has initialized CUDA."""
    driver = tmp_path / "nvidia-uvm"
    driver.touch()
    monkeypatch.setattr(fork_server, "_DRIVERS", (str(driver),))
    monkeypatch.setenv("STUB_IMPORTS", str(tmp_path / "imports"))
    monkeypatch.setattr(fork_server.threading, "active_count", lambda: 1)  # pytest-xdist has threads
    assert fork_server._import_engine(STUB, "hf") == ("", False)
    with driver.open():
        assert fork_server._import_engine(STUB, "hf") == (f"imports have opened {driver}", False)


def test_engine_that_opens_the_driver_is_imported_by_each_process_alone(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The harness is imported once, by the server; the engine never by the server, and the first log says why."""
    driver = workshop.root / "nvidia-uvm"
    driver.touch()
    monkeypatch.setenv("STUB_DRIVER", str(driver))
    monkeypatch.setenv("STUB_LATE", f"{STUB}.late.driver")
    assert workshop.run() == 0
    assert workshop.calls() == ["a", "b", "c"]
    (server,) = workshop.servers()
    (first,) = workshop.root.joinpath("engine-imports").read_text().split()  # the stub harness imports no engine
    assert int(first) != server
    said = [
        f"compare: each model imports the engine itself: imports have opened {driver}" in log for log in logs(workshop)
    ]
    assert said == [True, False, False]


def test_engine_that_opens_no_driver_is_imported_by_the_server_too(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU is there, so the first process tries the engine, and the others are forked with it."""
    device = workshop.root / "nvidia-uvm"
    device.touch()
    monkeypatch.setenv("STUB_DRIVER", str(device))
    monkeypatch.setenv("STUB_LATE", f"{STUB}.late.counted")
    assert workshop.run() == 0
    assert workshop.calls() == ["a", "b", "c"]
    (server,) = workshop.servers()
    first, second = map(int, workshop.root.joinpath("engine-imports").read_text().split())
    assert first != server
    assert second == server
    assert not any("imports the engine itself" in log for log in logs(workshop))


def test_killed_server_ends_no_model(workshop: Workshop) -> None:
    """The running model is followed to its end, and the next ones start."""
    workshop.mark("a", "hang")
    process = workshop.start()
    pid, alive = workshop.wait_for_hanging_stub()
    (server,) = workshop.servers()
    os.kill(server, signal.SIGKILL)
    os.kill(pid, signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    wait_for_end(alive)
    assert process.returncode == 3
    assert "Model a: failed after" in out
    assert "(signal 15)" in out
    assert workshop.labels() == ["Model b", "Model c"]


@pytest.fixture
def servers() -> Iterator[ForkServers]:
    servers = ForkServers()
    yield servers
    servers.close()


def test_stop_while_importing_ends_at_once(
    workshop: Workshop, servers: ForkServers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process was asked for and never starts."""
    for name, value in workshop.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("STUB_LATE", f"{STUB}.late.endless")
    log = workshop.root / "log"
    process = HarnessProcess([*HARNESS, "run"], log, {}, servers.start("hf"))
    assert process.poll() is None
    servers.close(at_once=True)
    process.stop()
    assert process.poll() == 137
    assert len(log.read_text().splitlines()) == 1
