"""The engines themselves, imported by a fork server and run in processes that it forks."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from compare.cli import main
from compare.results.reading import read_file
from tests.conformance.adapters import Bench

pytestmark = pytest.mark.engine

# Imports as the server does, then forks a child that computes with several threads, joins a process group, and starts
# a process of its own with multiprocessing
IMPORTED = """
import os, sys, threading
from compare.run.processes import fork_server

def grandchild():
    os._exit(7)

if __name__ == "__main__":
    obstacles = (fork_server._import_harness("lm_eval"), fork_server._import_engine("lm_eval", sys.argv[1]))
    print(obstacles, threading.active_count())
    import torch
    print(torch.cuda.is_initialized(), flush=True)
    child = os.fork()
    if child == 0:
        import multiprocessing, tempfile
        torch.set_num_threads(2)
        a = torch.ones(600, 600)
        assert (a @ a).sum().item() == 600**3
        store = torch.distributed.FileStore(tempfile.mktemp(), 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        torch.distributed.all_reduce(a)
        for method in ("fork", "spawn"):
            process = multiprocessing.get_context(method).Process(target=grandchild)
            process.start()
            process.join()
            assert process.exitcode == 7
        os._exit(0)
    print(os.waitpid(child, 0)[1])
"""


@pytest.mark.parametrize("model", ["hf_quant", "llamacpp", "vllm_nvfp4"])
def test_imports_start_no_threads_and_touch_no_gpu(model: str, tmp_path: Path) -> None:
    """And a process that is forked after them can use all cores, gloo and multiprocessing."""
    script = tmp_path / "imported.py"
    script.write_text(IMPORTED)
    done = subprocess.run(
        [sys.executable, str(script), model], capture_output=True, text=True, timeout=170, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-3:] == ["(('', False), ('', False)) 1", "False", "0"], done.stderr


def test_forked_engines_find_one_perplexity(tmp_path: Path) -> None:
    """One checkpoint in three engines, each forked from its own server."""
    signal.alarm(600)  # three engines, where conftest.py allows three minutes
    bench = Bench(tmp_path)
    folder, gguf = str(bench.folder()), str(bench.gguf())
    engines = [
        {"model": "hf_quant", "args": {"pretrained": folder, "dtype": "float32"}, "label": "hf"},
        {
            "model": "llamacpp",
            "args": {"pretrained": gguf, "tokenizer": folder, "max_length": 128},
            "label": "llamacpp",
        },
        {
            "model": "vllm_nvfp4",
            "args": {"pretrained": folder, "dtype": "float32", "max_model_len": 129, "kv_cache_memory_bytes": 1 << 26},
            "label": "vllm",
        },
    ]
    (tmp_path / "models.json").write_text(json.dumps(engines))
    data = {"dataset": "sample", "eval_stride": 64, "eval_len": 128, "max_rows": 3}
    (tmp_path / "data.json").write_text(json.dumps(data))
    results = tmp_path / "results"
    specs = ["-m", str(tmp_path / "models.json"), "-d", str(tmp_path / "data.json")]
    assert main(["run", *specs, "--results", str(results)]) == 0
    records = [read_file(file)[0] for file in results.glob("*/results_*.json")]
    found = {record.label: record.metric("token_perplexity,none").value for record in records}
    assert found.keys() == {"hf", "llamacpp", "vllm"}
    assert found["llamacpp"] == pytest.approx(found["hf"], rel=1e-3)
    assert found["vllm"] == pytest.approx(found["hf"], rel=1e-3)
    for log in (results / "logs").iterdir():
        assert "nothing imported beforehand" not in log.read_text()
