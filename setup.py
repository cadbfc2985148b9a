"""Which packages a wheel holds: every folder of fxsplit, and cli as fxsplit_cli. All else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["fxsplit*"]), "fxsplit_cli"], package_dir={"fxsplit_cli": "cli"})
