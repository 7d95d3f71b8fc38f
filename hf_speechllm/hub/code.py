"""The code that is published with a model in the layout of this package: for decoding and alignment, not training."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from ..version import __version__

CODE_FOLDER = "code"
PACKAGE = Path(__file__).resolve().parents[1]
COMMAND = "hf_speechllm_command"
ROOTS = ("", "__main__", "cli.main", "cli.decode", "cli.align", "inference.transcriber")


def write_code(folder: Path) -> None:
    """Writes the code for loading and decoding to `code/` in a folder, as an installable package."""
    code = folder / CODE_FOLDER
    for source in needed_files():
        target = code / PACKAGE.name / source.relative_to(PACKAGE)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
    shutil.copy(PACKAGE.with_name(f"{COMMAND}.py"), code)
    python = metadata.metadata(PACKAGE.name)["Requires-Python"]
    listed, vad = ("".join(f"    {item!r},\n" for item in requirements(extra)) for extra in ("decode", "vad"))
    (code / "pyproject.toml").write_text(
        f'[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n\n'
        f'[project]\nname = "{PACKAGE.name}"\nversion = "{__version__}"\nrequires-python = "{python}"\n'
        f"dependencies = [\n{listed}]\n\n"
        f"[project.optional-dependencies]\nvad = [\n{vad}]\n\n"
        f'[project.scripts]\nhf-speechllm = "{COMMAND}:main"\n\n'
        f'[tool.setuptools]\npy-modules = ["{COMMAND}"]\n\n'
        f'[tool.setuptools.packages.find]\ninclude = ["{PACKAGE.name}*"]\n',
        encoding="utf-8",
    )


def requirements(extra: str = "decode") -> list[str]:
    """Returns the requirements of an extra; if it is missing, all requirements of the package."""
    declared = [item.partition(";") for item in metadata.requires(PACKAGE.name) or ()]
    needed = [name.strip() for name, _, marker in declared if marker.split() == ["extra", "==", f'"{extra}"']]
    return needed or [name for name, _, marker in declared if "extra" not in marker]


def needed_files() -> list[Path]:
    """Returns the files of all modules that decoding imports, directly or in functions, and of their packages."""
    found: set[Path] = set()
    waiting = [_file_of(tuple(filter(None, root.split(".")))) for root in ROOTS]
    while waiting:
        file = waiting.pop()
        if file is None or file in found:
            continue
        found.add(file)
        package = file.parent.relative_to(PACKAGE).parts
        waiting += [_file_of(package[:depth]) for depth in range(len(package) + 1)]
        for level, module, names in _imports(ast.parse(file.read_text(encoding="utf-8"))):
            base = package[: len(package) - level + 1] + tuple(filter(None, module.split(".")))
            waiting += [_file_of(base), *(_file_of((*base, name)) for name in names)]
    return sorted(found)


def _imports(tree: ast.AST) -> Iterator[tuple[int, str, list[str]]]:
    """Yields relative imports as (number of dots, module, names), except imports for type checkers."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom) and node.level:
            yield node.level, node.module or "", [item.name for item in node.names]
        yield from _imports(node)


def _file_of(parts: tuple[str, ...]) -> Path | None:
    """Returns the file of a module or package; `None` for another name."""
    path = PACKAGE.joinpath(*parts)
    files = (path / "__init__.py", path.with_suffix(".py") if parts else path / "__init__.py")
    return next((file for file in files if file.is_file()), None)
