"""Shared fixtures: generated recordings and tiny models, a web server, recipes, and optional real data."""

import dataclasses
import json
import logging
import os
import runpy
import signal
import subprocess
import sys
import threading
from collections import namedtuple
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import transformers.utils.hub
from huggingface_hub import constants, hf_api
from transformers import TrainerCallback, set_seed

from hf_speechllm import SpeechLLMForConditionalGeneration, SpeechLLMProcessor
from hf_speechllm.data.collator import SpeechLLMCollator
from hf_speechllm.data.dataset import prepare_rows
from hf_speechllm.data.options import DataOptions
from hf_speechllm.model.options import ModelOptions
from hf_speechllm.training.arguments import SpeechLLMTrainingArguments
from hf_speechllm.training.freezing import freeze_parameters, freeze_parts
from hf_speechllm.training.lora import add_lora
from hf_speechllm.training.options import FinetuningOptions, TrainedPartsOptions
from hf_speechllm.training.trainer import SpeechLLMTrainer

REPOSITORY = Path(__file__).resolve().parents[1]
_spec = spec_from_file_location("hub_server", REPOSITORY / "tests/hub/hub_server.py")
hub_server = module_from_spec(_spec)
sys.modules["hub_server"] = hub_server  # dataclasses look up their types there
_spec.loader.exec_module(hub_server)


@pytest.fixture(scope="session", autouse=True)
def python_handles_ctrl_c():
    """Restores Python's handler of SIGINT, which background jobs and their children ignore."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def log_unchanged():
    """Restores the loggers that commands configure in this process; otherwise `caplog` of later tests stays empty."""
    loggers = [logging.getLogger(name) for name in ("hf_speechllm", "transformers", "DeepSpeed")]
    before = [(item.level, item.propagate, list(item.handlers), list(item.filters)) for item in loggers]
    yield
    for item, (level, propagate, handlers, filters) in zip(loggers, before, strict=True):
        item.setLevel(level)
        item.propagate, item.handlers, item.filters = propagate, handlers, filters


@pytest.fixture
def tone():
    """Returns sines, shape = (samples, channels), with decreasing volume from channel to channel."""

    def make(seconds=0.5, rate=16000, channels=1, frequency=440.0):
        time = np.arange(round(seconds * rate)) / rate
        levels = 0.5 * 0.9 ** np.arange(channels)
        return (np.sin(2 * np.pi * frequency * time)[:, None] * levels).astype(np.float32)

    return make


@pytest.fixture
def make_wav(tmp_path, tone):
    """Writes a recording of a tone to the test's folder and returns its path."""

    def make(name="a.wav", seconds=0.5, rate=16000, channels=1, **options):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, tone(seconds, rate, channels), rate, **options)
        return path

    return make


@pytest.fixture
def serve():
    """Starts local web servers: `serve(folder)` or `serve(handler=...)` returns the address."""
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
def hub(monkeypatch, tmp_path):
    """A server for the client in this process, which is logged in and has an empty cache."""
    server = hub_server.HubServer()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hf_api.api, "endpoint", server.url)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    yield server
    server.close()


@pytest.fixture(scope="session")
def launch():
    """Runs `accelerate launch` on the CPU, with one process or according to a config file."""

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
    """Runs a recipe in this process, as from the command line, and returns the exit code or the last message."""

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
    """The folder with real recordings and reference results beside the checkout; without it, the test is skipped."""
    folder = REPOSITORY.parent / "shared"
    if not folder.is_dir():
        pytest.skip("no ../shared")
    return folder


Corpus = namedtuple("Corpus", "folder jsonl scp text")
WORDS = ("one", "two", "three", "four", "五", "六", "七", "八")


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory):
    """24 tones of 0.3 to 1.5 s, as Kaldi lists and as training JSONL; the pitch determines the transcript."""
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
    """A function that returns a new config of a tiny Fun-ASR-Nano without dropout, which a test may change."""

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
    """Composes tiny random models: `compose_tiny(config, seed)` returns model and processor."""
    import torch

    from hf_speechllm.formats.composition import compose, train_tokenizer

    tokenizer = train_tokenizer([" ".join(WORDS), "one two three", "几点了？"], vocab_size=300)

    def make(config=None, seed=0):
        torch.manual_seed(seed)
        model, processor = compose(config or tiny_config(), tokenizer)
        with torch.no_grad():  # values unlike the zeros and ones of a new model, which would hide errors
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        return model.eval(), processor

    return make


@pytest.fixture(scope="session")
def tiny_model(compose_tiny, tmp_path_factory):
    """Folder of a tiny random model with its processor; its texts are not empty, and differ between recordings."""
    folder = tmp_path_factory.mktemp("model")
    for part in compose_tiny(seed=2):
        part.save_pretrained(folder)
    return folder


class Interruption(TrainerCallback):
    """A callback that interrupts a run after a step, as Ctrl-C does."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.fixture
def interrupt():
    """Returns a callback that interrupts a run after a step, as Ctrl-C does."""
    return Interruption


@pytest.fixture
def split_options(tiny_model, tiny_corpus, tmp_path):
    """Options of a short run on the CPU, one group per options dataclass."""

    def split(**options):
        defaults = {
            "model_name_or_path": str(tiny_model),
            "train_file": [str(tiny_corpus.jsonl)],
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_seconds": 4.0,
            "max_steps": 4,
            "learning_rate": 1e-3,
            "warmup_steps": 0,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "preprocessing_num_workers": 1,
            "lora_r": 4,
        }
        options = {**defaults, **options}
        kinds = (ModelOptions, DataOptions, TrainedPartsOptions)
        names = [{item.name for item in dataclasses.fields(kind)} & {*options} for kind in kinds]
        found = [kind(**{name: options.pop(name) for name in own}) for kind, own in zip(kinds, names, strict=True)]
        args = SpeechLLMTrainingArguments(**options)
        args.run_options = {name: value for part in found for name, value in vars(part).items()}
        return *found, args

    return split


@pytest.fixture
def make_options(split_options):
    """Options of a short run on the CPU, as the command line combines them."""
    return lambda **options: FinetuningOptions(*split_options(**options))


@pytest.fixture
def make_arguments(split_options):
    """Options of the trainer for a short run on the CPU."""
    return lambda **options: split_options(**options)[-1]


@pytest.fixture(scope="session")
def model_with_head(tiny_model, tmp_path_factory):
    """Folder with a tiny model that has a CTC head over the LLM's tokens, without dropout."""
    from hf_speechllm.model.ctc import add_ctc_head
    from hf_speechllm.model.ctc_configuration import CTCHeadConfig

    model = SpeechLLMForConditionalGeneration.from_pretrained(tiny_model, dtype=torch.float32)
    processor = SpeechLLMProcessor.from_pretrained(tiny_model)
    size = len(processor.tokenizer)
    torch.manual_seed(0)
    config = CTCHeadConfig(
        vocabulary="llm", vocab_size=size + 1, blank_id=size, num_attention_heads=2, hidden_dropout=0.0,
        hidden_size=model.config.audio_adaptor_config.encoder_hidden_size, attention_dropout=0.0,
    )  # fmt: skip
    add_ctc_head(model, config)
    folder = tmp_path_factory.mktemp("head")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_rows(tiny_model, tiny_corpus, tmp_path_factory):
    """The rows of the corpus, with features."""
    processor = SpeechLLMProcessor.from_pretrained(tiny_model)
    options = DataOptions(cache_dir=str(tmp_path_factory.mktemp("cache")), preprocessing_num_workers=1)
    return prepare_rows([str(tiny_corpus.jsonl)], processor, 2048, options)[0]


@pytest.fixture
def make_trainer(split_options, tiny_rows):
    """Builds a trainer as recipes/finetune.py does."""

    def make(callbacks=(), model=None, eval_dataset=None, train_dataset=None, **options):
        loaded, data, tuned, args = split_options(**options)
        set_seed(args.seed)
        processor = SpeechLLMProcessor.from_pretrained(loaded.model_name_or_path)
        if model is None:
            model = SpeechLLMForConditionalGeneration.from_pretrained(loaded.model_name_or_path, dtype=torch.float32)
        model.audio_token_dropout = tuned.audio_token_dropout
        freeze_parts(model, tuned.freeze_audio_encoder, tuned.freeze_audio_adaptor, tuned.freeze_llm)
        if tuned.use_lora:
            model = add_lora(model, tuned.lora_r, tuned.lora_alpha, tuned.lora_dropout, tuned.lora_target_modules)
        freeze_parameters(model, tuned.freeze_param)
        return SpeechLLMTrainer(
            model=model,
            args=args,
            train_dataset=train_dataset or tiny_rows,
            eval_dataset=eval_dataset,
            data_collator=SpeechLLMCollator.augmenting(processor, data),
            eval_collator=SpeechLLMCollator(processor),
            processing_class=processor,
            callbacks=list(callbacks),
        )

    return make


@pytest.fixture(scope="module")
def parts(compose_tiny):
    return compose_tiny(seed=3)


@pytest.fixture(scope="module")
def waveforms():
    """Tones with noise, of many lengths, in random order."""
    rng = np.random.default_rng(0)
    result = []
    for seconds in (0.9, 3.1, 0.2, 1.7, 2.4, 0.5, 1.2):
        time = np.arange(int(seconds * 16000)) / 16000
        tone = np.sin(2 * np.pi * rng.uniform(100, 2000) * time)
        result.append((0.3 * tone + 0.05 * rng.standard_normal(len(time))).astype(np.float32))
    return result
