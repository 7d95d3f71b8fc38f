"""The kinds of findings: severity, threshold, reason and advice. The one place for thresholds of the checks."""

from __future__ import annotations

from typing import NamedTuple

ERROR, WARNING, NOTE = SEVERITIES = ("error", "warning", "note")


class Kind(NamedTuple):
    """A kind of finding.

    Args:
        severity: `error`: training on the row does harm, or is impossible; `warning`: probably a fault; `note`: a fact
            to know.
        limit: threshold; `None` if the check has no number.
        unit: unit and meaning of the threshold.
        reason: why it is a fault, with the source of the threshold.
        advice: what to do.
    """

    severity: str
    limit: float | None
    unit: str
    reason: str
    advice: str


REMOVE = "remove the row"
CORRECT = "correct the transcript"
AGAIN = "record or export the recording again, or remove the row"

KINDS: dict[str, Kind] = {
    # Rows.
    "bad-row": Kind(ERROR, None, "", "training refuses the row", "correct the row; the detail says how"),
    "unpaired-id": Kind(ERROR, None, "", "a recording without a transcript, or the reverse", "complete both lists"),
    "empty-transcript": Kind(ERROR, None, "", "training refuses an empty answer", "write a transcript, or " + REMOVE),
    "duplicate-id": Kind(ERROR, None, "", "scores and lists need one row per ID", "give each row its own ID"),
    # Recordings.
    "missing-recording": Kind(ERROR, None, "", "training stops at the row", "correct the path, or " + REMOVE),
    "truncated-recording": Kind(ERROR, None, "", "the file is shorter than its header says", "copy the file again"),
    "unreadable-recording": Kind(ERROR, None, "", "no decoder reads the file", AGAIN),
    "wrong-times": Kind(ERROR, None, "", "the part is not inside the recording", "correct the times"),
    "too-short": Kind(ERROR, 0.1, "s, shortest", "shorter than the shortest word; real digits have 0.14 s", REMOVE),
    "too-long": Kind(ERROR, 600, "s, longest; with a model, the limit of its encoder", "does not fit the encoder, or "
                     "a GPU", "cut at pauses (PATH#t=START,END)"),
    "long-recording": Kind(WARNING, 60, "s, longest usual", "speech models are trained on up to 30 s; a batch of "
                           "240 s holds few such rows", "cut at pauses (PATH#t=START,END)"),
    "silent": Kind(ERROR, -80, "dBFS, lowest peak", "3 steps of 16 bits: no signal", REMOVE),
    "low-level": Kind(WARNING, -50, "dBFS, lowest level of speech", "less than 8 of 16 bits are used; the quietest "
                      "of 5,000 real recordings has -48 dBFS", "record with more gain"),
    "no-speech": Kind(ERROR, 0.3, "lowest peak of Silero VAD's speech probability", "silence or noise with a "
                      "transcript teaches the model to invent text; at least 0.58 in 4,285 real recordings, at most "
                      "0.2 in synthetic noise", REMOVE),
    "steady-signal": Kind(ERROR, 4, "dB between quiet and loud frames, least", "a tone or noise; speech has at least "
                          "4.8 dB, nearly always above 15 dB", REMOVE),
    "white-noise": Kind(ERROR, 0.8, "largest spectral flatness", "samples of wrong byte order or type; at most 0.69 "
                        "in real speech", "convert the file again with the right sample format"),
    "long-silence": Kind(WARNING, 5, "s without speech at the start, the end or inside, longest", "wastes GPU time, "
                         "and often means missing speech", "cut the silence off (PATH#t=START,END)"),
    "clipped": Kind(WARNING, 0.001, "share of samples in flat runs at the peak, largest; or flat waves",
                    "overdriven input, or a beep; 0 in 5,000 real recordings", "record with less gain"),
    "dc-offset": Kind(WARNING, 0.02, "of full scale, largest mean", "a faulty sound card; at most 0.005 in real "
                      "recordings", "subtract the mean, or replace the sound card"),
    "hum": Kind(WARNING, -22, "dB, highest level of a constant tone below speech (below 70 Hz: 8 dB less)",
                "mains hum or whistling", "filter the recording"),
    "dropouts": Kind(WARNING, 1, "gaps of at least 10 ms inside sound", "lost packets or buffers; none in 5,000 real "
                     "recordings", AGAIN),
    "repeated-sound": Kind(WARNING, 0.015, "s that are the same samples again, longest", "a buffer was written twice; "
                           "recorded sound never repeats exactly", AGAIN),
    "cut-speech": Kind(WARNING, 0.025, "share of the rows that start or end at most 12 dB below speech, largest",
                       "a word is cut off, and its transcript is not", "cut at pauses, or correct the transcript"),
    "dead-channel": Kind(WARNING, None, "50 dB below the loudest channel", "averaging the channels halves the level",
                         "keep the channel with signal"),
    "inverted-channel": Kind(WARNING, -0.8, "correlation of the channels, lowest", "averaging cancels the speech; "
                             "then only one channel is used", "invert or remove a channel"),
    "unrelated-channels": Kind(WARNING, 0.2, "correlation of the channels over shifts of 25 ms, lowest", "different "
                               "speakers or microphones in each; averaging mixes them", "make one row per channel"),
    "narrow-band": Kind(WARNING, 5600, "Hz, lowest bandwidth of a file with 16 kHz or more", "telephone speech, or "
                        "upsampled from 8 or 11 kHz; 55 dB weaker above", "use the original, or keep it if the "
                        "model shall transcribe telephone speech"),
    "reduced-band": Kind(NOTE, 6500, "Hz, lowest full bandwidth", "lossy codec, or upsampled", "use the original"),
    "low-sampling-rate": Kind(NOTE, 16000, "Hz, rate of the model's features", "nothing above half the rate",
                              "mix with wide-band recordings if the model shall transcribe both"),
    "unusual-sampling-rate": Kind(WARNING, 0.05, "share of the rows with this rate, largest", "rows from another "
                                  "source, or a wrong header", "listen: speech at the wrong speed has a wrong header"),
    # Transcripts.
    "no-words": Kind(ERROR, None, "", "no letter and no digit", CORRECT),
    "wrong-column": Kind(ERROR, None, "", "the text is a file name, ID, speaker, number of seconds or missing value",
                         "take the column of the transcripts"),
    "replacement-character": Kind(ERROR, None, "", "characters were lost in a conversion", CORRECT),
    "mojibake": Kind(ERROR, None, "", "UTF-8 was read in another encoding", "read and write the list as UTF-8"),
    "control-character": Kind(WARNING, None, "", "not text", CORRECT),
    "line-break": Kind(WARNING, None, "", "a tab or a line end inside: perhaps two fields or rows joined", CORRECT),
    "invisible-character": Kind(WARNING, None, "", "changes the tokens, but not what is seen", CORRECT),
    "not-normalized": Kind(WARNING, None, "", "other bytes for the same text (Unicode NFC) have other tokens",
                           "write the list in NFC"),
    "full-width": Kind(WARNING, None, "", "full-width letters have other tokens", "write the list in NFKC"),
    "mixed-script": Kind(WARNING, None, "", "a word of two alphabets: look-alike letters", CORRECT),
    "markup": Kind(WARNING, None, "", "the model learns to write markup", "remove tags and entities"),
    "annotation": Kind(WARNING, None, "", "the model learns to write <unk> or [noise]", "remove the mark, or the row"),
    "url": Kind(WARNING, None, "", "nobody says https://", "write what is said"),
    "emoji": Kind(WARNING, None, "", "not said", CORRECT),
    "repetition": Kind(WARNING, 4, "equal words or phrases in a row, fewest", "a loop of a speech recogniser; the "
                       "model learns to repeat", CORRECT),
    "long-word": Kind(WARNING, 40, "letters, longest word", "missing spaces", CORRECT),
    "odd-spaces": Kind(NOTE, None, "", "two spaces, or a space that is not U+0020, or _: other tokens", CORRECT),
    "odd-quotes": Kind(NOTE, None, "", "doubled or lone quotes of a CSV", "read the CSV with its quotes"),
    "digits": Kind(WARNING, None, "", "the prompt asks for words (no text normalisation)", "write numbers as words, "
                   "or use the prompt with normalisation"),
    "many-tokens": Kind(WARNING, 2, "tokens per character, largest", "characters that the tokenizer does not know; "
                        "real text has at most 1", CORRECT),
    "unknown-token": Kind(WARNING, None, "", "the tokenizer loses a character", CORRECT),
    "wrong-language": Kind(ERROR, None, "", "the prompt or the row names a language of another script", "correct the "
                           "language or the transcript"),
    # Recording and transcript.
    "too-much-text": Kind(ERROR, 12, "syllables per second, most", "people say 4 to 8 (Pellegrino et al. 2011); the "
                          "recording is cut, or the transcript is another's", CORRECT),
    "too-little-text": Kind(WARNING, 0.8, "syllables per second of speech, fewest", "the transcript is cut, or "
                            "another's", CORRECT),
    "unusual-pace": Kind(WARNING, 3, "robust standard deviations from the other rows, most", "text and duration do "
                         "not fit: wrong or cut transcript, or wrong sampling rate", "listen"),
    "wrong-speech-length": Kind(ERROR, 3, "frames of 10 ms, largest difference", "batches are planned with the "
                                "lengths in the rows", "prepare the list again"),
    "wrong-text-length": Kind(ERROR, 0, "tokens, largest difference; without a model, more tokens than bytes",
                              "batches are planned with the lengths in the rows", "prepare the list again"),
    "shifted-transcripts": Kind(ERROR, 10, "nats by which a shift by 1 to 3 rows explains the durations of "
                                "neighbouring rows better, beyond the logarithm of the number of trials, most",
                                "the lists are out of step", "join the lists by ID"),
    "high-loss": Kind(WARNING, 5, "robust standard deviations above the median loss per token, most", "the model "
                      "hears something else: probably a wrong transcript; at least 1 nat", "listen"),
    # Rows compared with other rows.
    "duplicate-recording": Kind(WARNING, None, "", "the row counts twice", REMOVE),
    "near-duplicate": Kind(WARNING, 0.8, "correlation of the second differences at 8 kHz, lowest", "the same "
                           "recording with other gain, codec or padding (0.88 or more; two takes: 0.67)", REMOVE),
    "conflicting-transcripts": Kind(ERROR, None, "", "one recording, two transcripts", "keep the right row"),
    "overlapping-parts": Kind(WARNING, 0.1, "s, longest overlap", "parts of a file that share sound", "correct times"),
    "recording-in-two-splits": Kind(ERROR, None, "", "the score on a recording seen in training means nothing",
                                    "remove it from training"),
    "file-in-two-splits": Kind(WARNING, None, "", "parts of one file in training and test", "split by file"),
    "text-in-two-splits": Kind(WARNING, 24, "letters (Chinese, Japanese, Korean: a third), shortest", "an LLM "
                               "remembers sentences: the score is too good", "remove the row from training"),
    "speaker-in-two-splits": Kind(WARNING, None, "", "the score is too good for other speakers", "split by speaker"),
    "repeated-text": Kind(WARNING, 0.02, "share of the rows with one transcript, largest, if most texts are unique",
                          "a default value, or a wrong join of lists", "listen to some of the rows"),
    "speaker-spelling": Kind(WARNING, None, "", "one speaker under two names ends up in two splits", "use one name"),
    "missing-speaker": Kind(NOTE, None, "", "the row may end up in another split than its speaker", "add the speaker"),
    "prompt-mismatch": Kind(WARNING, None, "", "validation asks with another prompt than training",
                            "use one prompt"),
    "rare-prompt": Kind(NOTE, 0.01, "share of the rows with this prompt, largest", "a mistyped prompt", "use one"),
    "unusual-script": Kind(WARNING, 0.05, "share of the rows in this script, largest", "another language, or "
                           "transliterated", "correct the transcript, or name the language in the prompt"),
    "unusual-language": Kind(WARNING, 0.05, "share of the rows that are not English, largest", "another language",
                             "correct the transcript, or name the language in the prompt"),
    "unusual-case": Kind(WARNING, 0.05, "share of the rows with this case, largest", "the model learns two styles",
                         "write all transcripts in one style"),
    "unusual-punctuation": Kind(NOTE, 0.05, "share of the rows without, or with, a final mark, largest",
                                "the model learns two styles", "write all transcripts in one style"),
}  # fmt: skip


def severity(kind: str) -> str:
    """Returns the severity of a kind."""
    return KINDS[kind].severity


def limit(kind: str) -> float:
    """Returns the threshold of a kind."""
    value = KINDS[kind].limit
    assert value is not None, kind
    return value
