"""Speech synthesizers that are commands: their voices for a language, and their command lines."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from .bad_rows import BadDataError

PICO_VOICES = ("de-DE", "en-GB", "en-US", "es-ES", "fr-FR", "it-IT")
RHVOICE_FOLDERS = ("/usr/share/RHVoice", "/usr/local/share/RHVoice")
RHVOICE_LANGUAGES = {
    "cs": "Czech", "en": "English", "eo": "Esperanto", "ka": "Georgian", "ky": "Kyrgyz", "mk": "Macedonian",
    "pl": "Polish", "pt": "Brazilian-Portuguese", "ru": "Russian", "sk": "Slovak", "sq": "Albanian", "tt": "Tatar",
    "uk": "Ukrainian", "uz": "Uzbek",
}  # fmt: skip
TIMEOUT = 120.0  # seconds for one row


@dataclass(frozen=True)
class Engine:
    """A speech synthesizer that is a command.

    Args:
        program: name of the command.
        voices: returns the voices for a language; an argument of `command`.
        command: returns the command line: voice, factor of the rate, factor of the pitch, text file, WAV file.
    """

    program: str
    voices: Callable[[str, str | None], list[str]]
    command: Callable[[str, float, float, str, str], list[str]]


def _table(program: str, option: str) -> list[list[str]]:
    """Returns the words of each line that a program prints for an option."""
    result = subprocess.run([program, option], capture_output=True, text=True, errors="replace", timeout=TIMEOUT)
    return [line.split() for line in result.stdout.splitlines()]


def _espeak_voices(language: str, folder: str | None) -> list[str]:
    """Returns every accent of the language with every variant; without voices that need MBROLA."""
    # Columns: priority, language, gender, name, file.
    listed = _table("espeak-ng", f"--voices={language}")[1:]
    accents = dict.fromkeys(words[1] for words in listed if not words[4].startswith(("mb/", "!v/")))
    variants = [words[4].removeprefix("!v/") for words in _table("espeak-ng", "--voices=variant")[1:]]
    return [f"{accent}+{variant}" for accent in accents for variant in variants]


def _mbrola_voices(language: str, folder: str | None) -> list[str]:
    """Returns the voices of the language, native or with an accent, whose diphones are installed."""
    listed = [words for words in _table("espeak-ng", "--voices=mb")[1:] if words[4].startswith("mb/")]
    code = {"cmn": "zh"}.get(language, language)
    voices = [words[4].removeprefix("mb/") for words in listed if words[1].partition("-")[0] == code]
    command = ["espeak-ng", "-q", "-v"]
    return [voice for voice in voices if not subprocess.run([*command, voice, "a"], capture_output=True).returncode]


def _pico_voices(language: str, folder: str | None) -> list[str]:
    _table("pico2wave", "--help")  # fails if it is not installed
    return [voice for voice in PICO_VOICES if voice.partition("-")[0] == language.partition("-")[0]]


def _flite_voices(language: str, folder: str | None) -> list[str]:
    if language.partition("-")[0] != "en":
        return []
    listed = [words for words in _table("flite", "-lv") if words[:2] == ["Voices", "available:"]]
    # Voices `*_time` only tell the time.
    return [voice for words in listed for voice in words[2:] if not voice.endswith("_time")]


def _rhvoice_voices(language: str, folder: str | None) -> list[str]:
    _table("RHVoice-test", "--help")  # fails if it is not installed
    name = RHVOICE_LANGUAGES.get(language.partition("-")[0])
    files = (file for root in RHVOICE_FOLDERS for file in sorted(Path(root).glob("voices/*/voice.info")))
    return [file.parent.name for file in files if f"language={name}" in file.read_text(encoding="utf-8").splitlines()]


def _piper_voices(language: str, folder: str | None) -> list[str]:
    """Returns MODEL#SPEAKER for every speaker of the models (`*.onnx` with `*.onnx.json`) in a folder."""
    voices = []
    for file in sorted(Path(folder).glob("*.onnx")) if folder else ():
        config = json.loads(file.with_name(f"{file.name}.json").read_text(encoding="utf-8"))
        code = str(config.get("language", {}).get("code") or config.get("espeak", {}).get("voice", ""))
        if re.split("[-_]", code)[0] == language.partition("-")[0]:
            voices += [f"{file}#{speaker}" for speaker in range(config.get("num_speakers", 1))]
    return voices


def _espeak(voice: str, rate: float, pitch: float, text: str, wav: str) -> list[str]:
    # 175 words per minute and pitch 50 of 0 to 99 are the defaults.
    values = ["-s", str(round(175 * rate)), "-p", str(min(99, round(50 * pitch)))]
    return ["espeak-ng", "-v", voice, *values, "-f", text, "-w", wav]


def _pico(voice: str, rate: float, pitch: float, text: str, wav: str) -> list[str]:
    """Pico reads rate and pitch, in percent, from markup."""
    content = " ".join(re.sub("[<>&]", " ", Path(text).read_text(encoding="utf-8")).split())
    spoken = f"<speed level='{100 * rate:.0f}'><pitch level='{100 * pitch:.0f}'>{content}</pitch></speed>"
    return ["pico2wave", "-l", voice, "-w", wav, spoken]


def _flite(voice: str, rate: float, pitch: float, text: str, wav: str) -> list[str]:
    values = ["--setf", f"duration_stretch={1 / rate:.3f}", "--setf", f"f0_shift={pitch:.3f}"]
    return ["flite", "-voice", voice, *values, "-f", text, "-o", wav]


def _rhvoice(voice: str, rate: float, pitch: float, text: str, wav: str) -> list[str]:
    values = ["-r", f"{100 * rate:.0f}", "-t", f"{100 * pitch:.0f}"]
    return ["RHVoice-test", "-p", voice, *values, "-i", text, "-o", wav]


def _piper(voice: str, rate: float, pitch: float, text: str, wav: str) -> list[str]:
    """Piper has no pitch, and reads the text from standard input; its samples differ from run to run."""
    model, speaker = voice.rsplit("#", 1)
    return ["piper", "-m", model, "-s", speaker, "--length_scale", f"{1 / rate:.3f}", "-f", wav]


ENGINES = {
    "espeak": Engine("espeak-ng", _espeak_voices, _espeak),
    "mbrola": Engine("espeak-ng", _mbrola_voices, _espeak),
    "pico": Engine("pico2wave", _pico_voices, _pico),
    "flite": Engine("flite", _flite_voices, _flite),
    "rhvoice": Engine("RHVoice-test", _rhvoice_voices, _rhvoice),
    "piper": Engine("piper", _piper_voices, _piper),
}


def voices_of(engines: Iterable[str], language: str, folder: str | None) -> dict[str, list[str]]:
    """Returns the voices of engines for a language.

    Args:
        engines: names of engines in `ENGINES`.
        language: ISO code, for example `en` or `cmn`.
        folder: folder with voices of Piper.

    Raises:
        BadDataError: if an engine is not installed or has no voice for the language.
    """
    found = {}
    for name in engines:
        program = ENGINES[name].program
        try:
            found[name] = ENGINES[name].voices(language, folder)
        except (OSError, ValueError) as error:
            missing = isinstance(error, FileNotFoundError) and error.filename == program
            reason = "is not installed" if missing else f"cannot be used: {error}"
            raise BadDataError(f"--engines {name}: {program} {reason}") from error
        if not found[name]:
            raise BadDataError(f"--engines {name}: {program} has no voice for the language {language!r}")
    return found


def fill_command(line: str, voice: str, rate: float, pitch: float, text: str, wav: str) -> list[str]:
    """Returns the words of a command of the user, with values for the fields `{voice}`, `{rate}`, ...

    Args:
        line: command line with fields.
        voice: name.
        rate, pitch: factors.
        text, wav: files.

    Raises:
        AttributeError, LookupError, ValueError: if a field is unknown, or quotation marks do not match.
    """
    values = {"voice": voice, "rate": rate, "pitch": pitch, "text": text, "wav": wav}
    return [word.format(**values) for word in shlex.split(line)]
