"""Finds YAML files of the package by name or path, in a checkout or in an installed wheel."""

from __future__ import annotations

from pathlib import Path

from .parser import did_you_mean

PACKAGE = Path(__file__).resolve().parents[1]
ROOT = PACKAGE if (PACKAGE / "recipes").is_dir() else PACKAGE.parent
TRAINING, LAUNCHING = "recipes/configs", "accelerate_configs"


def find_configuration(name: str, folder: str) -> Path:
    """Returns the path of a configuration file.

    Args:
        name: path of a file; or, for a file of the package, a name without folder and suffix (`lora`, `models/tiny`)
            or the path in the project (`recipes/configs/lora.yaml`).
        folder: folder of the project that contains the named files.

    Raises:
        ValueError: if no such file exists.
    """
    if Path(name).is_file():
        return Path(name)
    for candidate in (ROOT / folder / name, ROOT / folder / f"{name}.yaml", ROOT / name):
        if candidate.is_file():
            return candidate
    names = configuration_names(folder)
    hint = did_you_mean(name, names) or f"; available names: {', '.join(names)}"
    raise ValueError(f"{name}: no such file or configuration{hint}")


def is_of_package(path: Path) -> bool:
    """Returns whether a configuration file is one of the package, not of the user."""
    return path.resolve().is_relative_to((ROOT / TRAINING).resolve())


def configuration_names(folder: str) -> list[str]:
    """Returns the names of the package's configurations in a folder of the project."""
    files = sorted((ROOT / folder).rglob("*.yaml"))
    return [file.relative_to(ROOT / folder).with_suffix("").as_posix() for file in files]
