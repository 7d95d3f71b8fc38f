"""Fixtures that several rooms need: recordings and tiny models made on the spot, a web server, recipes, real data if
there is any."""

import json
import os
import runpy
import subprocess
import sys
import threading
from collections import namedtuple
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


@pytest.fixture(scope="session")
def launch():
    """Runs `accelerate launch` on the CPU, as a user would: one process, or those of a config file."""

    def run(*arguments, config=None):
        one_process = "--num_processes 1 --num_machines 1 --cpu --mixed_precision no --dynamo_backend no"
        choice = ["--config_file", config] if config else one_process.split()
        command = [sys.executable, "-m", "accelerate.commands.launch", *choice, "--main_process_port", 0, *arguments]
        return subprocess.run(
            list(map(str, command)), capture_output=True, text=True, cwd=REPOSITORY, timeout=600,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
        )  # fmt: skip

    return run


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


Corpus = namedtuple("Corpus", "folder jsonl scp text")
WORDS = ("one", "two", "three", "four", "五", "六", "七", "八")


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory):
    """24 tones of 0.3 to 1.5 s whose pitch tells the transcript, as Kaldi lists and as training JSONL."""
    from hf_speechllm.model.chat import transcription_messages, transcription_prompt

    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    rows, scp, text = [], [], []
    for index in range(24):
        word = index % len(WORDS)
        time = np.arange(int(rng.uniform(0.3, 1.5) * 16000)) / 16000
        samples = 0.3 * np.sin(2 * np.pi * (200 + 300 * word) * time) + 0.01 * rng.standard_normal(len(time))
        path = folder / f"utt{index:02d}.wav"
        soundfile.write(path, samples, 16000, subtype="PCM_16")
        transcript = " ".join([WORDS[word]] * (1 + index % 3))
        frames = int((len(time) / 16 - 25) // 10 + 1)
        messages = transcription_messages(str(path), transcription_prompt(), transcript)
        rows.append({"messages": messages, "speech_length": frames})
        scp.append(f"utt{index:02d} {path}\n")
        text.append(f"utt{index:02d} {transcript}\n")
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "wav.scp").write_text("".join(scp), encoding="utf-8")
    (folder / "text").write_text("".join(text), encoding="utf-8")
    return Corpus(folder, folder / "train.jsonl", folder / "wav.scp", folder / "text")


@pytest.fixture(scope="session")
def tiny_config():
    """Sizes of a tiny Fun-ASR-Nano without dropout; a function, so that a test may change what it gets."""

    def make(**adaptor):
        return {
            "audio_encoder_config": {
                "model_type": "fun_asr_nano_encoder",
                "hidden_size": 32,
                "num_attention_heads": 2,
                "intermediate_size": 48,
                "num_hidden_layers": 3,
                "num_timestamp_prediction_layers": 1,
                "hidden_dropout": 0.0,
                "attention_dropout": 0.0,
            },
            "audio_adaptor_config": {
                "projector_hidden_size": 40,
                "num_attention_heads": 4,
                "num_hidden_layers": 1,
                **adaptor,
            },
            "llm_config": {
                "model_type": "qwen3",
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "head_dim": 16,
                "attention_dropout": 0.0,
                "tie_word_embeddings": True,
            },
        }

    return make


@pytest.fixture(scope="session")
def compose_tiny(tiny_config):
    """Composes tiny random models: `compose_tiny(config, seed)` gives model and processor."""
    import torch

    from hf_speechllm.formats.composition import compose, train_tokenizer

    tokenizer = train_tokenizer([" ".join(WORDS), "one two three", "几点了？"], vocab_size=300)

    def make(config=None, seed=0):
        torch.manual_seed(seed)
        model, processor = compose(config or tiny_config(), tokenizer)
        with torch.no_grad():  # far from the zeros, ones and near-zeros of a new model, where mistakes would not show
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        return model.eval(), processor

    return make


@pytest.fixture(scope="session")
def tiny_model(compose_tiny, tmp_path_factory):
    """Folder of a tiny random model with its processor."""
    folder = tmp_path_factory.mktemp("model")
    for part in compose_tiny():
        part.save_pretrained(folder)
    return folder
