"""The way from the model to `formats` and `hub`, which build on it: imported at first use."""

from types import ModuleType


def formats() -> ModuleType:
    """Returns `formats.loading`, which loads and saves in all formats."""
    from ..formats import loading

    return loading


def hub() -> ModuleType:
    """Returns `hub.upload`, which publishes."""
    from ..hub import upload

    return upload
