"""Runs the core tests with given versions of the dependencies, in a new virtual environment.

    python tools/test_versions.py                               # the newest versions that setup.py allows
    python tools/test_versions.py --oldest                      # the versions in tools/oldest.txt
    python tools/test_versions.py transformers==5.25.0          # one release, inside or outside its range
    python tools/test_versions.py --pre transformers peft       # their newest releases, pre-releases included
    python tools/test_versions.py --newest                      # the newest releases, without upper bounds

Arguments after `--` are passed to pytest: `-- -x -k resume`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
INSTALL = ("-m", "pip", "install", "-qq", "--disable-pip-version-check")
# Prints the installed dependencies of the package with their versions, as JSON.
LIST_DEPENDENCIES = """
import json, re
from importlib import metadata
names = {re.match(r"[\\w.-]+", item)[0] for item in metadata.requires("hf_speechllm")}
installed = {item.metadata["Name"].lower().replace("_", "-"): item.version for item in metadata.distributions()}
print(json.dumps({name: installed[name] for name in sorted(names & set(installed))}))
"""


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "requirements", nargs="*", metavar="REQUIREMENT", help="pip requirement; replaces the declared range"
    )
    parser.add_argument("--oldest", action="store_true", help="install the versions of tools/oldest.txt")
    parser.add_argument("--newest", action="store_true", help="install the newest release of every dependency")
    parser.add_argument("--pre", action="store_true", help="allow pre-releases for REQUIREMENTs and --newest")
    own, pytest_arguments = sys.argv[1:], []
    if "--" in own:
        own, pytest_arguments = own[: own.index("--")], own[own.index("--") + 1 :]
    arguments = parser.parse_args(own)
    if arguments.oldest and (arguments.newest or arguments.pre):
        parser.error("--oldest excludes --newest and --pre")
    if arguments.pre and not (arguments.newest or arguments.requirements):
        parser.error("--pre needs --newest or REQUIREMENTs, such as --pre transformers")
    arguments.pytest_arguments = pytest_arguments
    return arguments


def main() -> int:
    """Builds the environment, prints the versions in it, and returns the exit status of pytest."""
    arguments = parse_arguments()
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    environment.pop("PYTHONPATH", None)
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        # Extensions of DeepSpeed are built for one torch release.
        environment["TORCH_EXTENSIONS_DIR"] = str(Path(folder, "extensions"))
        python = str(Path(folder, "Scripts" if os.name == "nt" else "bin", "python"))

        def run(*command: str, **options) -> subprocess.CompletedProcess:
            return subprocess.run([python, *command], cwd=REPOSITORY, env=environment, text=True, **options)

        def dependencies() -> dict[str, str]:
            return json.loads(run("-c", LIST_DEPENDENCIES, check=True, stdout=subprocess.PIPE).stdout)

        constraints = ["--constraint", "tools/oldest.txt"] if arguments.oldest else []
        run(*INSTALL, *constraints, "--editable", ".[test,deepspeed]", check=True)
        # A second step: in one step pip would refuse versions outside the ranges. In two steps it only warns.
        requirements = [*(dependencies() if arguments.newest else ()), *arguments.requirements]
        if requirements:
            run(*INSTALL, "--upgrade", *(["--pre"] if arguments.pre else []), *requirements, check=True)
        print(
            "core tests with " + ", ".join(f"{name} {version}" for name, version in dependencies().items()), flush=True
        )
        return run("-m", "pytest", "-m", "core and not slow", *arguments.pytest_arguments).returncode


if __name__ == "__main__":
    raise SystemExit(main())
