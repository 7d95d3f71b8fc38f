"""The commands and Python blocks of README and docs run; those that need hardware or services are parsed.

A comment `<!-- not run: REASON -->` before a block, invisible to the reader, marks a block that is only parsed.
"""

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from collections import namedtuple
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import soundfile
from huggingface_hub import hf_api

from hf_speechllm import SpeechLLMForConditionalGeneration, SpeechLLMProcessor
from hf_speechllm.cli.arguments import AUTO, check_command_line
from hf_speechllm.cli.launch import split_launch_options
from hf_speechllm.cli.main import VERBS, main
from hf_speechllm.cli.plan import split_own_options
from hf_speechllm.cli.stages import find_stages
from hf_speechllm.model.chat import transcription_messages, transcription_prompt
from hf_speechllm.training.lora import add_lora

ROOT = Path(__file__).resolve().parents[1]
_spec = spec_from_file_location("reference", ROOT / "tools/reference.py")
reference = module_from_spec(_spec)
_spec.loader.exec_module(reference)

BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]+) -->\n)?```(?P<language>\w+)\n(?P<code>.*?)^```$", re.M | re.S
)
Block = namedtuple("Block", "line reason language code")
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODEL = "FunAudioLLM/Fun-ASR-Nano-2512-hf"
# Shorten runs; options of the command line override configurations.
SHORT = {
    "finetune": "--max_steps 2 --logging_steps 1 --use_cpu true --dataloader_num_workers 1 "
    "--preprocessing_num_workers 1 --disable_tqdm true --eval_max_new_tokens 4",
    "decode": "--max_new_tokens 4",
    "score": "--num_resamples 100",
}
STATUS = {"doctor": {None, 0, 1}}  # finds that the tones of the test are no speech
# Programs that blocks may name; those after the first two run only in blocks that are not run here.
PROGRAMS = {"compute-wer", "tail", "pip", "pytest", "mkdocs", "bash", "export", "[", "scontrol"}
PROGRAMS_OF_TESTS = {"compute-wer", "tail"}


def blocks(path):
    text = path.read_text(encoding="utf-8")
    matches = list(BLOCK.finditer(text))
    assert 2 * len(matches) == len(re.findall("^```", text, flags=re.M)), (
        f"{path}: a block without an end or a language"
    )
    assert sum(match["reason"] is not None for match in matches) == text.count("<!-- not run:"), path
    for match in matches:
        yield Block(text[: match.start()].count("\n") + 1, match["reason"], match["language"], match["code"])


def has_commands(path):
    return any(block.language in ("bash", "python", "json") for block in blocks(path))


def commands(code):
    """Yields the commands of a bash block as lists of words; redirections and variables are kept as words."""
    code = re.sub(r"\\\n", " ", re.sub(r"'[^']*'", lambda item: item[0].replace("\\\n", " "), code))
    for line in code.splitlines():
        for command in line.split(" && "):
            if words := shlex.split(command, comments=True):
                yield words


def verb_of(words):
    """Returns the verb of `hf-speechllm` that a command runs, and its arguments; `None` for another program."""
    for place, word in enumerate(words):
        if "hf-speechllm " in word:  # a command for another shell
            return verb_of(shlex.split(word))
        if word == "hf-speechllm":
            return words[place + 1], words[place + 2 :]
        if match := re.fullmatch(r"recipes/(\w+)\.py", word):
            (verb,) = re.findall(r'main\("(\w+)"\)', (ROOT / match[0]).read_text(encoding="utf-8"))
            return verb, words[place + 1 :]
    return None


def parse(verb, argv):
    """Parses a command line with the parser of its verb; raises SystemExit if it is wrong."""
    argv = [re.sub(r"\$\w+", "0", word) for word in argv]  # variables of the shell
    if verb == "plan":
        _, argv = split_own_options(argv)
    if verb in ("finetune", "plan"):
        _, argv = split_launch_options([word for word in argv if word != AUTO])
        if find_stages(argv) is None:
            check_command_line(argv)
    else:
        reference.parser_of(verb).parse_args(argv)


@pytest.fixture(scope="session")
def template(tiny_model, tmp_path_factory):
    """A folder with everything that the documents name; the recordings are some of the quickstart's."""
    folder, source = tmp_path_factory.mktemp("documents"), ROOT / "recipes/quickstart_data/train/text"
    lines = [line.split(maxsplit=1) for line in source.read_text(encoding="utf-8").splitlines()]
    recordings = {key: ROOT / f"recipes/quickstart_data/audio/{key}.ogg" for key, _ in lines}
    parts = {"train": lines[::60], "dev": lines[30::120], "test": lines[90::120]}
    for name, part in parts.items():
        for parent in ("data", "recipes/quickstart_data"):
            target = folder / parent / name
            target.mkdir(parents=True)
            (target / "text").write_text("".join(f"{key} {text}\n" for key, text in part), encoding="utf-8")
            (target / "wav.scp").write_text("".join(f"{key} {recordings[key]}\n" for key, _ in part), encoding="utf-8")
        rows = [
            json.dumps({"messages": transcription_messages(str(recordings[key]), transcription_prompt(), text)})
            for key, text in part
        ]
        (folder / f"data/{name}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    for name in ("near", "far", "general", "real"):
        shutil.copy(folder / "data/dev.jsonl", folder / f"data/{name}.jsonl")
    table = [f"{recordings[key]},{text}\n" for part in parts.values() for key, text in part]
    (folder / "recordings.csv").write_text("audio,text\n" + "".join(table), encoding="utf-8")
    samples, rate = soundfile.read(recordings[lines[0][0]])
    for name in ("a.wav", "b.mp3", "talk.wav", "talks/c.wav", "data/musan/noise/n.wav"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / name, samples, rate)
    (folder / "data/synthetic").mkdir()
    with tarfile.open(folder / "data/synthetic/0.tar", "w") as tar:
        for key, text in parts["train"]:
            (folder / "text.txt").write_text(text, encoding="utf-8")
            tar.add(recordings[key], f"{key}.ogg")
            tar.add(folder / "text.txt", f"{key}.txt")
    (folder / "made").mkdir()
    for name, split in (("before.txt", "test"), ("after.txt", "test"), ("dev.txt", "dev")):
        shutil.copy(folder / f"data/{split}/text", folder / "made" / name)
    for name in ("model", "init"):
        shutil.copytree(tiny_model, folder / "made" / name)
    model = SpeechLLMForConditionalGeneration.from_pretrained(tiny_model)
    add_lora(model, 2, 4, 0.0, ["q_proj"]).save_pretrained(folder / "made/lora")
    SpeechLLMProcessor.from_pretrained(tiny_model).save_pretrained(folder / "made/lora")
    return folder


@pytest.fixture
def workspace(template, tiny_model, tmp_path, monkeypatch, hub):
    """A copy of the folder as working directory, and a Hub with the base model."""
    folder = tmp_path / "workspace"
    shutil.copytree(template, folder)
    hf_api.api.create_repo(MODEL)
    hf_api.api.upload_folder(repo_id=MODEL, folder_path=tiny_model)
    monkeypatch.chdir(folder)
    return folder


def run_command(words, monkeypatch):
    """Runs a command in this process; programs of other packages in a process of their own."""
    found = verb_of(words)
    if found is None:
        assert words[0] in PROGRAMS_OF_TESTS, words
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        subprocess.run(words, check=True, env={**os.environ, "PATH": path})
        return
    verb, argv = found
    parse(verb, argv)
    monkeypatch.setattr(sys, "argv", ["hf-speechllm", verb, *argv, *SHORT.get(verb, "").split()])
    status = None
    try:
        main()
    except SystemExit as end:
        status = end.code
    assert status in STATUS.get(verb, {None, 0}), f"{shlex.join(words)}: {status}"


def outputs(found):
    """Returns what the commands of a document write, without the folder exp/."""
    options = ("--output_dir", "--output", "--output_file")
    code = "".join(block.code for block in found if block.language == "bash" and block.reason is None)
    words = [word for command in commands(code) for word in command]
    return {value.removeprefix("exp/") for option, value in zip(words, words[1:], strict=False) if option in options}


@pytest.mark.parametrize(
    "path", [path for path in DOCUMENTS if has_commands(path)], ids=lambda path: path.relative_to(ROOT).as_posix()
)
def test_blocks_run(path, request, monkeypatch):
    found = list(blocks(path))
    folder = request.getfixturevalue("workspace")
    for item in (folder / "made").iterdir():
        target = folder / "exp" / item.name
        if item.name not in outputs(found):
            target.parent.mkdir(exist_ok=True)
            item.rename(target)
    (folder / "exp").mkdir(exist_ok=True)
    if "data" in outputs(found):
        for file in (folder / "data").glob("*.jsonl"):
            file.unlink()
    names: dict = {}
    for block in found:
        place = f"{path.relative_to(ROOT)}:{block.line}"
        if block.language == "json":
            for line in block.code.splitlines():
                json.loads(line)
        elif block.language == "yaml":
            name = re.match(r"# (\S+\.yaml)\n", block.code)
            if name:
                (folder / name[1]).write_text(block.code, encoding="utf-8")
        elif block.language == "python":
            code = compile(block.code, place, "exec")
            if block.reason is None:
                exec(code, names)
        elif block.language == "bash":
            for words in commands(block.code):
                if block.reason is None:
                    run_command(words, monkeypatch)
                elif verb := verb_of(words):
                    (folder / "run.yaml").write_text("model_name_or_path: exp/model\ntrain_file: data/train.jsonl\n")
                    parse(*verb)
                else:
                    assert words[0] in PROGRAMS, f"{place}: {words}"


def test_commands_in_the_descriptions_of_verbs_are_right(workspace):
    """Commands with `...` are abbreviated."""
    checked = 0
    for verb in VERBS:
        for block in blocks(ROOT / f"docs/reference/commands/{verb}.md"):
            for words in commands(block.code):
                # Then a comment or a file.
                words = list(itertools.takewhile(lambda word: not word.startswith(("(", ">")), words))
                found = verb_of(words)
                if found and not any("..." in word for word in words):
                    parse(*found)
                    checked += 1
    assert checked > 20


def test_a_wrong_option_is_found(workspace):
    for words in ("finetune lora --lern_rate 1", "decode --model_name_or_path a --output_file b --beams 2 c.wav"):
        with pytest.raises(SystemExit):
            parse(*verb_of(["hf-speechllm", *words.split()]))
