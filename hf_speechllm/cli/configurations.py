"""The YAML files that come with the package, by name or path: from a checkout, or from the wheel, which has copies."""

from __future__ import annotations

from pathlib import Path

from .parser import did_you_mean

PACKAGE = Path(__file__).resolve().parents[1]
ROOT = PACKAGE if (PACKAGE / "recipes").is_dir() else PACKAGE.parent
TRAINING, LAUNCHING = "recipes/configs", "accelerate_configs"


def find_configuration(name: str, folder: str) -> Path:
    """The file of a configuration.

    Args:
        name: path of a file; or a name without folder or ending (`lora`, `models/tiny`), or the path in the project
            (`recipes/configs/lora.yaml`), of a file that comes with the package.
        folder: of the project, in which names are looked up.

    Raises:
        ValueError: if there is none.
    """
    if Path(name).is_file():
        return Path(name)
    for candidate in (ROOT / folder / name, ROOT / folder / f"{name}.yaml", ROOT / name):
        if candidate.is_file():
            return candidate
    known = [
        file.relative_to(ROOT / folder).with_suffix("").as_posix() for file in sorted((ROOT / folder).rglob("*.yaml"))
    ]
    hint = did_you_mean(name, known) or f"; known by name: {', '.join(known)}"
    raise ValueError(f"{name}: no such file or configuration{hint}")
