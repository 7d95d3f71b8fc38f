"""The page to try a model: through Gradio's client, and in a browser if there is one."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from hf_speechllm import SpeechLLMForConditionalGeneration, SpeechLLMProcessor, Transcriber
from hf_speechllm.audio.vad import VoiceDetector
from hf_speechllm.model.ctc import add_ctc_head
from hf_speechllm.model.ctc_vocabulary import character_config

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]


def test_missing_gradio_is_reported_in_one_line(run, monkeypatch):
    monkeypatch.delitem(sys.modules, "hf_speechllm.cli.demo_page", raising=False)
    monkeypatch.setitem(sys.modules, "gradio", None)
    code, _ = run("demo", "--model_name_or_path", "m")
    assert code == "hf-speechllm demo: error: the package gradio is missing; pip install 'hf_speechllm[demo]'"


@pytest.mark.parametrize("port", ["99999", "-1"])
def test_port_out_of_range_is_wrong_usage(run, port):
    code, output = run("demo", "--model_name_or_path", "m", "--port", port)
    assert code == 2 and f"--port {port}: not a port; choose a number from 0 to 65535" in output.err


@pytest.fixture
def tuned_model(compose_tiny, tmp_path):
    """A tiny model with a CTC head."""
    model, processor = compose_tiny(seed=3)
    torch.manual_seed(0)
    add_ctc_head(model, character_config(["one two three four 五六七八"], hidden_size=32, upsample_rate=3))
    for part in (model, processor):
        part.save_pretrained(tmp_path / "tuned")
    return tmp_path / "tuned"


@pytest.fixture
def page(tuned_model, tiny_model, tmp_path, monkeypatch):
    """Address of a page with a tuned model, and a base model without a CTC head; recordings of at most 60 s."""
    pytest.importorskip("gradio")
    pytest.importorskip("silero_vad")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    from hf_speechllm.cli import demo_page

    models = {title: demo_page.load_transcriber(str(name), "cpu", None)
              for title, name in (("Tuned model: a", tuned_model), ("Base model: b", tiny_model))}  # fmt: skip
    for transcriber in models.values():
        transcriber.max_new_tokens = 8
    tuned = next(iter(models.values())).processor  # a random model does not write words
    monkeypatch.setattr(tuned, "transcripts", lambda tokens: ["one <two>"] * len(tokens))
    blocks = demo_page.build_page(models, 60.0, str(tmp_path))
    yield demo_page.serve(blocks, "127.0.0.1", None, share=False, max_megabytes=1.0)
    blocks.close()


@pytest.fixture
def speech(shared, tmp_path):
    """A real recording of 2 s."""
    samples, rate = soundfile.read(shared / "data/longform/audio/librivox-sonnet1.flac", stop=32000)
    soundfile.write(tmp_path / "sonnet.wav", samples, rate)
    return tmp_path / "sonnet.wav"


def test_page_shows_texts_times_and_subtitles_of_both_models(page, speech, tiny_model, monkeypatch):
    from gradio_client import Client, handle_file

    prompts, transcripts = [], Transcriber.transcripts

    def noted(self, *recordings, **prompt_options):
        prompts.append(prompt_options)
        return transcripts(self, *recordings, **prompt_options)

    monkeypatch.setattr(Transcriber, "transcripts", noted)

    client = Client(page, verbose=False)
    texts = client.predict(handle_file(speech), "en", "sonnet, <b>", api_name="/transcribe")
    tuned, tuned_table, tuned_file, base, base_table, base_file = (
        item["value"] if isinstance(item, dict) else item for item in texts
    )
    model = SpeechLLMForConditionalGeneration.from_pretrained(tiny_model)
    processor = SpeechLLMProcessor.from_pretrained(tiny_model)
    transcriber = Transcriber(model, processor, max_new_tokens=8, vad=VoiceDetector())
    assert base == transcriber.transcribe(speech, language="en", hotwords=["sonnet", "<b>"])
    assert tuned == "one <two>"
    assert prompts[:2] == [{"language": "en", "hotwords": "sonnet, <b>"}] * 2
    assert "<td>one<td>" in tuned_table and "<td>&lt;two&gt;<td>" in tuned_table
    assert "confidence" in tuned_table and "confidence" not in base_table
    for file in (tuned_file, base_file):
        assert Path(file).name == "sonnet.srt"
        assert Path(file).read_text(encoding="utf-8").startswith("1\n00:00:00,")


def test_errors_are_sentences_without_paths(page, tmp_path):
    from gradio_client import Client, handle_file
    from gradio_client.exceptions import AppError

    client = Client(page, verbose=False)
    soundfile.write(tmp_path / "long.flac", np.zeros(61 * 8000), 8000)
    (tmp_path / "text.wav").write_text("no recording", encoding="utf-8")
    for source, words, message in (
        (None, "", "Choose a file or record speech first."),
        (handle_file(tmp_path / "long.flac"), "", "long.flac: length of 61.0 s; the maximum is 60.0 s"),
        (handle_file(tmp_path / "text.wav"), "", "text.wav: not audio, or damaged"),
    ):
        with pytest.raises(AppError) as error:
            client.predict(source, "", words, api_name="/transcribe")
        assert str(error.value).startswith(message)
    soundfile.write(tmp_path / "large.wav", np.zeros(600_000), 8000)
    with pytest.raises(Exception, match="413|size"):
        client.predict(handle_file(tmp_path / "large.wav"), "", "", api_name="/transcribe")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
@pytest.mark.parametrize("width", [1280, 390])
def test_page_in_a_browser(page, speech, width):
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        tab = browser.new_page(viewport={"width": width, "height": 900})
        tab.set_default_timeout(120_000)
        foreign = []
        tab.on("request", lambda request: foreign.append(request.url) if not request.url.startswith(page) else None)
        tab.goto(page)
        button = tab.get_by_role("button", name="Transcribe", exact=True)
        button.click()
        tab.get_by_text("Choose a file or record speech first.").wait_for()
        tab.set_input_files("input[type=file]", speech)
        tab.get_by_text("0:02").wait_for()
        button.click()
        tab.locator(".times").nth(2).wait_for()  # segments and words of one model, segments of the other
        assert tab.get_by_text("Subtitles (SRT)").count() == 2
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert not [url for url in foreign if not url.startswith(("data:", "blob:"))]
        browser.close()
