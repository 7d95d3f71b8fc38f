"""The backend of setuptools, which tells setup.py of an editable install: a checkout needs what all recipes need."""

import os

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403


def prepare_metadata_for_build_editable(*args, **kwargs):
    """As setuptools, for a checkout."""
    os.environ["HF_SPEECHLLM_EDITABLE"] = "1"
    return build_meta.prepare_metadata_for_build_editable(*args, **kwargs)


def build_editable(*args, **kwargs):
    """As setuptools, for a checkout."""
    os.environ["HF_SPEECHLLM_EDITABLE"] = "1"
    return build_meta.build_editable(*args, **kwargs)
