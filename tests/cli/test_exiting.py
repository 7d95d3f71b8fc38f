"""End of a process without the teardown of the interpreter."""

import subprocess
import sys

import pytest

SCRIPT = """
import hf_speechllm_command
from hf_speechllm.cli.exiting import skip_teardown
import atexit, os, sys

class AbortsInTeardown:
    abort = os.abort

    def __del__(self):
        self.abort()

atexit.register(print, "exit handler")
kept = AbortsInTeardown()
{call}
sys.exit({end})
"""


@pytest.mark.parametrize("status, end", [(0, ""), (75, "75"), (1, "'the error'")])
def test_exit_handlers_run_and_the_teardown_does_not(status, end):
    result = _run(f"skip_teardown({status})", end)
    assert (result.returncode, result.stdout) == (status, "exit handler\n")
    assert "the error" in result.stderr if status == 1 else not result.stderr


def test_other_processes_end_as_usual():
    assert _run("", "").returncode < 0  # the object aborts in the teardown


def _run(call, end):
    return subprocess.run(
        [sys.executable, "-c", SCRIPT.format(call=call, end=end)], capture_output=True, text=True, timeout=120
    )
