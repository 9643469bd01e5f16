# SPDX-License-Identifier: Apache-2.0
"""Pictures and videos of a run, small enough to be mailed, as data URLs."""

import base64
import io
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import imageio_ffmpeg
from PIL import Image

from igae.errors import progress
from igae.evaluation import EXAMPLES
from igae.storage import own_file

T = TypeVar("T")
BROKEN = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
"""What Pillow raises of files that are no pictures."""
NEEDED, MAX_COLUMNS = ("scene", "which", "split", "metric", "value", "scenes", "near", "far", "scale"), 8
COUNT = 12  # pictures, and videos
LOSSLESS = 300_000  # larger pictures lose what is hardly seen
BUDGET = 6_000_000  # bytes of all pictures, and of all videos
WIDTH = 1600  # wider pictures are reduced
LINES = 256  # videos of more lines are reduced
ORDER = ("best", "median", "only", "worst")


@dataclass
class Medium:
    name: str
    url: str
    caption: str = ""


@dataclass
class Example:
    """A view of a scene: its pictures by what they show, and what is known of it."""

    cells: list[Medium]
    labels: dict[str, str]


def examples(folder: Path) -> list[Example]:
    """Views of the best, the median and the worst scene; those that can be read."""
    found: dict[str, Example] = {}
    paths = _own(folder, [folder / EXAMPLES / f"{name}.png" for name in ORDER])
    for path in progress("converting examples", len(paths), "files", paths):
        with suppress(*BROKEN), Image.open(path, formats=["PNG"]) as image:
            labels = {str(name): str(text) for name, text in getattr(image, "text", {}).items()}
            columns = labels.get("columns", "").split(", ")[:MAX_COLUMNS]
            width = image.width // len(columns)
            if max(width, image.height) > WIDTH or not set(NEEDED) <= labels.keys():
                continue
            colors = labels["scale"].split(", ")
            labels["scale"] = ", ".join(color for color in colors if re.fullmatch("#[0-9a-f]{6}", color))
            cells = [image.crop((i * width, 0, (i + 1) * width, image.height)) for i in range(len(columns))]
            found[path.stem] = Example(
                [Medium(name, _url(_webp(cell), "image/webp")) for name, cell in zip(columns, cells, strict=True)],
                labels,
            )
    return [found[name] for name in ORDER if name in found]


def pictures(folder: Path, budget: int = BUDGET) -> tuple[list[Medium], int]:
    """Pictures of a run, spread over its steps, the last one among them; and how many are left out."""
    steps: dict[int, list[Path]] = {}
    for path in _own(folder, (folder / "pictures").glob("[!.]*.png")):
        number = re.search(r"(\d+)$", path.stem)
        steps.setdefault(int(number[1]) if number else 0, []).append(path)
    groups = [steps[step] for step in sorted(steps, reverse=True)]
    chosen = _spread(groups, max(1, COUNT // max(map(len, groups), default=1)))
    files = {path.stem: path for group in chosen for path in group}
    found = _within(budget, files, _picture, "image/webp")
    for picture in found:
        picture.caption = caption(files[picture.name])
    return found[::-1], sum(map(len, groups)) - len(found)


def orbits(folder: Path, stages: Sequence[str], budget: int = BUDGET) -> tuple[list[Medium], int]:
    """Videos of the latest of the stages that has some, by scene; and how many of them are left out."""
    for stage in reversed(stages):
        root = folder / "orbits" / stage
        paths = _own(folder, root.rglob("[!.]*.mp4")) if stage not in ("", ".", "..") and "/" not in stage else []
        if paths:
            files = {path.relative_to(root).with_suffix("").as_posix(): path for path in paths}
            found = _within(budget, files, _video, "video/mp4")
            return found, len(paths) - len(found)
    return [], 0


def _own(folder: Path, paths: Iterable[Path]) -> list[Path]:
    """Those that are files in the folder: no pipes, and no links that lead out of it."""
    found = []
    for path in sorted(paths):
        with suppress(ValueError):
            found.append(Path(own_file(str(folder), path.relative_to(folder).as_posix())))
    return found


def _spread(items: Sequence[T], count: int) -> list[T]:
    """At most ``count`` items at equal distances, the first among them."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def _within(budget: int, files: dict[str, Path], make: Callable[[Path], bytes | None], kind: str) -> list[Medium]:
    media, total = [], 0
    some = _spread(list(files.items()), COUNT)
    for name, path in progress(f"converting to {kind.partition('/')[2]}", len(some), "files", some):
        data = make(path)
        if data is not None and total + len(data) <= budget:
            total += len(data)
            media.append(Medium(name, _url(data, kind)))
    return media


def _url(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _picture(path: Path) -> bytes | None:
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.thumbnail((WIDTH, 4 * WIDTH))
            return _webp(image)
    except BROKEN:
        return None


def _webp(image: Image.Image) -> bytes:
    for more in ({"lossless": True, "method": 1}, {"quality": 90}):
        data = io.BytesIO()
        image.convert("RGB").save(data, "WEBP", **more)
        if data.tell() <= LOSSLESS:
            break
    return data.getvalue()


def caption(path: Path) -> str:
    """What a picture shows, if its file says it."""
    with suppress(*BROKEN), Image.open(path, formats=["PNG"]) as image:
        return str(getattr(image, "text", {}).get("caption", ""))
    return ""


def _video(path: Path) -> bytes | None:
    with tempfile.TemporaryDirectory() as scratch:
        small = Path(scratch) / "small.mp4"
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-v", "error"]
        # Not what ffmpeg takes it for: a playlist would name other files.
        command += ["-f", "mov", "-protocol_whitelist", "file", "-i", f"file:{path}"]
        command += ["-an", "-vf", f"scale=-2:min(ih\\,{LINES}):flags=area", "-c:v", "libx264", "-crf", "27"]
        command += ["-pix_fmt", "yuv420p", "-movflags", "+faststart", f"file:{small}"]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=60)
            return small.read_bytes()
        except (OSError, subprocess.SubprocessError):
            return None
