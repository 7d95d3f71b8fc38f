"""The documents name tests, files, headings, options and messages that exist; the reference equals the code."""

import dataclasses
import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from transformers import TrainingArguments

ROOT = Path(__file__).parents[1]
READMES = [ROOT / "README.md", ROOT / "README_zh.md"]
DOCUMENTS = [
    ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "benchmarks/results/README.md")
]
DOCUMENTS += READMES
DOCUMENTS += sorted((ROOT / "docs").rglob("*.md"))
FOLDERS = ("hf_speechllm", "recipes", "benchmarks", "tools", "tests", "accelerate_configs")
FILES = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".sh", ".yaml")]
FILES += [ROOT / "setup.py"]
# Files of FunASR, DeepSpeed and the first layout, and a placeholder.
FOREIGN_FILES = {"finetune.sh", "zero_to_fp32.py", "layouts.py", "cli/VERB.py"}
FOREIGN_OPTIONS = {"char", "standalone", "nproc_per_node"}  # options of compute-wer and torchrun
FOREIGN_OPTIONS |= {"nodes", "ntasks", "gpus", "requeue", "signal"}  # of Slurm
FOREIGN_OPTIONS |= {"no", "wheel", "local"}  # beginnings of --no-deps, --wheel-dir and --local-dir of pip and hf
ACTIONS = "../../actions/"  # GitHub's page of the workflows, relative to the file


def anchors(document):
    """The anchors that GitHub gives the headings of a document."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.fixture(params=DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def document(request):
    return request.param, request.param.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def words():
    """All words of the code, without the tests."""
    sources = [path for path in FILES if "tests" not in path.relative_to(ROOT).parts]
    return {word for path in sources for word in re.findall(r"\w+", path.read_text(encoding="utf-8"))}


def test_links_lead_to_files_and_headings(document):
    path, text = document
    for link in re.findall(r"\]\((?!http)([^)]+)\)", text):
        if link.startswith(ACTIONS):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_rows_of_tables_have_as_many_cells_as_their_header(document):
    """On GitHub, a pipe in code divides cells, too, unless it is escaped."""
    lines = re.sub(r"^```.*?^```", "", document[1], flags=re.M | re.S).splitlines()
    cells = [len(re.split(r"(?<!\\)\|", line)) if line.startswith("|") else None for line in lines]
    for line, before, count in zip(lines[1:], cells, cells[1:], strict=False):
        assert None in (before, count) or before == count, line


def test_named_tests_exist(document):
    for module, name in re.findall(r"`(?:tests/)?([\w/]*test_\w+\.py)::(\w+)`", document[1]):
        sources = [path.read_text(encoding="utf-8") for path in FILES if path.as_posix().endswith(f"/{module}")]
        assert any(f"\ndef {name}(" in source for source in sources), f"{module}::{name}"


def test_named_files_exist(document):
    names = ["/" + path.relative_to(ROOT).as_posix() for path in FILES]
    for name in set(re.findall(r"`([\w/]+\.(?:py|sh))`", document[1])) - FOREIGN_FILES:
        assert any(known.endswith(f"/{name}") for known in names), name


def test_named_options_exist(document, words):
    known = {field.name for field in dataclasses.fields(TrainingArguments)} | FOREIGN_OPTIONS | words
    for option in re.findall(r"(?<![\w-])--([a-z]\w*)", document[1]):
        assert option in known, option


def test_code_that_contributors_look_for_exists(words):
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for name in set(re.findall(r"`(\w*_\w+|[A-Z]\w+)(?:\(\))?`", text)) - {"load_dataset"}:
        assert name in words, name


def code_of(readme):
    """The lines of the blocks of a README, without comments and output."""
    blocks = re.findall(r"^```(?:bash|python)\n(.*?)^```", readme.read_text(encoding="utf-8"), flags=re.M | re.S)
    return [line for block in blocks for line in re.sub(r" *#.*", "", block).splitlines() if line]


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.name)
def test_readme_is_short_and_its_code_fits_80_columns(readme):
    assert len(readme.read_bytes()) <= 8192
    blocks = re.findall(r"^```\w+\n(.*?)^```", readme.read_text(encoding="utf-8"), flags=re.M | re.S)
    assert blocks and max(len(line) for block in blocks for line in block.splitlines()) <= 80


def test_both_readmes_have_the_same_code_numbers_and_links():
    english, chinese = (path.read_text(encoding="utf-8") for path in READMES)
    assert code_of(READMES[0]) == code_of(READMES[1])
    for pattern in (r"(?<=\]\()(?!README)[^)]+", r"\d[\d,.]*\d(?= %| GB)", r"(?<=\| )[\d,]+(?= \|)"):
        assert sorted(set(re.findall(pattern, english))) == sorted(set(re.findall(pattern, chinese))), pattern


def test_reference_equals_the_code():
    """After a change of options: python tools/reference.py."""
    spec = spec_from_file_location("reference", ROOT / "tools/reference.py")
    reference = module_from_spec(spec)
    spec.loader.exec_module(reference)
    pages = reference.pages()
    for path, text in pages.items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} differs; run python tools/reference.py"
    assert {*(ROOT / "docs/reference/commands").iterdir()} <= pages.keys()
    assert "| `--num_beams N` |" in pages[reference.FOLDER / "commands/decode.md"]


def test_messages_in_troubleshooting_exist():
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "hf_speechllm").rglob("*.py")]
    code = re.sub(r"\"\n +f?\"", "", "\n".join(sources))  # joins the parts of long texts
    text = (ROOT / "docs/guides/troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `([^`]+)`", text, flags=re.M)
    assert len(messages) > 20
    for message in messages:
        assert message in code or message in ("eval_cer",), message


def test_every_exit_status_in_the_code_is_documented():
    text = (ROOT / "docs/reference/environment.md").read_text(encoding="utf-8")
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "hf_speechllm").rglob("*.py"))
    for status in {*re.findall(r"sys\.exit\((\d+)\)|EXIT_STATUS = (\d+)", sources)}:
        assert f"| {''.join(status)} |" in text, status
    for name in {*re.findall(r"\"(SPEECHLLM_\w+|NO_COLOR)\"", sources)}:
        assert f"`{name}`" in text, name
