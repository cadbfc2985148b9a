"""Which packages a wheel holds: every folder of fxsplit, and cli as fxsplit_cli. All else is in pyproject.toml."""

from setuptools import find_packages, setup

cli = ["fxsplit_cli", *(f"fxsplit_cli.{name}" for name in find_packages("cli"))]
setup(packages=[*find_packages(include=["fxsplit*"]), *cli], package_dir={"fxsplit_cli": "cli"})
