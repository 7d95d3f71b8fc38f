"""Fixtures that several rooms need: recordings made on the spot, a web server, recipes, real data if there is any."""

import runpy
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import soundfile

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture
def tone():
    """Makes sines, shape = (samples, channels), a little quieter in every further channel."""

    def make(seconds=0.5, rate=16000, channels=1, frequency=440.0):
        time = np.arange(round(seconds * rate)) / rate
        levels = 0.5 * 0.9 ** np.arange(channels)
        return (np.sin(2 * np.pi * frequency * time)[:, None] * levels).astype(np.float32)

    return make


@pytest.fixture
def make_wav(tmp_path, tone):
    """Writes a recording of a tone into the test's folder and gives its path."""

    def make(name="a.wav", seconds=0.5, rate=16000, channels=1, **options):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, tone(seconds, rate, channels), rate, **options)
        return path

    return make


@pytest.fixture
def serve():
    """Starts web servers on this machine: `serve(folder)` or `serve(handler=...)` gives the address."""
    servers = []

    class QuietHandler(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    def start(folder=None, handler=None):
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler or partial(QuietHandler, directory=folder))
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def run_recipe(monkeypatch):
    """Runs a recipe in this process, as from the command line, and gives its exit code, or its last message."""

    def run(name, *arguments):
        path = str(REPOSITORY / "recipes" / name)
        monkeypatch.setattr(sys, "argv", [path, *map(str, arguments)])
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as end:
            return end.code
        return None

    return run


@pytest.fixture
def shared():
    """The folder of real recordings and reference results that lies beside the checkout, if it does."""
    folder = REPOSITORY.parent / "shared"
    if not folder.is_dir():
        pytest.skip("no ../shared")
    return folder
