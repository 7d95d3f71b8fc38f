"""Locks: one run at a time for one output file; a second one is told who has it."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hf_speechllm.locks import hold_file

REPOSITORY = Path(__file__).resolve().parents[1]
HOLD = """
import sys, time
from hf_speechllm.locks import hold_file
with hold_file(sys.argv[1], "hyp.txt", "--output_file"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_file_is_held_by_one_process_until_that_is_gone(tmp_path):
    output = tmp_path / "hyp.txt"
    link = tmp_path / "link.txt"
    link.symlink_to(output)
    command = [sys.executable, "-c", HOLD, str(output)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) as first:
        assert first.stdout.readline() == "held\n"
        message = f"link is in use by another run, process {first.pid} on .*: .* choose another --output_file"
        for name in (output, link):
            with pytest.raises(ValueError, match=message), hold_file(name, "link", "--output_file"):
                pass
        first.kill()
    with hold_file(link, "link", "--output_file"):  # however it ended
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.txt"]


def test_a_lock_is_released_and_leaves_nothing_behind_after_an_error(tmp_path):
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), hold_file(tmp_path / "hyp.txt", "hyp.txt", "--output_file"):
            raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_many_that_want_a_file_get_it_one_at_a_time_or_are_told(tmp_path):
    inside, most, refused = [], [], []

    def take():
        for _ in range(20):
            try:
                with hold_file(tmp_path / "hyp.txt", "hyp.txt", "--output_file"):
                    inside.append(1)
                    most.append(len(inside))
                    inside.pop()
            except ValueError as error:
                refused.append(str(error))

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) + len(refused) == 80 and set(most) == {1}
    assert all(f"process {os.getpid()}" in message or "process ?" in message for message in refused)
