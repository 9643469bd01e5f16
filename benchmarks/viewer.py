#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Pictures a second of the viewer's own way: render, decode, put into the window, encode as the page gets it.

    python benchmarks/viewer.py --json viewer.json
    python benchmarks/viewer.py --model outputs/quickstart data.root=SHARDS

Without --model, models with random weights: of the quickstart's size at 64 x 64 and 128 x 128 pixels and, on a GPU, of
the published recipe's (an autoencoder of Stable Diffusion's size, 128 x 128). "at rest" is a whole picture of a
window of 1280 x 900 pixels; "moving" is what is sent while the camera moves, of fewer pixels where whole ones take too
long. The camera goes once around the object. Medians.
"""

import argparse
import contextlib
import io
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import viser

from igae.models import IGAE, AutoencoderConfig, load_autoencoder
from igae.rendering import RenderOptions
from igae.scenes import PlanesConfig
from igae.viewer.cameras import Camera, lens_of, orbit_from
from igae.viewer.drawing import ALL, RGB, arrange, draw, is_decoded, panels
from igae.viewer.session import MOVING, RESTING, scale_for
from igae.viewer.subject import Subject, open_subject

KINDS = ["quickstart-64", "quickstart-128", "published-128"]
WINDOW = (900, 1280)
LARGE: dict[str, Any] = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 16,
}
"""An autoencoder of Stable Diffusion's size."""


def made(name: str, size: int, device: torch.device) -> Subject:
    """A model with random weights and one scene."""
    if name == "quickstart":
        config, planes = AutoencoderConfig(path="demo", scale=0.5), PlanesConfig(resolution=32, features=16)
        options = RenderOptions(coarse_samples=16, fine_samples=16)
    else:
        config, planes, options = AutoencoderConfig(create=LARGE), PlanesConfig(), RenderOptions()
    model = IGAE(load_autoencoder(config), planes, options, (size, size))
    model.refresh_background()
    row = torch.randn(planes.row_shape, generator=torch.Generator().manual_seed(0))
    return Subject(f"{name}, {size} x {size}", model.to(device).eval(), ["scene"], 1.3, 49.0, lambda _: row)


def milliseconds(subject: Subject, view: str, moving: bool, frames: int, server: viser.ViserServer) -> dict[str, Any]:
    """Medians of all and of its parts, over an orbit."""
    scene, size = subject.scene(subject.names[0]), subject.image_size
    axis, center = torch.tensor([0.0, 0, 1]).double(), torch.zeros(3).double()
    way = orbit_from(Camera(subject.front(subject.names[0])[0], lens_of(subject.angle, size)), frames, axis, center)
    side, quality = MOVING if moving else RESTING
    parts: dict[str, list[float]] = {name: [] for name in ("all", "draw", "arrange", "encode")}
    scale = 1.0
    for i, camera in enumerate([*way[:3], *way]):
        times = [time.perf_counter()]

        def mark(times: list[float] = times) -> None:
            times.append(time.perf_counter())

        drawn = draw(subject.model, scene, camera.cam2world, camera.intrinsics, scale, is_decoded(view))
        shown = panels(view, drawn, scene, size)
        mark()
        sheet = arrange(shown, WINDOW, side)
        mark()
        server.scene.set_background_image(sheet.picture, format="jpeg", jpeg_quality=quality)
        mark()
        if i < 3:  # warm up; then the page knows what a picture costs
            if moving and i == 2:
                scale = scale_for(times[-1] - times[0])
            continue
        parts["all"].append(times[-1] - times[0])
        for name, start, end in zip(("draw", "arrange", "encode"), times, times[1:], strict=False):
            parts[name].append(end - start)
    row = {f"{name}_ms": round(1e3 * statistics.median(values), 2) for name, values in parts.items()}
    return {"scale": scale, "frames_per_s": round(1e3 / row["all_ms"], 1), **row}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or URL of a run, a checkpoint or an export")
    parser.add_argument("--made", nargs="+", metavar="KIND", help=f"some of {', '.join(KINDS)}; default: all on a GPU")
    parser.add_argument("--frames", type=int, default=30, help="pictures of an orbit")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the rows there too")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="with --model, e.g. data.root=SHARDS")
    args = parser.parse_args()
    device = torch.device(args.device)
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, median of {args.frames}")
    if args.model:
        subjects = [lambda: open_subject(args.model, args.overrides, device)]
    else:
        chosen = args.made or (KINDS if args.device == "cuda" else KINDS[:2])
        kinds = [(kind.split("-")[0], int(kind.split("-")[1])) for kind in chosen]
        subjects = [lambda kind=kind: made(*kind, device) for kind in kinds]
    with contextlib.redirect_stdout(io.StringIO()):
        server = viser.ViserServer(host="127.0.0.1", port=0, verbose=False)
    rows: list[dict[str, Any]] = []
    most = torch.get_num_threads()
    for build in subjects:
        subject = build()
        threads = subject.choose_threads(most)
        for view in (RGB, ALL) if not subject.model.autoencoder.is_identity else (RGB,):
            for moving in (False, True):
                row = {"model": subject.title, "view": view, "camera": "moving" if moving else "at rest"}
                row |= {"threads": threads} if args.device == "cpu" else {}
                row |= milliseconds(subject, view, moving, args.frames, server)
                if not rows:
                    print("  ".join(f"{key:>{max(13, len(str(value)))}}" for key, value in row.items()))
                print("  ".join(f"{value:>{max(13, len(key))}}" for key, value in row.items()), flush=True)
                rows.append(row)
    with contextlib.redirect_stdout(io.StringIO()):
        server.stop()
    if args.json:
        settings = {key: value for key, value in vars(args).items() if key != "json"}
        args.json.write_text(json.dumps({"device": name, "settings": settings, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
