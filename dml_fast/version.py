"""The version of the package; setuptools reads it from this file without importing it."""

__version__ = "0.1.0"
