"""Worker processes end with their parent, even if the parent is killed."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

POOLS = {
    "datasets": (
        "import multiprocess\n"
        "from hf_speechllm.data.dataset import _measure\n"
        "pool, helper = multiprocess.Pool(1), multiprocess.Manager()\n"
        "worker = pool.apply(lambda: (_measure(['gone.wav'], None), os.getpid())[1])\n"
        "others = [process.pid for process in multiprocess.active_children()]"
    ),
    "own": (
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from hf_speechllm.data.processes import end_with_parent\n"
        "pool = ProcessPoolExecutor(1, initializer=end_with_parent)\n"
        "worker, others = pool.submit(os.getpid).result(), []"
    ),
}


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
@pytest.mark.parametrize("pool", POOLS)
def test_workers_of_a_killed_process_end(pool, tmp_path):
    file = tmp_path / "processes"
    code = (
        f"import os, pathlib, signal\n{POOLS[pool]}\n"
        f"pathlib.Path({str(file)!r}).write_text(' '.join(map(str, [worker, *others])))\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=120)
    worker, *others = map(int, file.read_text().split())
    try:
        for _ in range(50):
            if not psutil.pid_exists(worker) or psutil.Process(worker).status() == psutil.STATUS_ZOMBIE:
                return
            time.sleep(0.1)
        pytest.fail("the worker waits for work forever")
    finally:
        for process in (worker, *others):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
