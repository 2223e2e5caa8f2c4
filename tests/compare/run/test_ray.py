"""`--launcher ray` on a local cluster of several CPU nodes, one of them killed midway."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from compare.errors import CompareError
from compare.run.plan.job import Job
from compare.run.plan.job_settings import GIB
from compare.run.processes import ray_pool
from compare.run.processes.ray_pool import Needs, fitting, needs_of
from tests.compare.run.conftest import Workshop, parent_of, wait_for_end

ROOT = Path(__file__).parents[3]


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path, forked=False)  # the nodes are given the stub's command


@pytest.fixture
def cluster(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head without CPUs, and two nodes with one CPU each, so that a task needs a whole node."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'lmeval-ext[ray]'")
    from ray.cluster_utils import Cluster

    for name, value in (("STUB_CALLS", workshop.calls_file), ("STUB_FIFO", workshop.fifo), ("PYTHONPATH", ROOT)):
        monkeypatch.setenv(name, str(value))  # the nodes' processes inherit them
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()


@pytest.mark.ray
def test_task_of_a_lost_node_runs_again_on_another(workshop: Workshop, cluster: Any) -> None:
    """Ray runs the lost node's task on the other node, and nothing else twice; all results arrive."""
    workshop.mark("b", "hang")
    process = workshop.start_command("--launcher", "ray", "--ray-address", cluster.address)
    pid, alive = workshop.wait_for_hanging_stub()
    (workshop.root / "models/b/hang").unlink()  # the second run succeeds
    node = _node_of(pid, cluster)
    cluster.remove_node(node, allow_graceful=False)
    wait_for_end(alive)  # the lost node's engine ends with it
    out, err = process.communicate(timeout=150)
    assert process.returncode == 0, out + err
    assert sorted(workshop.calls()) == ["a", "b", "b", "c"]
    assert workshop.labels() == ["Model a", "Model b", "Model c"]
    assert "Model b: 5.00 bpw (decoder)" in out
    logs = {log.name[:7]: log.read_text() for log in (workshop.results / "logs").iterdir()}
    assert "Scoring windows" in logs["Model-b"]
    # the same command again, on this machine, runs nothing
    assert workshop.run() == 0
    assert workshop.calls() == []


@pytest.mark.ray
def test_failure_and_interrupt_on_the_cluster_are_reported(workshop: Workshop, cluster: Any) -> None:
    workshop.mark("a", "boom", "RuntimeError: no such kernel")
    process = workshop.start_command("--launcher", "ray", "--ray-address", cluster.address)
    out, _ = process.communicate(timeout=150)
    assert process.returncode == 3
    assert "RuntimeError: no such kernel (exit code 1)" in out
    assert sorted(workshop.calls()) == ["a", "b", "c"]  # a model that fails is not run again
    (workshop.root / "models/a/boom").unlink()
    workshop.mark("a", "hang")
    process = workshop.start_command("--launcher", "ray", "--ray-address", cluster.address)
    _, alive = workshop.wait_for_hanging_stub()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped: 2 of 3 done and kept" in err
    wait_for_end(alive)


@pytest.mark.ray
def test_measured_models_wait_for_the_reference_on_the_cluster(workshop: Workshop, cluster: Any) -> None:
    """The second of two nodes is idle while the reference is written. Samples arrive with the results."""
    workshop.entries[2]["out_logits"] = "refs"
    workshop.write()
    command = ("--launcher", "ray", "--ray-address", cluster.address, "-kld", "--log-samples")
    workshop.mark("c", "boom", "RuntimeError: no such kernel")
    process = workshop.start_command(*command)
    out, _ = process.communicate(timeout=150)
    assert process.returncode == 2
    assert "Model a, Model b: not run: the reference failed" in out
    assert workshop.calls() == ["c"]
    (workshop.root / "models/c/boom").unlink()
    workshop.mark("c", "slow", "2")
    process = workshop.start_command(*command)
    out, err = process.communicate(timeout=150)
    assert process.returncode == 0, out + err
    events = [("+", line["model"]) if "model" in line else ("-", line["ended"]) for line in workshop.stub_events()]
    assert events[:2] == [("+", "c"), ("-", "c")]
    assert out.count("KL divergence") == 2
    assert len(list(workshop.results.glob("*/samples_*.jsonl"))) == 3
    assert workshop.run("-kld", "--log-samples") == 0
    assert workshop.calls() == []


def _node_of(pid: int, cluster: Any) -> Any:
    """The node of the cluster whose descendant the process is."""
    raylets = {node.all_processes["raylet"][0].process.pid: node for node in cluster.worker_nodes}
    while pid > 1:
        if pid in raylets:
            return raylets[pid]
        pid = parent_of(pid)
    raise AssertionError("the engine does not run on a node of the cluster")


def job(**fields: Any) -> Job:
    from compare.results.label_index import Presentation

    return Job(Presentation("x"), "hf", {"pretrained": "x"}, ("t",), {}, **fields)


def test_needs_are_computed_from_the_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_pool, "_storage", lambda checkpoint: (40 * GIB, 36.0))
    assert needs_of(job(), None) == Needs(1, 52 * GIB)
    assert needs_of(job(), 24.0) == Needs(2, 52 * GIB)  # 36 × 1.2 = 43.2 on cards of 24
    assert needs_of(job(gpus=4), 24.0).gpus == 4
    monkeypatch.setattr(ray_pool, "_storage", lambda checkpoint: (None, None))
    assert needs_of(job(), 24.0) == Needs(1, 0)


def test_needs_are_limited_to_the_largest_node() -> None:
    nodes = [{"CPU": 4.0, "memory": 8.0 * GIB}, {"CPU": 1.0, "GPU": 2.0, "memory": 4.0 * GIB}]
    assert fitting(Needs(4, 52 * GIB), nodes) == Needs(2, 8 * GIB)
    assert fitting(Needs(1, GIB), [{"CPU": 1.0}]) == Needs(0, 0)


def test_storage_reads_a_real_checkpoint(workshop: Workshop) -> None:
    """The subprocess that reads headers; the file's one tensor has 4096 bytes."""
    weights, _ = ray_pool._storage(str(workshop.root / "models/a"))
    assert weights == 4096
    assert ray_pool._storage("no/such/model") == (None, None)


def test_missing_ray_names_the_extra(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(ray_pool.importlib, "import_module", missing)
    with pytest.raises(CompareError, match=r"pip install 'lmeval-ext\[ray\]'"):
        ray_pool._connect(None)
