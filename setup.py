# SPDX-License-Identifier: Apache-2.0
"""What setup.cfg can't say: recipes, launch files and tools stay at the top of the tree and are installed in igae."""

from pathlib import Path

from setuptools import find_packages, setup

LAUNCH = sorted(f"launch/{path.name}" for path in (Path(__file__).parent / "launch").iterdir() if path.is_dir())
INSTALLED = {f"igae.{folder.replace('/', '.')}": folder for folder in ("configs", "data_tools", "launch", *LAUNCH)}
FILES = [
    "py.typed",
    "**/*.pyi",
    "**/*.cu",
    "**/*.cuh",
    "models/demo-autoencoder/*",
    "export/card.md",
    "viewer/report/page.*",
]

setup(
    packages=[*find_packages(include=["igae", "igae.*"]), *INSTALLED],
    package_dir=INSTALLED,
    package_data={"igae": FILES, **{name: ["*"] for name in INSTALLED}},
)
