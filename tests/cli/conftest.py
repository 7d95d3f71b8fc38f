"""Shared fixtures of the console command."""

import sys

import pytest

from hf_speechllm.cli.main import main


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs `hf-speechllm ...` in this process; returns exit code and output."""

    def start(*arguments):
        monkeypatch.setattr(sys, "argv", ["/bin/hf-speechllm", *map(str, arguments)])
        code = None
        try:
            main()
        except SystemExit as end:
            code = end.code
        return code, capsys.readouterr()

    return start
