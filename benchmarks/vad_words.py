"""Counts words that are lost or cut when voice detection segments long recordings; prints a JSON line for each limit.

pip install pocketsphinx
python benchmarks/vad_words.py DATA/longform --max_seconds 30 5

Word times are forced alignments of pocketsphinx, whose package includes a US English model. Recordings in other
languages are skipped. A word is lost if more than `EDGE` seconds of the word are in no segment. A word is cut if a
segment border is inside the word, at least `EDGE` seconds from both ends.
"""

import argparse
import json
import logging
import re
from pathlib import Path

from pocketsphinx import Decoder

from hf_speechllm.audio.vad import VoiceDetector
from hf_speechllm.audio.waveform import SAMPLE_RATE, load_audio
from hf_speechllm.data.bad_rows import BadRows
from hf_speechllm.data.kaldi import read_list, read_scp

FRAME = 0.01  # seconds per frame of pocketsphinx
EDGE = 0.1  # seconds; tolerance for the word borders of pocketsphinx
WORDS = {  # pronunciations that the dictionary of pocketsphinx lacks, in ARPAbet
    "woodcutters": "W UH D K AH T ER Z", "beauty's": "B Y UW T IY Z", "buriest": "B EH R IY AH S T",
    "churl": "CH ER L", "feed'st": "F IY D S T", "glutton": "G L AH T AH N", "mak'st": "M EY K S T",
    "niggarding": "N IH G ER D IH NG", "riper": "R AY P ER", "couldst": "K UH D S T", "deserv'd": "D IH Z ER V D",
    "feel'st": "F IY L S T", "ii": "T UW", "tatter'd": "T AE T ER D", "thriftless": "TH R IH F T L AH S",
    "iii": "TH R IY", "i": "W AH N", "remember'd": "R IH M EH M B ER D", "renewest": "R IH N UW AH S T",
    "unbless": "AH N B L EH S", "unear'd": "AH N IH R D", "viewest": "V Y UW AH S T",
}  # fmt: skip


def word_times(waveform, text: str) -> list[tuple[str, float, float]] | None:
    """Aligns words; returns them with start and end in seconds, or `None` if a word has no pronunciation."""
    decoder = Decoder(lm=None, loglevel="FATAL", beam=1e-80, wbeam=1e-60, pbeam=1e-80)
    words = re.findall("[a-z](?:[a-z']*[a-z])?", text.lower().replace("’", "'"))
    for word in set(words):
        if decoder.lookup_word(word) is None:
            if word not in WORDS:
                return None
            decoder.add_word(word, WORDS[word], True)
    decoder.add_word("i(2)", WORDS["i"], True)  # the number of a sonnet
    decoder.set_align_text(" ".join(words))
    decoder.start_utt()
    decoder.process_raw((waveform * 32767).astype("int16").tobytes(), full_utt=True)
    decoder.end_utt()
    return [
        (segment.word, segment.start_frame * FRAME, (segment.end_frame + 1) * FRAME)
        for segment in decoder.seg()
        if segment.word[0] not in "<["
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with wav.scp and text")
    parser.add_argument("--max_seconds", type=float, nargs="+", default=[30.0, 5.0], help="longest segment")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    texts = {entry.id: entry.value for entry in read_list(args.data / "text", BadRows()).entries}
    aligned = {}
    for entry in read_scp(args.data / "wav.scp", BadRows()).entries:
        waveform = load_audio(entry.value)
        words = word_times(waveform, texts[entry.id]) if texts[entry.id].isascii() or "’" in texts[entry.id] else None
        if words is None:
            logging.info("%s: not English; skipped", entry.id)
        else:
            aligned[entry.id] = waveform, words
    for max_seconds in args.max_seconds:
        detector = VoiceDetector(max_seconds)
        row = {"max_seconds": max_seconds, "recordings": len(aligned), "words": 0, "segments": 0, "longest": 0.0}
        row |= {"lost": [], "cut": []}
        for name, (waveform, words) in aligned.items():
            spans = [(start / SAMPLE_RATE, end / SAMPLE_RATE) for start, end in detector.segments(waveform)]
            row["words"] += len(words)
            row["segments"] += len(spans)
            row["longest"] = max(row["longest"], round(max(end - start for start, end in spans), 3))
            for word, start, end in words:
                covered = sum(max(0.0, min(end, last) - max(start, first)) for first, last in spans)
                place = f"{name} {word} {start:.2f}-{end:.2f}"
                if end - start - covered > EDGE:
                    row["lost"].append(place)
                if any(start + EDGE < border < end - EDGE for span in spans for border in span):
                    row["cut"].append(place)
        print(json.dumps(row))


if __name__ == "__main__":
    main()
