"""Locks: one run at a time per output file; the error of a second run names the owner."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hf_speechllm.locks import output_file_lock

REPOSITORY = Path(__file__).resolve().parents[1]
HOLD = """
import sys, time
from hf_speechllm.locks import output_file_lock
with output_file_lock(sys.argv[1], "hyp.txt", "--output_file"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_file_is_locked_until_its_process_ends(tmp_path):
    output = tmp_path / "hyp.txt"
    link = tmp_path / "link.txt"
    link.symlink_to(output)
    command = [sys.executable, "-c", HOLD, str(output)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) as first:
        assert first.stdout.readline() == "held\n"
        message = f"link is in use by another run, process {first.pid} on .*; .* choose another --output_file"
        for name in (output, link):
            with pytest.raises(ValueError, match=message), output_file_lock(name, "link", "--output_file"):
                pass
        first.kill()
    with output_file_lock(link, "link", "--output_file"):  # released although the process was killed
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.txt"]


def test_a_lock_is_released_and_removed_after_an_error(tmp_path):
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), output_file_lock(tmp_path / "hyp.txt", "hyp.txt", "--output_file"):
            raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_concurrent_users_get_the_lock_one_at_a_time_or_an_error(tmp_path):
    inside, most, refused = [], [], []

    def take():
        for _ in range(20):
            try:
                with output_file_lock(tmp_path / "hyp.txt", "hyp.txt", "--output_file"):
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
