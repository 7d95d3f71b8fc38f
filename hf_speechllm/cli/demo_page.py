"""The page of `demo`, made with Gradio."""

from __future__ import annotations

import html
import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from ..audio.vad import VoiceDetector
from ..audio.waveform import SAMPLE_RATE, AudioError, load_audio
from ..inference.alignment import Word
from ..inference.measuring import RequestMeter
from ..inference.pieces import Transcript
from ..inference.segments import Segment
from ..inference.transcriber import Transcriber
from ..inference.word_files import cues
from ..inference.writers import srt
from ..model.languages import LANGUAGES
from .decoding import load_model

logger = logging.getLogger(__name__)

SEGMENT_SECONDS = 30.0  # longest segment, as the default of `decode --vad_max_seconds`
WAITING = 20  # number of jobs in the queue; more are refused
CSS = """
.times {max-height: 320px; overflow-y: auto; margin-bottom: 12px}
.times table {width: 100%}
.times td {padding: 4px 12px 4px 0; vertical-align: top; overflow-wrap: anywhere}
.times tr + tr {border-top: 1px solid var(--border-color-primary)}
.times tr:first-child, .times td:first-child {color: var(--block-label-text-color)}
.times td:not(:nth-child(2)) {width: 1%; white-space: nowrap}
"""


def load_transcriber(name: str, device: str | None, dtype: str | None) -> Transcriber:
    """Loads a model that splits recordings into segments, and finds the times of words if there is a CTC head.

    Raises:
        OSError, ValueError: if the model or the device is not usable.
    """
    model, processor = load_model(name, device, dtype)
    vad = None
    if processor.sampling_rate == SAMPLE_RATE:
        vad = VoiceDetector(min(SEGMENT_SECONDS, RequestMeter(model.config, processor).max_seconds))
    has_head = getattr(model.config, "ctc_head_config", None) is not None
    transcriber = Transcriber(model, processor, vad=vad, word_times=has_head)
    transcriber.rehearse(name)
    return transcriber


def build_page(models: Mapping[str, Transcriber], max_seconds: float, folder: str) -> gr.Blocks:
    """Builds the page.

    Args:
        models: title and transcriber of each model, which are shown side by side.
        max_seconds: longest recording.
        folder: for subtitles.
    """

    def transcribe(path: str | None, language: str | None, hotwords: str) -> list[Any]:
        if path is None:
            raise gr.Error("Choose a file or record speech first.", duration=None, print_exception=False)
        try:
            results: list[Any] = []
            for transcriber in models.values():
                waveform = load_audio(path, transcriber.processor.sampling_rate, max_seconds)
                (transcript,) = transcriber.transcripts(waveform, language=language or None, hotwords=hotwords)
                subtitles = Path(tempfile.mkdtemp(dir=folder), f"{Path(path).stem}.srt")
                results += _outputs(transcript, subtitles)
            return results
        except (AudioError, ValueError) as error:
            message = str(error).replace(path, Path(path).name).removeprefix("recording 0: ")
            raise gr.Error(message, duration=None, print_exception=False) from None
        except RuntimeError as error:  # memory, device
            logger.exception("a recording could not be transcribed")
            message = "The model failed on this recording. The console of the command shows the reason."
            raise gr.Error(message, duration=None, print_exception=False) from error

    title = "Speech to text"
    with gr.Blocks(title=title, analytics_enabled=False) as page:
        gr.Markdown(f"# {title}")
        label = f"Recording, at most {max_seconds:g} s"
        audio = gr.Audio(sources=["upload", "microphone"], type="filepath", label=label, buttons=[])
        with gr.Row():
            languages = [("automatic", ""), *((f"{code} {name}", code) for code, name in LANGUAGES.items())]
            language = gr.Dropdown(languages, value="", label="Language", min_width=200, scale=1)
            hotwords = gr.Textbox(label="Hotwords, separated by commas", min_width=200, scale=2)
        button = gr.Button("Transcribe", variant="primary")
        outputs: list[Any] = []
        with gr.Row():
            for name in models:
                with gr.Column(min_width=300):
                    outputs += _components(name)
        button.click(transcribe, [audio, language, hotwords], outputs, api_name="transcribe")
    return page.queue(max_size=WAITING, default_concurrency_limit=1)


def _components(name: str) -> list[Any]:
    return [
        gr.Textbox(label=name, lines=3, buttons=["copy"]),
        gr.HTML(visible=False, apply_default_css=False, padding=False),
        gr.DownloadButton("Subtitles (SRT)", visible=False),
    ]


def _outputs(transcript: Transcript, subtitles: Path) -> list[Any]:
    """Returns the values of `_components`, and writes the subtitles."""
    words, segments = transcript.words, transcript.segments
    subtitles.write_text(srt(cues(words), True) if words else srt(segments), encoding="utf-8")
    tables = _table(["segment"], [(item, [item.text]) for item in segments])
    if words:
        tables += _table(["word", "confidence"], [(word, [word.text, _percent(word.confidence)]) for word in words])
    return [
        transcript.text,
        gr.HTML(tables, visible=bool(segments)),
        gr.DownloadButton(value=str(subtitles), visible=bool(transcript.text)),
    ]


def _table(headers: list[str], rows: Sequence[tuple[Segment | Word, list[str]]]) -> str:
    lines = [["time (s)", *headers]]
    lines += [[f"{item.start:.2f} - {item.end:.2f}", *map(html.escape, texts)] for item, texts in rows]
    return f'<div class="times"><table><tr><td>{"<tr><td>".join(map("<td>".join, lines))}</table></div>'


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def serve(page: gr.Blocks, host: str, port: int | None, share: bool, max_megabytes: float) -> str:
    """Starts to serve the page in threads, and returns its address.

    Raises:
        OSError: if the port is in use.
    """
    # Fonts of the system: the default theme loads fonts from a server.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    _, local, public = page.launch(
        server_name=host, server_port=port, share=share, max_file_size=round(max_megabytes * 2**20),
        theme=theme, css=CSS, footer_links=[], quiet=True, ssr_mode=False,
        prevent_thread_lock=True,
    )  # fmt: skip
    return public or local
