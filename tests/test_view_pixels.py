# SPDX-License-Identifier: Apache-2.0
"""What packing changes about views' pixels: masks, lens distortion, shapes, sizes, EXIF; the cameras go along."""

import io
import json
import math
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from balls import Lens, flat, lens, matrix, pack_and_look, packed, render, save, write_transforms
from PIL import ExifTags, Image
from test_formats import COUNT, POSES, pixels, refusal

from igae.data import PackOptions, pack

WIDE = (64, 96)


def write(folder: Path, of: Lens, picture, masks=None, count: int = COUNT, suffix="png", **shared) -> Path:
    """A scene `s` of `picture(index)`, with `masks(index)`."""
    frames = []
    for i in range(count):
        frames.append({"file_path": f"images/{i}.{suffix}", "transform_matrix": matrix(POSES[i])})
        exact = {"quality": 100, "subsampling": 0} if suffix == "jpg" else {}
        save(picture(i), folder / f"s/images/{i}.{suffix}", **exact)
        if masks is not None:
            save(masks(i), folder / f"s/masks/{i}.png")
            frames[i]["mask_path"] = f"masks/{i}.png"
    write_transforms(folder / "s", frames, **{**pixels(of), **shared})
    return folder


def in_a_room(index: int, of: Lens, distortion=None) -> Image.Image:
    """The balls in front of a room, which changes from view to view."""
    room = np.random.default_rng(index).integers(180, 256, (*of.size, 3), dtype=np.uint8)
    back = Image.fromarray(room).convert("RGBA")
    return Image.alpha_composite(back, render(POSES[index], of, distortion)).convert("RGB")


def mask_of(index: int, of: Lens, distortion=None) -> Image.Image:
    return render(POSES[index], of, distortion).getchannel("A")


def test_masks_become_alpha(tmp_path):
    of = lens()
    two = {"one": lambda m: np.where(m > 127, 255, 0), "bool": lambda m: np.where(m > 127, 1, 0)}
    for name, change in {"soft": lambda m: m, **two}.items():
        masks = [change(np.asarray(mask_of(i, of))).astype(np.uint8) for i in range(COUNT)]
        source = write(tmp_path / name, of, lambda i: in_a_room(i, of), lambda i, m=masks: Image.fromarray(m[i]))
        for key, view in pack_and_look(source, tolerance=0.1 if name == "soft" else 0.3).items():
            index = int(key[2:])
            wanted = masks[index] * np.uint8(255) if name == "bool" else masks[index]
            assert (view.alpha == wanted).all() and view.image.mode == "RGBA"
            assert (np.asarray(view.image)[..., :3] == np.asarray(in_a_room(index, of))).all()


def test_a_mask_does_not_show_what_is_transparent(tmp_path):
    of = lens()
    masks = Image.fromarray(np.pad(np.full((64, 32), 255, np.uint8), ((0, 0), (32, 0))))
    source = write(tmp_path / "in", of, lambda i: render(POSES[i], of), lambda i: masks, count=3)
    pack(str(tmp_path / "out"), PackOptions(scenes=str(source)))
    for key, view in packed(tmp_path / "out").items():
        alpha = np.asarray(mask_of(int(key[2:]), of))
        assert (view.alpha[:, 32:] == alpha[:, 32:]).all() and (view.alpha[:, :32] == 0).all()


def test_wrong_masks(tmp_path):
    of = lens()
    source = write(tmp_path / "in", of, lambda i: in_a_room(i, of), lambda i: mask_of(i, of), count=3)
    save(mask_of(1, of).resize((32, 32)), source / "s/masks/1.png")
    assert "the mask masks/1.png is 32x32 pixels, but images/1.png is 64x64" in refusal(source)
    (source / "s/masks/1.png").write_bytes(b"hello")
    assert "masks/1.png is no PNG" in refusal(source)
    (source / "s/masks/1.png").unlink()
    assert "masks/1.png is missing" in refusal(source)


BARREL = {"k1": -0.25, "k2": 0.06, "p1": 0.006, "p2": -0.01}
RATIONAL = {"k1": 0.3, "k2": 0.05, "k3": 0.02, "k4": 0.1, "k5": 0.08, "k6": 0.04, "p1": 0.004}
OFF = Lens(60.0, 66.0, 42.5, 35.0, WIDE)


@pytest.mark.parametrize("distortion", [BARREL, RATIONAL], ids=["barrel", "rational"])
@pytest.mark.parametrize("alpha", [True, False], ids=["alpha", "opaque"])
def test_distortion_is_undone(distortion, alpha, tmp_path):
    """A lens off the center, pixels that are not square."""
    pytest.importorskip("cv2")

    def picture(i):
        image = render(POSES[i], OFF, distortion)
        return image if alpha else flat(image)

    source = write(tmp_path / "in", OFF, picture, **distortion, camera_model="OPENCV")
    if alpha or distortion is BARREL:  # without an alpha channel what the lens has not seen is black, as balls are not
        views = pack_and_look(source)
    else:
        pack(str(tmp_path / "in-packed"), PackOptions(scenes=str(source)))
        views = packed(tmp_path / "in-packed")
    corners = [np.asarray(view.image)[0, 0] for view in views.values()]
    white = 255 if distortion is BARREL else 0
    assert {tuple(corner) for corner in corners} == {(0, 0, 0, 0) if alpha else (white,) * 3}
    wanted = np.array([[60 / 96, 0, 42.5 / 96], [0, 66 / 64, 35 / 64], [0, 0, 1]])
    assert all(np.allclose(view.intrinsics, wanted, atol=1e-12) for view in views.values())


def test_where_the_polynomial_turns_back_nothing_is_seen(tmp_path):
    """Beyond r = 1 / sqrt(3 * 0.3) the lens' model has the same pixels again."""
    pytest.importorskip("cv2")
    of = lens(30.0)
    green = Image.new("RGBA", (64, 64), (0, 200, 0, 255))
    source = write(tmp_path / "in", of, lambda i: green, count=3, k1=-0.3)
    pack(str(tmp_path / "out"), PackOptions(scenes=str(source)))
    y, x = np.mgrid[:64, :64] + 0.5 - 32
    seen = np.hypot(x, y) < 30 / math.sqrt(0.9)
    for view in packed(tmp_path / "out").values():
        assert (view.alpha[np.hypot(x, y) > 32.5] == 0).all() and (view.alpha[seen] == 255).mean() > 0.98
        turned = view.alpha[::-1, ::-1].astype(int)  # the center is that of the image, not of a pixel
        assert np.abs(turned - view.alpha).mean() < 0.5


def test_frames_have_their_own_distortion(tmp_path):
    pytest.importorskip("cv2")
    of = lens(60.0)
    kinds = [{"k1": -0.2}, {"k1": 0.15, "k2": 0.05}, {"k1": 0, "k2": 0}]
    source = write(tmp_path / "in", of, lambda i: render(POSES[i], of, kinds[i % 3]), k1=0.5, p1=0.3)
    content = json.loads((source / "s/transforms.json").read_text())
    for i, frame in enumerate(content["frames"]):
        frame.update(kinds[i % 3])
    (source / "s/transforms.json").write_text(json.dumps(content))
    views = pack_and_look(source)
    assert views["s/002"].file == (source / "s/images/2.png").read_bytes()  # nothing to undo


def test_distortion_without_opencv(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    of = lens()
    source = write(tmp_path / "in", of, lambda i: render(POSES[i], of, BARREL), count=3, **BARREL)
    problem = refusal(source)
    assert "images/0.png has lens distortion" in problem and "pip install -e '.[photos]'" in problem
    pack(str(tmp_path / "out"), PackOptions(scenes=str(write(tmp_path / "plain", of, lambda i: render(POSES[i], of)))))


@pytest.mark.parametrize("size", [(64, 96), (97, 64), (65, 96)])
@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_views_that_are_not_square(fit, size, tmp_path):
    of = Lens(80.0, 84.0, size[1] * 0.46, size[0] * 0.53, size)
    source = write(tmp_path / "in", of, lambda i: render(POSES[i], of))
    views = pack_and_look(source, resize=48, fit=fit)
    for view in views.values():
        assert view.image.size == (48, 48) and view.image.mode == "RGBA"
        side = (max if fit == "pad" else min)(size)
        assert view.intrinsics[0, 0] == pytest.approx(80 / side) and view.intrinsics[1, 1] == pytest.approx(84 / side)


def test_a_padded_border_is_transparent(tmp_path):
    of = lens(size=WIDE)
    gray = Image.new("RGB", (96, 64), (90, 90, 90))
    source = write(tmp_path / "in", of, lambda i: gray, count=3)
    pack(str(tmp_path / "out"), PackOptions(scenes=str(source), resize=96, fit="pad"))
    for view in packed(tmp_path / "out").values():
        assert (view.alpha[16:80] == 255).all() and not view.alpha[:16].any() and not view.alpha[80:].any()
        assert (np.asarray(view.image)[16:80, :, :3] == 90).all()


def test_shapes_are_refused_by_default(tmp_path):
    of = lens(size=WIDE)
    source = write(tmp_path / "in", of, lambda i: render(POSES[i], of), count=3)
    problems = refusal(source, resize=48)
    assert "images/" in problems and "96x64" in problems and "--fit crop or --fit pad" in problems
    with pytest.raises(ValueError, match="fit crop needs resize"):
        pack(str(tmp_path / "out"), PackOptions(scenes=str(source), fit="crop"))


def test_what_needs_no_change_keeps_its_bytes(tmp_path):
    of = lens()
    source = write(tmp_path / "in", of, lambda i: render(POSES[i], of), k1=0.0)
    pack(str(tmp_path / "out"), PackOptions(scenes=str(source), resize=64, fit="crop"))
    for key, view in packed(tmp_path / "out").items():
        assert view.file == (source / f"s/images/{int(key[2:])}.png").read_bytes()


def test_all_at_once(tmp_path):
    """A photograph of a room through a bent lens, wide, with masks, to a small square."""
    pytest.importorskip("cv2")
    of, (photo, mask) = OFF, (lambda i: in_a_room(i, OFF, BARREL), lambda i: mask_of(i, OFF, BARREL))
    write(tmp_path / "crop", of, photo, mask, count=6, suffix="jpg", **BARREL)
    shutil.copytree(tmp_path / "crop", tmp_path / "pad")
    for fit in ("crop", "pad"):
        for view in pack_and_look(tmp_path / fit, tolerance=0.2, resize=56, fit=fit).values():
            assert view.image.format == "PNG" and view.image.mode == "RGBA" and view.image.size == (56, 56)


def turned(image: Image.Image, orientation: int, kind: str = "JPEG") -> bytes:
    """A file whose pixels are to be turned."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    out = io.BytesIO()
    image.convert("RGB").save(out, kind, exif=exif.tobytes(), **({"quality": 100} if kind == "JPEG" else {}))
    return out.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_views_that_are_to_be_turned_are_refused(kind, tmp_path):
    of = lens()
    source = write(tmp_path / "in", of, lambda i: render(POSES[i], of), count=3)
    (source / "s/images/1.png").write_bytes(turned(render(POSES[1], of), 6, kind))
    assert "images/1.png has the EXIF orientation 6" in refusal(source)
    assert "exiftool -Orientation= FILE" in refusal(source)
    upright = turned(render(POSES[1], of), 1, kind)
    (source / "s/images/1.png").write_bytes(upright)
    pack(str(tmp_path / "out"), PackOptions(scenes=str(source)))
    assert packed(tmp_path / "out")["s/001"].file == upright


def test_natural_images_are_turned(tmp_path):
    """Stored on their side, 24 x 16; upright they are 16 x 24."""
    folder = tmp_path / "natural"
    folder.mkdir()
    pixels = np.zeros((24, 16, 3), np.uint8)
    pixels[:12, :8] = (250, 20, 20)
    right = Image.fromarray(pixels)
    plain = turned(right, 1)
    (folder / "plain.jpg").write_bytes(plain)
    for orientation, back in ((6, Image.Transpose.ROTATE_90), (8, Image.Transpose.ROTATE_270)):
        (folder / f"turned_{orientation}.jpg").write_bytes(turned(right.transpose(back), orientation))
    manifest, left_out = pack(str(tmp_path / "out"), PackOptions(images=str(folder)))
    assert manifest.image_size == (24, 16) and manifest.images == 3 and left_out == []
    with tarfile.open(tmp_path / "out/images-00000.tar") as tar:
        files = [tar.extractfile(member).read() for member in tar]
    assert files.count(plain) == 1
    for file in files:
        image = np.asarray(Image.open(io.BytesIO(file)).convert("RGB")).astype(int)
        assert image.shape == (24, 16, 3) and np.abs(image - pixels).mean() < 4
    pack(str(tmp_path / "small"), PackOptions(images=str(folder), resize=8))
    with tarfile.open(tmp_path / "small/images-00000.tar") as tar:
        for member in tar:
            image = np.asarray(Image.open(tar.extractfile(member)).convert("RGB")).astype(int)
            assert image[1, 1, 0] > 150 and image[1, 6, 0] < 60 and image[6, 1, 0] < 60


def test_a_changed_mask_is_packed_again(tmp_path):
    """Their bytes are part of what says whether a shard is still that of its input."""
    from igae.data.packing import _scan
    from igae.data.sources import find_scenes

    of = lens()
    source = write(tmp_path / "in", of, lambda i: in_a_room(i, of), lambda i: mask_of(i, of), count=3)
    (ref,) = find_scenes(str(source))[1]
    before = _scan((ref, PackOptions()), lambda _: None)
    file = source / "s/masks/1.png"
    file.write_bytes(file.read_bytes() + b"more")
    after = _scan((ref, PackOptions()), lambda _: None)
    assert after.bytes == before.bytes + 4
