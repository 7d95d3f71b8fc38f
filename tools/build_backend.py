"""Build backend: setuptools, with a flag for setup.py that marks an editable install.

An editable install has the dependencies of all recipes.
"""

import os

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403


def prepare_metadata_for_build_editable(*args, **kwargs):
    """Prepares the metadata of an editable install, as setuptools does."""
    os.environ["HF_SPEECHLLM_EDITABLE"] = "1"
    return build_meta.prepare_metadata_for_build_editable(*args, **kwargs)


def build_editable(*args, **kwargs):
    """Builds an editable install, as setuptools does."""
    os.environ["HF_SPEECHLLM_EDITABLE"] = "1"
    return build_meta.build_editable(*args, **kwargs)
