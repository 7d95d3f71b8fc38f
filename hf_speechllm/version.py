"""The version of the package, where modules find it without importing the package."""

__version__ = "0.2.0"
