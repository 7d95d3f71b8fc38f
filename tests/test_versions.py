"""The declared version ranges of dependencies equal the versions that CI runs."""

import re
import runpy
import tomllib
from pathlib import Path

import pytest
import setuptools
import yaml

REPOSITORY = Path(__file__).resolve().parents[1]
# Libraries whose releases can break the package, because it uses their internals or undocumented behaviour.
BOUNDED = {"torch", "transformers", "accelerate", "peft", "datasets", "deepspeed"}


@pytest.fixture
def declared(monkeypatch):
    """The arguments of `setup()` in setup.py."""
    options = {}
    monkeypatch.setattr(setuptools, "setup", lambda **given: options.update(given))
    monkeypatch.chdir(REPOSITORY)
    runpy.run_path("setup.py")
    return options


@pytest.fixture
def bounds(declared):
    """The bounds of each dependency, including those for DeepSpeed: `{name: {operator: version}}`."""
    extras = declared["extras_require"]
    items = dict.fromkeys([*declared["install_requires"], *extras["all"], *extras["deepspeed"]])
    found = {}
    for item in items:
        name, specifiers = re.fullmatch(r"([\w-]+)(?:\[[\w,-]+\])?([^;]*)(?:;.*)?", item).groups()
        found[name] = dict(re.findall(r"(>=|<)([\w.]+)", specifiers))
    return found


def jobs(workflow):
    return yaml.safe_load((REPOSITORY / ".github/workflows" / workflow).read_text(encoding="utf-8"))["jobs"]


def commands(job):
    return [step["run"] for step in job["steps"] if "run" in step]


def test_oldest_versions_in_ci_equal_the_lower_bounds(bounds):
    lines = (REPOSITORY / "tools/oldest.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert pinned == {name: versions.get(">=") for name, versions in bounds.items()}


def test_libraries_that_can_break_the_package_have_upper_bounds(bounds):
    assert {name for name, versions in bounds.items() if "<" in versions} == BOUNDED


def test_python_version_equals_the_version_in_ci(declared):
    matrix = jobs("ci.yml")["all"]["strategy"]["matrix"]["python"]
    assert declared["python_requires"] == f">={matrix[0]}"
    ruff = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["ruff"]
    assert ruff["target-version"] == "py" + matrix[0].replace(".", "")
    assert f"Python {matrix[0]} or newer" in (REPOSITORY / "README.md").read_text(encoding="utf-8")


def test_workflows_run_all_tests_the_core_tests_and_the_newest_releases():
    script = (REPOSITORY / ".ci/run").read_text(encoding="utf-8").splitlines()
    assert {"pytest -n 2", "pytest tests/native -k voxtral"} <= {*script}
    assert script[-1] == "python3 tools/test_versions.py --oldest -- -n 2"
    assert commands(jobs("ci.yml")["all"]) == ["bash .ci/run"]
    core = jobs("ci.yml")["core"]
    assert commands(core) == ["python tools/test_versions.py"]
    assert core["strategy"]["matrix"]["system"] == ["macos-latest", "windows-latest"]
    weekly = jobs("weekly.yml")["core"]
    assert commands(weekly) == ["python tools/test_versions.py ${{ matrix.versions }}"]
    assert weekly["strategy"]["matrix"]["versions"] == ["--newest", "--newest --pre"]
