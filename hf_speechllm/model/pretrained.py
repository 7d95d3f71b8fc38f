"""Lazy imports of `formats` and `hub`, which depend on this package."""

from types import ModuleType


def formats() -> ModuleType:
    """Returns the module `formats.loading`, which loads and saves all formats."""
    from ..formats import loading

    return loading


def hub() -> ModuleType:
    """Returns the module `hub.upload`, which uploads models and processors."""
    from ..hub import upload

    return upload
