"""For tools that ask for this file: everything is declared in pyproject.toml."""

from setuptools import setup

setup()
