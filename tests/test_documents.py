"""The documents name tests, files, headings and options that exist."""

import dataclasses
import re
from pathlib import Path

import pytest
from transformers import TrainingArguments

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/results/README.md")]
DOCUMENTS += sorted((ROOT / "docs").rglob("*.md"))
FOLDERS = ("hf_speechllm", "recipes", "benchmarks", "tools", "tests", "accelerate_configs")
FILES = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".sh", ".yaml")]
FILES += [ROOT / "setup.py"]
# Files of FunASR, DeepSpeed and the first layout, and a placeholder.
FOREIGN_FILES = {"finetune.sh", "zero_to_fp32.py", "layouts.py", "cli/VERB.py"}
FOREIGN_OPTIONS = {"char", "standalone", "nproc_per_node"}  # options of compute-wer and torchrun


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
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


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
