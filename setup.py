"""For tools that still ask for a setup.py; the metadata and the dependencies are in pyproject.toml."""

from setuptools import setup

setup()
