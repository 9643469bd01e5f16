# SPDX-License-Identifier: Apache-2.0
"""The reference of the configuration says what there is."""

from pathlib import Path
from typing import Any

import yaml

from igae.cli import reference
from igae.training import Recipe

ROOT = Path(__file__).resolve().parent.parent


def keys(settings: dict[str, Any], path: str = "") -> set[tuple[str, str]]:
    """Pairs of section and key; what is in a dictionary that is a value counts too."""
    found = set()
    for name, value in settings.items():
        found.add((path, name))
        if isinstance(value, dict):
            found |= keys(value, f"{path}.{name}".lstrip("."))
    return found


def documented() -> dict[tuple[str, str], list[str]]:
    found, section = {}, ""
    for line in (ROOT / "docs" / "configuration.md").read_text().splitlines():
        if line.startswith("## "):
            section = "" if line == "## At the top" else line.strip("# `")
        elif line.startswith("| `"):
            cells = [cell.strip() for cell in line.replace("\\|", "/").strip("|").split("|")]
            found[section, cells[0].strip("`")] = cells[1:]
    return found


def test_the_page_is_that_of_the_types() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert page == reference.text(Recipe), "run: igae reference > docs/configuration.md"


def test_keys_of_the_configurations_that_igae_ships_are_there() -> None:
    found = documented()
    sections = {section for section, _ in found} | {"train"}
    for path in (ROOT / "configs").glob("*.yaml"):
        for section, key in keys(yaml.safe_load(path.read_text())):
            inner = f"{section}.{key}".lstrip(".")
            if section in sections and inner not in sections:
                assert key == "base" or (section, key) in found, f"{path.name}: {inner}"


def test_values_and_defaults() -> None:
    found = documented()
    assert found["planes", "resolution"][:2] == ["integer, >= 2, <= 16384", "`64`"]
    assert found["train", "kernels"][:2] == ["`auto` / `cuda` / `torch`", "`auto`"]
    assert found["", "experiment"][:2] == ["text", ""]  # no default
    assert found["render", "near"][2].startswith("Distance from the camera")
    undescribed = {key for (_, key), cells in found.items() if not cells[2]}
    speak_for_themselves = {
        "outputs",
        "seed",
        "decay",
        "milestones",
        "encoder",
        "decoder",
        "mlp",
        "base_planes",
        "orbit_frames",
    }
    assert undescribed <= speak_for_themselves
