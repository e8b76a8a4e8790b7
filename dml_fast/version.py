"""The version of the package, which setuptools reads from this text."""

__version__ = "0.1.0"
