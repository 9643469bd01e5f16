# SPDX-License-Identifier: Apache-2.0
"""Reads the material files (.mtl) of an OBJ. Colors in them are as displayed."""

import posixpath
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from object_files import BadMesh, Neighbours
from object_parts import Material, decoded, to_linear
from PIL import Image

HONORED = {"kd", "ke", "map_kd", "map_ke", "d", "tr", "map_d", "illum"}
HARMLESS = set(
    "ka ks ns ni tf sharpness map_ka map_ks map_ns map_aat map_bump bump map_kn norm map_norm refl map_refl "
    "pr pm ps pc pcr aniso anisor map_pr map_pm map_ps map_pc map_pcr map_ao".split()
)
"""How a surface reflects and refracts, and bumps in it: nothing of this is drawn."""
HARMLESS_OPTIONS = {"-blendu", "-blendv", "-texres"}


@dataclass(frozen=True)
class Picture:
    """A texture and its place: uv of the file, times scale [2], plus offset [2]."""

    image: Image.Image
    scale: NDArray[np.float64]
    offset: NDArray[np.float64]


@dataclass(frozen=True)
class ObjMaterial:
    """A material, where its textures lie, and whether the file gives it a color of its own."""

    material: Material
    base: Picture | None = None
    emission: Picture | None = None
    colored: bool = False


def text_of(data: bytes) -> str:
    """The lines of a file, ended by newlines alone. Names that are no UTF-8 are taken for Latin-1."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    return text.replace("\r\n", "\n").replace("\r", "\n").replace("\\\n", " ")


class ObjMaterials:
    """The materials of all material files that an OBJ names."""

    def __init__(self, files: Neighbours, libraries: list[str]) -> None:
        self._files = files
        self._libraries: list[str] = []
        self._described: dict[str, tuple[str, dict[str, str]]] = {}
        for given in dict.fromkeys(libraries):
            for name in [given] if self._files.has(given) else given.split():
                self._libraries.append(name)
                self._parse(name, text_of(files.get(name)))

    def _parse(self, library: str, text: str) -> None:
        values: dict[str, str] = {}
        for line in text.split("\n"):
            key, rest = [*line.split(None, 1), "", ""][:2]
            if not key or key.startswith("#"):
                continue
            if key.lower() == "newmtl":
                values = {}
                self._described.setdefault(rest.strip(), (library, values))  # the first file counts
            else:
                values[key.lower()] = rest.strip()

    def read(self, name: str | None) -> ObjMaterial:
        """The material of a name; None: none was chosen.

        Raises:
            BadMesh: there is none of that name, or it has what is not understood.
        """
        if not name:
            return ObjMaterial(Material())
        if name not in self._described:
            files = ", ".join(self._libraries) or "it names none"
            raise BadMesh(f"its material {name!r} is in no material file ({files}): add it there, or remove its usemtl")
        library, values = self._described[name]
        place = f"material {name!r} in {library}"
        if unknown := sorted(values.keys() - HONORED - HARMLESS):
            raise BadMesh(f"its {place} has {unknown[0]}, which is not supported: remove that line")
        base, emission = (self._picture(library, place, values.get(key)) for key in ("map_kd", "map_ke"))
        if "map_d" in values and values["map_d"] != values.get("map_kd"):
            raise BadMesh(f"its {place} has its alpha in another file, map_d: put it into the picture of map_Kd")
        alpha = self._alpha(place, values)
        color = _color(place, "Kd", values["kd"]) if "kd" in values else None
        # A texture, as in most programs, is shown without the factor Kd, which is often black.
        shown = np.ones(3) if color is None or base is not None else color
        glow = _color(place, "Ke", values.get("ke", "0" if emission is None else "1"))
        blended = alpha < 1 or (base is not None and base.image.getextrema()[3][0] < 255)
        material = Material(
            base=(*shown, alpha),
            base_image=None if base is None else base.image,
            emission=tuple(glow),
            emission_image=None if emission is None or not glow.any() else emission.image,
            cutoff=None if blended else 0.0,
            unlit=values.get("illum") == "0",
        )
        return ObjMaterial(material, base, emission if glow.any() else None, base is not None or color is not None)

    def _alpha(self, place: str, values: dict[str, str]) -> float:
        given = {key: _numbers(place, key, values[key], 1)[0] for key in ("d", "tr") if key in values}
        opaque, clear = given.get("d"), given.get("tr")
        if opaque is not None and clear is not None and abs(opaque + clear - 1) > 0.01:
            raise BadMesh(
                f"its {place} has d {opaque:g} and Tr {clear:g}, which contradict each other: remove one of them"
            )
        return float(opaque if opaque is not None else 1 - (clear or 0.0))

    def _picture(self, library: str, place: str, value: str | None) -> Picture | None:
        if value is None:
            return None
        changes = {"-s": np.ones(2), "-o": np.zeros(2)}
        rest = value
        while rest.startswith("-"):
            option, rest = [*rest.split(None, 1), "", ""][:2]
            if option in changes:
                numbers: list[float] = []
                while len(numbers) < 3 and _is_number([*rest.split(None, 1), ""][0]):
                    word, rest = [*rest.split(None, 1), "", ""][:2]
                    numbers.append(float(word))
                changes[option][: len(numbers)] = numbers[:2]
                continue
            word, rest = [*rest.split(None, 1), "", ""][:2]
            if option not in HARMLESS_OPTIONS and (option, word) != ("-clamp", "off"):
                raise BadMesh(f"its {place} has the texture option {option}, which is not supported: remove it")
        beside = posixpath.join(posixpath.dirname(library.replace("\\", "/")), rest)
        content = self._files.get(beside if self._files.has(beside) else rest)
        return Picture(decoded(content, repr(rest)), changes["-s"], changes["-o"])


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _numbers(place: str, key: str, value: str, count: int) -> list[float]:
    """Numbers from 0 to 1; light, Ke, may be stronger."""
    words = value.split()
    if len(words) != count or not all(map(_is_number, words)):
        raise BadMesh(f"its {place} has {key} {value}, which is not supported: write {count} numbers from 0 to 1")
    numbers = [float(word) for word in words]
    if not all(0 <= number <= (np.inf if key == "Ke" else 1.001) for number in numbers):  # rounded up
        raise BadMesh(f"its {place} has {key} {value}, which is not from 0 to 1: divide it by its largest value")
    return numbers


def _color(place: str, key: str, value: str) -> NDArray[Any]:
    """Linear RGB [3]; one number is a gray."""
    numbers = _numbers(place, key, value, 1 if len(value.split()) == 1 else 3)
    return np.broadcast_to(to_linear(numbers), 3)
