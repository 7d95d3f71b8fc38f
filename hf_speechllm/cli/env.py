"""Print versions for bug reports: this package, its extras and dependencies, Python, system, CUDA, driver and GPUs.

hf-speechllm env
"""

import platform
import shutil
import subprocess
import sys
from importlib import metadata
from typing import Any

from ..version import __version__
from .configurations import PACKAGE, ROOT
from .parser import Parser


def main() -> None:
    """Runs the command; see the docstring of the module."""
    Parser(__doc__).parse_args()

    from packaging.requirements import Requirement

    commit = (
        "" if ROOT == PACKAGE else output("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*")
    )
    print(f"hf_speechllm: {__version__}{f', checkout {commit}' if commit else ''}")
    print(f"Python: {sys.version.split()[0]}\nsystem: {platform.platform()}, {platform.machine()}")
    package = metadata.distribution("hf_speechllm")
    requirements = [Requirement(item) for item in package.requires or ()]
    versions = {item.name: installed_version(item.name) for item in requirements}
    extras = package.metadata.get_all("Provides-Extra") or []
    complete = [extra for extra in extras if all(versions[item.name] for item in requirements if belongs(item, extra))]
    print(f"extras: {', '.join(complete) or 'none'}")
    for name, version in versions.items():
        print(f"{name}: {version or 'not installed'}")

    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    driver = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0]
    print(f"CUDA: {torch.version.cuda or 'none'}\ndriver: {driver or 'none'}\nGPUs: {', '.join(gpus) or 'none'}")


def belongs(requirement: Any, extra: str) -> bool:
    """Whether a requirement (of `packaging`) is one of an extra on this system."""
    marker = requirement.marker
    return marker is not None and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""})


def installed_version(name: str) -> str | None:
    """Returns the version of an installed package."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def output(*command: str) -> str:
    """Returns the output of a program, or an empty text if the program is missing or fails."""
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()
