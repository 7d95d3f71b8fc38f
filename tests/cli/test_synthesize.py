"""Synthetic speech: shards that training reads, the same for the same seed, continued after an interruption."""

import json
import os
import re
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from hf_speechllm.audio.waveform import load_audio
from hf_speechllm.cli.synthesize import lines_of
from hf_speechllm.data import speech_engines
from hf_speechllm.data.shards import read_shard, shards_of
from hf_speechllm.data.speech_engines import voices_of
from hf_speechllm.data.synthesis import Plan, clean_texts, speak
from hf_speechllm.formats.composition import train_tokenizer
from hf_speechllm.inference import text_sampling
from hf_speechllm.inference.text_sampling import sample_sentences

# Writes one second per letter at 8 kHz; the pitch depends on the voice. Fails for the text "fail".
ENGINE = """
import math, struct, sys, wave
text, voice, rate, wav = sys.argv[1:]
words = open(text, encoding="utf-8").read().strip()
if words == "fail":
    sys.exit("cannot speak")
samples = [int(9000 * math.sin(0.01 * (5 + len(voice)) * n)) for n in range(int(800 * len(words) / float(rate)))]
with wave.open(wav, "wb") as file:
    file.setnchannels(1), file.setsampwidth(2), file.setframerate(8000)
    file.writeframes(struct.pack(f"<{len(samples)}h", *samples))
"""
# Prints lists as the commands do, and records the options with which it speaks.
COMMANDS = """#!{python}
import sys
name, options = "{name}", sys.argv[1:]
if options[0] == "-lv":
    print("Voices available: kal awb_time slt ")
elif options[0] == "--voices=variant":
    print("Pty Language Gender VoiceName File\\n 5 variant --/M f1 !v/f1\\n 5 variant --/M m3 !v/m3")
elif options[0] == "--voices=mb":
    print("Pty Language Gender VoiceName File\\n 5 en-us --/M us-2 mb/mb-us2\\n 5 en --/M x mb/mb-pl1-en")
    print(" 5 de --/M d mb/mb-de1")
elif options[0] == "-q":
    sys.exit(options[2] == "mb-pl1-en")
elif options == ["--help"]:
    print("usage")
elif options[0].startswith("--voices"):
    print("Pty Language Gender VoiceName File\\n 2 en-gb --/M English gmw/en\\n 5 en-us --/M us-mbrola mb/mb-us2")
    print(" 2 en-us --/M American gmw/en-US\\n 5 variant --/M f1 !v/f1")
else:
    import shutil
    output = options[options.index({{"flite": "-o", "RHVoice-test": "-o", "piper": "-f"}}.get(name, "-w")) + 1]
    shutil.copy("{wav}", output)
    open("{log}", "a").write(" ".join([name, *options]) + "\\n")
"""


@pytest.fixture
def engine(tmp_path):
    """An option `--command` with an engine named `tone`."""
    file = tmp_path / "engine.py"
    file.write_text(ENGINE, encoding="utf-8")
    return f"tone={sys.executable} {file} {{text}} {{voice}} {{rate}} {{wav}}"


@pytest.fixture
def texts(tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("one two\n\nthree  four\n五六七\n", encoding="utf-8")
    return file


def rows_of(folder):
    return [
        item.row
        for path in sorted(folder.glob("*.tar"))
        for shard in shards_of(str(path))
        for item in read_shard(shard)
    ]


def test_shards_are_reproducible_and_continued_after_an_interruption(run, engine, texts, tmp_path):
    def make(name, *options):
        return run(
            "synthesize", "--texts", texts, "--output_dir", tmp_path / name, "--command", engine, "--engines", "tone",
            "--voices", "a", "bbb", "--num_rows", 7, "--rows_per_shard", 3, "--num_workers", 2, *options,
        )  # fmt: skip

    code, _ = make("first")
    assert not code
    rows = rows_of(tmp_path / "first")
    answers = [json.loads(row["messages"])[-1]["content"] for row in rows]
    assert answers == ["one two", "three four", "五六七"] * 2 + ["one two"]
    for row, text in zip(rows, answers, strict=True):
        seconds = len(load_audio(row["recordings"][0])) / 16000
        assert 0.1 * len(text) / 1.26 < seconds < 0.1 * len(text) / 0.79
        assert row["speech_length"] == int((1000 * seconds - 25) // 10 + 1)
    assert sorted(path.name for path in (tmp_path / "first").iterdir()) == [
        "shard-00000.tar", "shard-00001.tar", "shard-00002.tar", "synthesis.json",
    ]  # fmt: skip

    assert not make("again")[0]
    for name in ("shard-00000.tar", "shard-00001.tar", "shard-00002.tar"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()
    kept = (tmp_path / "again" / "shard-00000.tar").stat().st_mtime_ns
    (tmp_path / "again" / "shard-00001.tar").unlink()
    code, output = make("again")
    assert not code and "3 shards" in output.out and "finetune adaptor_only" in output.out
    again, first = ((tmp_path / name / "shard-00001.tar").read_bytes() for name in ("again", "first"))
    assert again == first
    assert (tmp_path / "again" / "shard-00000.tar").stat().st_mtime_ns == kept
    code, _ = make("again", "--seed", 1)
    assert "synthesis.json: the folder contains speech with other settings" in code
    assert not make("other", "--seed", 1)[0]
    assert (tmp_path / "other/shard-00000.tar").read_bytes() != (tmp_path / "first/shard-00000.tar").read_bytes()


def test_failed_rows_are_left_out_up_to_a_share(run, engine, tmp_path, caplog):
    texts = tmp_path / "texts.txt"
    texts.write_text("one\nfail\nthree\n", encoding="utf-8")
    options = ["--texts", texts, "--command", engine, "--engines", "tone", "--num_workers", 1]
    code, _ = run("synthesize", *options, "--output_dir", tmp_path / "a")
    assert "shard-00000.tar:1: tone, voice default: exit status 1: cannot speak" in code
    assert not run("synthesize", *options, "--output_dir", tmp_path / "b", "--max_bad_fraction", 0.4)[0]
    assert "1 of 3 rows are bad" in caplog.text
    assert len(rows_of(tmp_path / "b")) == 2


# Writes a recording at 16 kHz, or a wrong one, whose content is the name of the text.
WRONG_WRITER = """
import sys, wave
text, wav = open(sys.argv[1], encoding="utf-8").read().strip(), sys.argv[2]
contents = {"empty": b"", "text": b"no voice", "header": b"RIFF\\x24\\0\\0\\0WAVE", "zeros": bytes(100)}
if text in contents:
    open(wav, "wb").write(contents[text])
else:
    with wave.open(wav, "wb") as file:
        file.setnchannels(1), file.setsampwidth(2), file.setframerate(16000)
        file.writeframes(bytes(range(256)) * 125 if text != "no samples" else b"")
"""


@pytest.mark.parametrize("decoder", ["PyAV", "no PyAV"])
def test_recordings_that_an_engine_wrote_wrongly_are_failed_rows(run, tmp_path, caplog, monkeypatch, decoder):
    if decoder == "no PyAV":
        monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "engine.py").write_text(WRONG_WRITER, encoding="utf-8")
    (tmp_path / "texts.txt").write_text("good\nempty\ntext\nheader\nzeros\nno samples\n", encoding="utf-8")
    code, _ = run(
        "synthesize", "--texts", tmp_path / "texts.txt", "--engines", "writer", "--num_workers", 1, "--output_dir",
        tmp_path / "out", "--max_bad_fraction", 0.9, "--command",
        f"writer={sys.executable} {tmp_path / 'engine.py'} {{text}} {{wav}}",
    )  # fmt: skip
    assert not code and len(rows_of(tmp_path / "out")) == 1
    assert "5 of 6 rows are bad" in caplog.text
    assert caplog.text.count("writer, voice default: ") == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--engines", "nosuch"],
            "--engines nosuch: unknown engine; choose from espeak, mbrola, pico, flite, rhvoice, piper",
        ),
        (["--engines", "flite=0"], "--engines must be NAME or NAME=SHARE, with shares above 0"),
        (["--engines", "tone", "--command", "tone=x"], "--command must be NAME=COMMAND"),
        (
            ["--engines", "tone", "--command", "tone=x {wav} {name}"],
            "--command tone: 'name'; the fields are {voice}",
        ),
        (
            ["--engines", "tone", "--command", "tone=x '{wav}"],
            "--command tone: No closing quotation",
        ),
        (["--engines", "flite=1", "flite=2"], "--engines names an engine twice"),
        (["--engines", "flite", "--language", "de"], "flite has no voice for the language 'de'"),
        (["--engines", "piper"], "piper has no voice for the language 'en'"),
    ],
)
def test_wrong_engines_are_one_line(run, texts, tmp_path, options, message):
    code, _ = run("synthesize", "--texts", texts, "--output_dir", tmp_path / "out", *options)
    assert message in code and "\n" not in code


def test_missing_engine_is_named(run, texts, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _ = run("synthesize", "--texts", texts, "--output_dir", tmp_path / "out")
    assert code.endswith("--engines espeak: espeak-ng is not installed")


@pytest.mark.skipif(os.name == "nt", reason="the commands are scripts")
def test_the_commands_of_the_engines_get_voices_rates_and_pitches(make_wav, tmp_path, monkeypatch):
    log = tmp_path / "log"
    for name in ("espeak-ng", "pico2wave", "flite", "RHVoice-test", "piper"):
        values = {"python": sys.executable, "name": name, "wav": make_wav(), "log": log}
        (tmp_path / name).write_text(COMMANDS.format(**values), encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for name, speakers, code in (("a", 2, "en_US"), ("b", 1, "de_DE")):
        (tmp_path / f"{name}.onnx").touch()
        config = {"num_speakers": speakers, "language": {"code": code}}
        (tmp_path / f"{name}.onnx.json").write_text(json.dumps(config), encoding="utf-8")
    for name, language in (("slt", "English"), ("anna", "Russian")):
        (tmp_path / "voices" / name).mkdir(parents=True)
        (tmp_path / "voices" / name / "voice.info").write_text(f"name={name}\nlanguage={language}\n", encoding="utf-8")
    monkeypatch.setattr(speech_engines, "RHVOICE_FOLDERS", (str(tmp_path),))
    voices = voices_of(["espeak", "mbrola", "pico", "flite", "rhvoice", "piper"], "en", str(tmp_path))
    model = tmp_path / "a.onnx"
    assert voices == {
        "espeak": ["en-gb+f1", "en-gb+m3", "en-us+f1", "en-us+m3"],
        "mbrola": ["mb-us2"],  # of the language, and installed
        "pico": ["en-GB", "en-US"],
        "flite": ["kal", "slt"],
        "rhvoice": ["slt"],
        "piper": [f"{model}#0", f"{model}#1"],
    }
    plan = Plan(["<hello>"], 300, voices, dict(zip(voices, (0.5, 0.1, 0.1, 0.1, 0.1, 0.1), strict=True)), "p")
    chosen = [plan.choose(row) for row in range(300)]
    assert Counter(engine for engine, *_ in chosen).keys() == voices.keys()
    assert 120 < sum(engine == "espeak" for engine, *_ in chosen) < 180
    assert {voice for _, voice, *_ in chosen} == {voice for names in voices.values() for voice in names}
    factors = np.array([values for *_, rate, pitch in chosen for values in [(rate, pitch)]])
    assert factors.min() > 0.79 and factors.max() < 1.26 and (factors.std(axis=0) > 0.1).all()
    for engine in voices:
        row = next(row for row, (name, *_) in enumerate(chosen) if name == engine)
        assert len(speak(plan, row, tmp_path)) == 8000
        _, voice, rate, pitch = chosen[row]
        words = log.read_text(encoding="utf-8").splitlines()[-1].split()
        text, wav = str(tmp_path / "text.txt"), str(tmp_path / "speech.wav")
        assert words == {
            "espeak": ["espeak-ng", "-v", voice, "-s", str(round(175 * rate)), "-p", str(round(50 * pitch)),
                       "-f", text, "-w", wav],
            "mbrola": ["espeak-ng", "-v", "mb-us2", "-s", str(round(175 * rate)), "-p", str(round(50 * pitch)),
                       "-f", text, "-w", wav],
            "pico": f"pico2wave -l {voice} -w {wav} <speed level='{100 * rate:.0f}'>"
                    f"<pitch level='{100 * pitch:.0f}'>hello</pitch></speed>".split(),
            "flite": ["flite", "-voice", voice, "--setf", f"duration_stretch={1 / rate:.3f}", "--setf",
                      f"f0_shift={pitch:.3f}", "-f", text, "-o", wav],
            "rhvoice": ["RHVoice-test", "-p", "slt", "-r", f"{100 * rate:.0f}", "-t", f"{100 * pitch:.0f}",
                        "-i", text, "-o", wav],
            "piper": ["piper", "-m", str(model), "-s", voice[-1:], "--length_scale", f"{1 / rate:.3f}", "-f", wav],
        }[engine]  # fmt: skip


def test_shuffled_rows_have_the_words_of_their_text_in_another_order():
    texts = ["One, two: three - four five?", "打开客厅的灯。", "Well!", "--- ..."]
    plan = Plan(texts, 800, {"tone": ["v"]}, {"tone": 1.0}, "p", shuffled=0.3)
    said = [[plan.text(row) for row in range(first, 800, 4)] for first in range(4)]
    english, chinese = ([text for text in said[index] if text != texts[index]] for index in range(2))
    assert 40 < len(english) < 80 and len(set(english)) > 20 and 40 < len(chinese) < 80
    assert {" ".join(sorted(text.removesuffix("?").split())) for text in english} == {"One five four three two"}
    assert {"".join(sorted(text.removesuffix("。"))) for text in chinese} == {"".join(sorted("打开客厅的灯"))}
    assert all(text.endswith("?") for text in english) and all(text.endswith("。") for text in chinese)
    assert set(said[2]) == {"Well!"} and set(said[3]) == {"--- ..."}
    assert [plan.text(row) for row in range(0, 800, 4)] == said[0]


def test_rows_of_random_words_speak_words_of_the_list():
    texts, words = ["One two three.", "打开灯。"], ["alpha", "beta", "gamma"]
    plan = Plan(texts, 400, {"tone": ["v"]}, {"tone": 1.0}, "p", shuffled=0.5, words=words, random_words=0.4)
    said = [plan.text(row) for row in range(400)]
    spoken = [text.split() for text in said if set(text.split()) <= set(words)]
    assert 120 < len(spoken) < 200
    assert {len(chosen) for chosen in spoken} == {3, 4, 5, 6, 7, 8} and set(sum(spoken, [])) == set(words)
    assert 20 < sum(text in texts for text in said) < 90
    chinese = Plan(texts, 10, {"tone": ["v"]}, {"tone": 1.0}, "p", words=["天", "地"], random_words=1.0)
    assert all(set(chinese.text(row)) <= {"天", "地"} for row in range(10))


def test_replaced_words_stand_in_the_sentence_with_its_punctuation():
    texts, words = ["Don't stop, said one (of 12)!", "打开3号灯。"], ["alpha", "beta"]
    plan = Plan(texts, 400, {"t": ["v"]}, {"t": 1.0}, "p", words=words, replaced_words=0.5)
    english, chinese = ([plan.text(row) for row in range(first, 400, 2)] for first in range(2))
    assert all(re.fullmatch(r"\S+ \w+, \w+ \w+ \(\w+ 12\)!", text) for text in english)
    for position, word in enumerate(["Don't", "stop", "said", "one", "of"]):
        said = [re.findall(r"[a-zA-Z']+", text)[position] for text in english]
        assert set(said) == {word, *words} and 70 < said.count(word) < 130
    assert {text[0] for text in chinese} >= {"打", "a", "b"} and all(re.search("3.*。$", text) for text in chinese)
    everywhere = Plan(texts, 4, {"t": ["v"]}, {"t": 1.0}, "p", words=words, shuffled=1.0, replaced_words=1.0)
    assert set(re.findall("[a-zA-Z']+", everywhere.text(0))) <= set(words)


@pytest.mark.parametrize(
    "text",
    ["नमस्ते दुनिया आप कैसे हैं।", "مَرْحَبًا بِكُمْ في المدينة؟", "می\u200cخواهم کتاب.", "cafe\u0301 nai\u0308ve."],
)
def test_words_with_combining_marks_are_replaced_as_a_whole(text):
    plan = Plan([text], 50, {"t": ["v"]}, {"t": 1.0}, "p", words=["X"], replaced_words=0.5)
    *own, last = text[:-1].split()
    for said in map(plan.text, range(50)):
        assert said[-1] == text[-1] and set(said[:-1].split()) <= {"X", *own, last}
    hearts = Plan(["I \u2764\ufe0f it."], 1, {"t": ["v"]}, {"t": 1.0}, "p", words=["X"], replaced_words=1.0)
    assert hearts.text(0) == "X \u2764\ufe0f X."
    assert clean_texts([text, f"1: {text}", f"{text} {text[:-1]}"]) == [text, f"1: {text}"]


def test_words_of_languages_with_spaces_are_joined_with_spaces():
    words = ["안녕", "세계"]
    plan = Plan(
        ["안녕 하세요 세계 여러분."], 20, {"t": ["v"]}, {"t": 1.0}, "p", words=words, random_words=0.5, shuffled=0.5
    )
    said = [plan.text(row) for row in range(20)]
    assert {len(text.split()) for text in said if text.endswith(".")} == {4}
    assert all(set(text.split()) <= set(words) for text in said if not text.endswith("."))
    mixed = Plan(["x"], 200, {"t": ["v"]}, {"t": 1.0}, "p", words=["上", "海", "gute"], random_words=1.0)
    for text in (mixed.text(row) for row in range(200)):
        assert not re.search("[上海] [上海]|gutegute|[上海]g|e[上海]", text)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\xff\xfea\x00", "words.txt: 'utf-8' codec can't decode"), (b"\n \n", "words.txt: no texts")],
)
def test_unusable_lists_of_words_are_named(run, engine, texts, tmp_path, content, message):
    (tmp_path / "words.txt").write_bytes(content)
    options = ["--texts", texts, "--command", engine, "--engines", "tone", "--random_words", "1"]
    code, _ = run("synthesize", *options, "--word_list", tmp_path / "words.txt", "--output_dir", tmp_path / "out")
    assert message in code


def test_a_byte_order_mark_is_no_part_of_words_and_texts(tmp_path):
    file = tmp_path / "words.txt"
    file.write_bytes("\ufeffalpha\r\n\r\nbeta  gamma\r\n".encode())
    assert lines_of(str(file)) == ["alpha", "beta gamma"]


def test_prompts_ask_for_the_words_of_a_list(run, engine, tmp_path, monkeypatch):
    asked = []

    def sample(llm, count, clean, prompts, seed, report):
        asked.extend(prompts)
        return ["a b.", "c d."]

    monkeypatch.setattr("hf_speechllm.inference.text_sampling.sample_sentences", sample)
    (tmp_path / "words.txt").write_text("x\ny\n\n", encoding="utf-8")
    options = ["--engines", "tone", "--command", engine, "--llm", "some", "--text_prompt", "Use {word}:", "Plain"]
    run("synthesize", *options, "--word_list", tmp_path / "words.txt", "--output_dir", tmp_path / "out")
    assert sorted(asked) == ["Plain", "Plain", "Use x:", "Use y:"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--random_words", "0.5"], "--random_words, --replaced_words and {word} need --word_list"),
        (["--text_prompt", "with {word}"], "--random_words, --replaced_words and {word} need --word_list"),
        (["--text_prompt", "a"], "--text_prompt is for texts sampled from --llm"),
        (["--random_words", "1.5"], "--random_words is 1.5; it must be between 0 and 1"),
        (["--random_words", "0.6", "--shuffled_words", "0.5", "--word_list", "w"], "are more than 1 together"),
    ],
)
def test_wrong_options_of_words_are_one_line(run, texts, tmp_path, options, message):
    code, error = run("synthesize", "--texts", texts, "--output_dir", tmp_path / "out", *options)
    assert message in f"{code} {error}"


def test_a_folder_with_texts_of_other_settings_is_refused(run, tmp_path, engine):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/texts.txt").write_text("one two.\n", encoding="utf-8")
    command = ["--engines", "tone", "--command", engine, "--num_workers", "1", "--output_dir", tmp_path / "out"]
    assert not run("synthesize", "--llm", "a/model", *command)[0]
    assert not run("synthesize", "--llm", "a/model", *command)[0]
    code, _ = run("synthesize", "--llm", "b/model", *command)
    assert "texts.json: the folder contains speech with other settings" in code


def test_rows_are_augmented_reproducibly_and_texts_stay(run, engine, texts, tmp_path):
    command = ["--texts", texts, "--num_rows", "6", "--engines", "tone", "--command", engine, "--num_workers", "1"]
    noise = ["--noise_prob", "1", "--noise_source", "babble", "white", "--rows_per_shard", "3"]
    for name, options in (("clean", noise[-2:]), ("noisy", noise), ("again", noise)):
        code, _ = run("synthesize", *command, *options, "--output_dir", tmp_path / name)
        assert not code
    clean, noisy, again = (rows_of(tmp_path / name) for name in ("clean", "noisy", "again"))
    assert [row["messages"][-1] for row in noisy] == [row["messages"][-1] for row in clean]
    archives = [
        [path.read_bytes() for path in sorted((tmp_path / name).glob("*.tar"))] for name in ("clean", "noisy", "again")
    ]
    assert archives[1] == archives[2] != archives[0]
    code, output = run("synthesize", *command, "--noise_snr", "1", "2", "--output_dir", tmp_path / "x")
    assert code == 2 and "--noise_snr has no effect without --noise_prob" in output.err


def test_texts_are_clean_sentences():
    lines = [
        "and so it went. He said: \"Come in!\" Then he left, slowly. An unfinished",
        "# Title", "See https://a.b/c for more.", "He said: \"Come in!\"",
        "今天天气很好。我们走吧！好。", "No.", "x_y is a name.", ", as it were.",
    ]  # fmt: skip
    assert clean_texts(lines) == [
        "and so it went.", 'He said: "Come in!"', "Then he left, slowly.", "今天天气很好。", "我们走吧！",
    ]  # fmt: skip
    assert clean_texts(["one two three four."], max_words=3) == []


def test_sentences_are_sampled_from_a_language_model(tmp_path, monkeypatch):
    monkeypatch.setattr(text_sampling, "BATCH_SIZE", {"cpu": 4})
    monkeypatch.setattr(text_sampling, "NEW_TOKENS", 8)
    tokenizer = train_tokenizer(["one two three."] * 20, 300)
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 8,
    }
    config = Qwen3Config(vocab_size=len(tokenizer), num_key_value_heads=1, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)

    def clean(texts):
        return [text[:9] for text in texts if text]

    found = sample_sentences(str(tmp_path), 5, clean, ["one", ""], seed=3)
    assert len(set(found)) == len(found) == 5
    assert sample_sentences(str(tmp_path), 5, clean, ["one", ""], seed=3) == found
    assert sample_sentences(str(tmp_path), 5, clean, ["one", ""], seed=4) != found
    assert sample_sentences(str(tmp_path), 5, clean, ["one"], seed=3) != found
    with pytest.raises(ValueError, match="no new sentence; change --text_prompt"):
        sample_sentences(str(tmp_path), 5, lambda texts: [])
