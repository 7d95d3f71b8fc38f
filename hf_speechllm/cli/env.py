"""Print versions for bug reports: this package, its dependencies, Python, system, CUDA and GPUs.

hf-speechllm env
"""

import platform
import re
import sys
from importlib import metadata

from ..version import __version__
from .parser import Parser


def main() -> None:
    Parser(__doc__).parse_args()
    print(f"hf_speechllm: {__version__}\nPython: {sys.version.split()[0]}\nsystem: {platform.platform()}")
    names = dict.fromkeys(re.split(r"[\s\[<>=!~;(]", item)[0] for item in metadata.requires("hf_speechllm") or ())
    for name in names:
        try:
            print(f"{name}: {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            print(f"{name}: not installed")

    import torch

    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    print(f"CUDA: {torch.version.cuda or 'none'}\nGPUs: {', '.join(devices) or 'none'}")
