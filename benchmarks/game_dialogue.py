"""Writes recorded speech of 27 actors, with its text, from the game The Ur-Quan Masters (Debian packages `uqm-content`
and `uqm-voice`, CC BY-NC-SA 2.5): WAV files of up to 20 s, `wav.scp`, `text` and `utt2spk`.

    apt install uqm-content uqm-voice   # section non-free
    python benchmarks/game_dialogue.py /usr/share/games/uqm/content data/dialogue

A file has several lines of text; the game shows each as long as it is spoken, and these times cut the recording.
"""

import io
import re
import sys
import zipfile
from pathlib import Path

import soundfile

MAX_SECONDS = 20.0
ACTORS = "3dovoice/"


def entries(text: str) -> list[tuple[str, str, list[str]]]:
    """Returns key, recording and lines of each entry `#(KEY) RECORDING` of a file of dialogue."""
    found = []
    for part in re.split(r"^#\(", text, flags=re.MULTILINE)[1:]:
        head, *lines = part.splitlines()
        key, _, recording = head.partition(")")
        found.append((key, recording.strip(), [line.strip() for line in lines if line.strip()]))
    return found


def clean(lines: list[str]) -> str:
    """Returns lines as one text: without effects of the voice (*word*), and with plain quotes."""
    text = re.sub(r"\s+", " ", " ".join(lines)).replace("`", "'").replace("*", "")
    return text.strip()


def times(text: str) -> dict[str, list[float]]:
    """Returns the seconds of each line but the last, by key."""
    found = {}
    for line in text.splitlines():
        match = re.match(r"#\(([^)]*)\)\s*([\d,]+)", line)
        if match:
            found[match[1]] = [int(value) / 1000 for value in match[2].split(",") if value]
    return found


def main() -> None:
    content, output = Path(sys.argv[1]), Path(sys.argv[2])
    voice = zipfile.ZipFile(next(content.glob("addons/*voice.uqm")))
    base = zipfile.ZipFile(next(content.glob("packages/*content.uqm")))
    (output / "wav").mkdir(parents=True, exist_ok=True)
    rows, seconds, left_out, seen = [], 0.0, 0, set()
    for name in sorted(name for name in voice.namelist() if name.endswith(".ts") and name.startswith(ACTORS)):
        actor = Path(name).stem
        archive, dialogue = voice, f"{ACTORS}{actor}/{actor}.txt"
        if dialogue not in voice.namelist():
            archive, dialogue = base, f"base/comm/{actor}/{actor}.txt"
        spoken = times(voice.read(name).decode("utf-8"))
        for key, recording, lines in entries(archive.read(dialogue).decode("utf-8")):
            file = f"{ACTORS}{actor}/{recording}"
            if not recording or not lines or file not in voice.namelist() or file in seen:
                continue
            seen.add(file)
            waveform, rate = soundfile.read(io.BytesIO(voice.read(file)), dtype="float32")
            length, parts = len(waveform) / rate, spoken.get(key, [])
            parts = [*parts, length - sum(parts)]  # the file has no time for the last line
            if len(parts) != len(lines) or min(parts) <= 0:
                parts, lines = [length], [" ".join(lines)]
            start, first = 0.0, 0
            for last in range(1, len(lines) + 1):  # as many whole lines as fit
                duration = sum(parts[first:last])
                if last < len(lines) and duration + parts[last] <= MAX_SECONDS:
                    continue
                utterance = f"{actor}-{Path(recording).stem}-{first:02d}"
                text = clean(lines[first:last])
                if duration <= 1.5 * MAX_SECONDS and re.search("[A-Za-z]", text):
                    path = output / "wav" / f"{utterance}.wav"
                    piece = waveform[round(start * rate) : round((start + duration) * rate)]
                    soundfile.write(path, piece, rate)
                    rows.append((utterance, path.resolve(), text, actor))
                    seconds += len(piece) / rate
                else:
                    left_out += 1
                start, first = start + duration, last
    for name, column in (("wav.scp", 1), ("text", 2), ("utt2spk", 3)):
        (output / name).write_text("".join(f"{row[0]} {row[column]}\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} utterances, {seconds / 3600:.1f} h, {left_out} left out")


if __name__ == "__main__":
    main()
