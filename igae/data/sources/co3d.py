# SPDX-License-Identifier: Apache-2.0
"""CO3D, versions 1 and 2: a category's folder has `frame_annotations.jgz` and a folder for each sequence.

The facts are those of https://github.com/facebookresearch/co3d and of PyTorch3D's cameras, whose axes are x left, y up,
z forward, with points as rows: x_camera = x_world R + T. The lists of sets, made for reconstruction from few views, are
not read.
"""

import functools
import gzip
import io
import json
import posixpath
import zlib
from collections.abc import Mapping, Sequence, Set
from typing import Any

import fsspec
import torch
from pydantic import BaseModel, FiniteFloat, PositiveInt, TypeAdapter, ValidationError

from igae.data.cameras import RIGID_TOLERANCE, is_rigid
from igae.data.sources.scene import BadInput, View
from igae.errors import redact
from igae.storage import file_system, read_input

ANNOTATIONS = "frame_annotations.jgz"
MOST_UNPACKED = 100
"""Most bytes of JSON for each byte of the file: a dozen frames have four."""
UNIT_BOX = False
Two = tuple[FiniteFloat, FiniteFloat]
Three = tuple[FiniteFloat, FiniteFloat, FiniteFloat]


class _Image(BaseModel):
    """Its path, relative to the folder above the category's, and (height, width)."""

    path: str
    size: tuple[PositiveInt, PositiveInt]


class _Mask(BaseModel):
    path: str


class _Viewpoint(BaseModel):
    R: tuple[Three, Three, Three]
    T: Three
    focal_length: Two
    principal_point: Two
    intrinsics_format: str = "ndc_norm_image_bounds"


class _Frame(BaseModel):
    frame_number: int
    image: _Image
    viewpoint: _Viewpoint | None = None
    mask: _Mask | None = None


_FRAMES = TypeAdapter(list[_Frame])


def is_scene(names: Set[str], above: Set[str]) -> bool:
    """A folder with images below one with the annotations of frames."""
    return ANNOTATIONS in above and "images" in names


def read(folder: str) -> list[View]:
    """The frames of a sequence that have a camera, in the order of their numbers."""
    fs, path = file_system(folder)
    above, _, sequence = path.rstrip("/").rpartition("/")
    file = f"{above}/{ANNOTATIONS}"
    try:
        raw = _read_annotations(fs, file, fs.ukey(file)).get(sequence, ())
    except FileNotFoundError:
        raise BadInput(f"{ANNOTATIONS} is missing: put it beside the folder of the sequence") from None
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        what = redact(str(error))
        raise BadInput(f"{ANNOTATIONS} is no readable gzip file of JSON ({what}): download it again") from None
    try:
        found = _FRAMES.validate_python(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"][1:]))
        number = raw[int(first["loc"][0])].get("frame_number")
        raise BadInput(f"{ANNOTATIONS}: {where} of frame {number}: {first['msg']}: download it again") from None
    frames = sorted((frame for frame in found if frame.viewpoint), key=lambda frame: frame.frame_number)
    if not frames:
        raise BadInput(f"{ANNOTATIONS} has no frames with a camera of {sequence}: the scene is empty")
    if any(frame.mask for frame in frames) and not all(frame.mask for frame in frames):
        number = next(frame.frame_number for frame in frames if not frame.mask)
        raise BadInput(f"{ANNOTATIONS}: frame {number} has no mask, but others have: pack without the sequence")
    return [_view(i, frame, frame.viewpoint, sequence) for i, frame in enumerate(frames) if frame.viewpoint]


# Those of a category are hundreds of MB as Python objects, and scenes come category by category: one is kept.
@functools.lru_cache(maxsize=1)
def _read_annotations(fs: fsspec.AbstractFileSystem, file: str, version: str) -> Mapping[str, Sequence[dict[str, Any]]]:
    """Sequence -> its frames. `version` changes with the file."""
    packed = read_input(fs, file)
    with gzip.GzipFile(fileobj=io.BytesIO(packed)) as unpacked:
        text = unpacked.read(MOST_UNPACKED * len(packed) + 1)
    if len(text) > MOST_UNPACKED * len(packed):
        raise ValueError(f"it becomes more than {MOST_UNPACKED} times as large")
    content = json.loads(text)
    if not isinstance(content, list) or not all(isinstance(frame, dict) for frame in content):
        raise ValueError("not a list of frames")
    sequences: dict[str, list[dict[str, Any]]] = {}
    for frame in content:
        kept = {key: frame[key] for key in _Frame.model_fields if key in frame}
        sequences.setdefault(str(frame.get("sequence_name")), []).append(kept)
    return sequences


def _view(index: int, frame: _Frame, viewpoint: _Viewpoint, sequence: str) -> View:
    file = _inside(frame.image.path, sequence)
    height, width = frame.image.size
    half = width / 2, height / 2
    if viewpoint.intrinsics_format == "ndc_norm_image_bounds":
        unit = half  # -1 to 1 from edge to edge, along both axes
    elif viewpoint.intrinsics_format == "ndc_isotropic":
        unit = (min(half), min(half))  # -1 to 1 along the shorter side
    else:
        raise BadInput(
            f"{ANNOTATIONS}: {file} has intrinsics in the format {viewpoint.intrinsics_format!r}, which is neither "
            "ndc_norm_image_bounds nor ndc_isotropic"
        )
    # NDC has x to the left and y up.
    (fl_x, cx), (fl_y, cy) = (
        (viewpoint.focal_length[i] * unit[i], half[i] - viewpoint.principal_point[i] * unit[i]) for i in range(2)
    )
    lens = (("w", width), ("h", height), ("fl_x", fl_x), ("fl_y", fl_y), ("cx", cx), ("cy", cy))
    rotation = torch.tensor(viewpoint.R, dtype=torch.float64)
    cam2world = torch.eye(4, dtype=torch.float64)
    cam2world[:3, :3] = rotation * rotation.new_tensor([-1.0, -1.0, 1.0])
    cam2world[:3, 3] = -rotation @ rotation.new_tensor(viewpoint.T)
    if not is_rigid(cam2world):
        raise BadInput(f"{ANNOTATIONS}: R of {file} is no rotation (within {RIGID_TOLERANCE:g}): download it again")
    mask = _inside(frame.mask.path, sequence) if frame.mask else None
    return View(index, file, (cam2world + 0.0).tolist(), lens, mask=mask)


def _inside(path: str, sequence: str) -> str:
    """CATEGORY/SEQUENCE/images/NAME -> images/NAME."""
    parts = path.split("/")
    if len(parts) < 3 or parts[1] != sequence or posixpath.normpath(path) != path or not path.isprintable():
        raise BadInput(f"{ANNOTATIONS}: {path!r} is not in the folder of the sequence: download it again")
    return "/".join(parts[2:])
