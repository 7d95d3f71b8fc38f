"""Log lines, progress bars and summaries of commands, on a terminal and elsewhere."""

import fcntl
import json
import logging
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from hf_speechllm import console

REPLACED = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture
def terminal():
    """Runs Python code with a terminal of a width as standard output and error; returns lines as they are printed."""

    def run(code, columns=80, **environment):
        master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        environment = {**os.environ, "TERM": "xterm", **environment}
        process = subprocess.Popen([sys.executable, "-c", code], stdout=slave, stderr=slave, env=environment)
        os.close(slave)
        written = b""
        while select.select([master], [], [], 60)[0]:
            try:
                block = os.read(master, 4096)
            except OSError:  # closed
                break
            if not block:
                break
            written += block
        os.close(master)
        assert process.wait(60) == 0, written.decode()
        return written.decode().replace("\r\n", "\n")

    return run


def record(name, level, message, *args):
    return logging.LogRecord(name, level, "file.py", 1, message, args, None)


def test_lines_name_level_and_library():
    text = console.LogFormatter().format
    assert text(record("hf_speechllm.data", logging.INFO, "%d rows", 3)) == "3 rows"
    assert text(record("hf_speechllm.data", logging.WARNING, "no rows")) == "warning: no rows"
    assert text(record("transformers.trainer", logging.WARNING, "odd")) == "warning: transformers: odd"
    warned = "/lib/torch/a.py:431: UserWarning: too many workers\n  self.check()\n"
    assert text(record("py.warnings", logging.WARNING, "%s", warned)) == "warning: UserWarning: too many workers"
    assert re.fullmatch(r"\d\d:\d\d:\d\d a", console.LogFormatter(True).format(record("a", logging.INFO, "a")))


def test_only_lines_without_a_possible_action_are_silenced():
    aligned = "The tokenizer has new PAD/BOS/EOS tokens that differ from the model config"
    assert console.is_silenced(record("transformers.trainer_utils", logging.WARNING, aligned))
    assert not console.is_silenced(record("hf_speechllm.training", logging.WARNING, aligned))
    early = "Using EarlyStoppingCallback without load_best_model_at_end=True."
    assert not console.is_silenced(record("transformers.trainer_callback", logging.WARNING, early))


def test_silenced_lines_still_exist_in_transformers():
    from transformers import trainer_callback, trainer_utils

    sources = [Path(module.__file__).read_text(encoding="utf-8") for module in (trainer_callback, trainer_utils)]
    for name, part in console.SILENCED:
        assert name != "transformers" or any(part in source for source in sources), part


CODE = """
import logging, sys, warnings
from hf_speechllm.console import show_log, quiet_transformers
show_log()
quiet_transformers()
from transformers.utils import logging as transformers_logging
logger = transformers_logging.get_logger("transformers.trainer_utils")
logger.warning("The tokenizer has new PAD/BOS/EOS tokens that differ")
logger.warning("another warning")
for _ in range(3):
    logging.getLogger("huggingface_hub.utils._http").warning("no answer")
    logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s [Retry 1/5].")
    warnings.resetwarnings()
    warnings.warn("few cores")
logging.getLogger("hf_speechllm.x").info("progress")
logging.getLogger("hf_speechllm.x").warning("a bad row")
list(transformers_logging.tqdm(range(3), desc="Writing model shards"))
"""


@pytest.mark.parametrize("rank", ["0", "1"])
def test_first_process_prints_lines_and_others_only_own_warnings(rank):
    result = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, env={**os.environ, "RANK": rank}, check=True
    )
    lines = {
        "0": [
            "warning: transformers: another warning",
            "warning: huggingface_hub: no answer",
            "warning: UserWarning: few cores",
            "progress",
        ],
        "1": [],
    }
    assert result.stderr.splitlines() == [*lines[rank], "warning: a bad row"]


def test_short_bars_of_transformers_do_not_appear_on_a_terminal(terminal):
    assert "shards" not in terminal(CODE) and "a bad row" in terminal(CODE)


BAR = """
import logging, time
from hf_speechllm import console
console.show_log()
console.LINE_INTERVAL = 0.2
with console.progress_bar(desc="reading", total=4, unit=" rows") as bar:
    for number in range(4):
        time.sleep(0.15)
        if number == 2:
            logging.getLogger("hf_speechllm").warning("a line")
        bar.update()
"""


def test_slow_progress_has_a_readable_rate(caplog):
    caplog.set_level("INFO")
    bar = console.ProgressLines(total=6, desc="measuring", unit=" configurations")
    bar.start_t -= 94
    bar.update()
    bar.display()
    assert re.fullmatch(r"measuring 1 of 6 \(17 %\), 0.638 configurations/min, ETA 0:07:50", caplog.messages[-1])


def test_a_bar_on_a_terminal_and_lines_elsewhere(terminal):
    shown = terminal(BAR, columns=60)
    assert "reading: 100%" in shown and "4/4" in shown
    assert re.search(r"^\W*warning: a line$", REPLACED.sub("", shown).replace("\r", "\n"), re.MULTILINE)
    plain = subprocess.run([sys.executable, "-c", BAR], capture_output=True, text=True, check=True).stderr
    assert "%|" not in plain and "\r" not in plain
    assert re.search(r"^reading [23] of 4 \((50|75) %\), [\d.]+ rows/s, ETA \d:\d\d:\d\d$", plain, re.MULTILINE)
    assert "warning: a line" in plain.splitlines()


LIBRARY_BARS = """
import sys, time, warnings
import datasets
from hf_speechllm import console
def square(number):
    time.sleep(0.02)
    return {"square": number**2}
if __name__ == "__main__":
    console.show_log()
    console.LINE_INTERVAL = 0.5
    rows = datasets.Dataset.from_dict({"number": range(80)})
    with console.bars_as_lines():
        print("before", file=sys.stderr)
        for processes in (None, 2):
            rows.map(square, input_columns="number", num_proc=processes, desc="squares", load_from_cache_file=False)
        bar = datasets.utils.tqdm(total=2)
        warnings.warn("odd")
        bar.update()
        bar.close()
        sys.stderr.write("after\\n\\n")
"""


def test_bars_of_libraries_are_lines_in_a_log_and_bars_on_a_terminal(terminal):
    log = subprocess.run([sys.executable, "-c", LIBRARY_BARS], capture_output=True, text=True, check=True).stderr
    assert "\r" not in log and "|" not in log and "\x1b" not in log
    lines = log.splitlines()
    assert lines[0] == "before" and lines[-3:] == ["warning: UserWarning: odd", "after", ""]
    progress = [line for line in lines if line.startswith("squares")]
    assert 2 <= len(progress) == len(lines) - 4
    for line in progress:
        pattern = r"squares( \(num_proc=\d\))?: \d+% \d+/80 \[\d\d:\d\d<\d\d:\d\d, +[\d.]+ examples/s\]"
        assert re.fullmatch(pattern, line), line
    assert any("num_proc=2" in line for line in progress)
    assert "squares: 100%|" in terminal(LIBRARY_BARS)


def test_commands_print_no_bars_of_libraries_into_a_log():
    code = """
import sys
from hf_speechllm.cli import env
from hf_speechllm.cli.main import main
from tqdm import tqdm
env.main = lambda: list(tqdm(range(3), desc="long"))[3:] or None
main("env")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stderr == ""


SUMMARY = """
from hf_speechllm.console import command, print_summary
line = command("decode", "a b.wav", model_name_or_path="exp/model", output_file=None, scp_file="x" * 90)
print_summary({"rows": 3, "written": ["a", "b"], "left out": "", "page": None}, [line])
"""


def test_summary_is_aligned_and_its_commands_can_be_copied(terminal):
    expected = [
        "rows     3",
        "written  a",
        "         b",
        f"next     hf-speechllm decode 'a b.wav' --model_name_or_path exp/model --scp_file {'x' * 90}",
    ]
    plain = subprocess.run([sys.executable, "-c", SUMMARY], capture_output=True, text=True, check=True)
    assert plain.stdout.splitlines() == expected and "rich" not in plain.stderr
    shown = terminal(SUMMARY)
    assert "\x1b[" in shown and REPLACED.sub("", shown).splitlines() == expected
    assert "\x1b[" not in terminal(SUMMARY, NO_COLOR="1", TERM="dumb")


def test_an_empty_summary_prints_nothing(capsys):
    console.print_summary({"page": None})
    assert capsys.readouterr().out == ""


def test_an_error_of_all_ranks_is_printed_once(tmp_path, tiny_model):
    rows = tmp_path / "rows.jsonl"
    message = {"messages": [{"role": "user", "content": "<|startofspeech|>!/gone.wav<|endofspeech|>"}]}
    message["messages"].append({"role": "assistant", "content": "text"})
    rows.write_text(json.dumps(message) + "\n", encoding="utf-8")
    command = [
        sys.executable, "-m", "hf_speechllm", "finetune", "--num_processes", 2, "--config_file", "cpu",
        "--model_name_or_path", tiny_model, "--train_file", rows, "--output_dir", tmp_path / "out",
        "--cache_dir", tmp_path / "cache", "--max_steps", 1, "--report_to", "none",
    ]  # fmt: skip
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert result.returncode == 1
    assert result.stderr.count("/gone.wav: no such file") == result.stderr.count("rows are bad") == 1


def test_an_error_of_another_rank_alone_is_printed_with_its_rank(monkeypatch):
    from hf_speechllm.cli import parser

    monkeypatch.setattr(parser, "OTHER_RANKS_WAIT", 0.0)
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit, match="^rank 3: no memory$"):
        parser.fail("no memory")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit, match="^no memory$"):
        parser.fail("no memory")


@pytest.mark.parametrize("test", [1, 2])
def test_the_log_of_a_command_does_not_outlive_a_test(test, caplog):
    with caplog.at_level("INFO"):
        logging.getLogger("hf_speechllm.data").info("shown")
    assert "shown" in caplog.text
    console.show_log(logging.WARNING)  # as `inspect` does
