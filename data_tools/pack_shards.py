#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Packs scenes and natural images into tar shards, or checks packed shards. See docs/data-format.md."""

import argparse
import os
import sys
from concurrent.futures import BrokenExecutor
from pathlib import Path

import yaml

try:
    import igae.data.pack as packing
except ModuleNotFoundError as error:  # run from a source tree that is not installed
    if error.name != "igae":
        raise
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import igae.data.pack as packing

SHOWN = 20


def parse_categories(texts: list[str] | None) -> dict[str, tuple[int, int]] | None:
    """Reads `category: [start, stop]` mappings; None means all scenes."""
    if not texts:
        return None
    ranges: dict[str, tuple[int, int]] = {}
    for text in texts:
        try:
            mapping = yaml.safe_load(text)
        except yaml.YAMLError:
            mapping = None
        for category, bounds in mapping.items() if isinstance(mapping, dict) else [("", None)]:
            match category, bounds:
                case str(), [int(start), int(stop)] if 0 <= start < stop:
                    ranges[category] = (start, stop)
                case _:
                    raise ValueError(f"--categories {text!r} is not 'category: [start, stop]' with start < stop")
    return ranges


def parse_size(text: str) -> int:
    """Reads a number of bytes such as 500MB."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    number, factor = (text[:-2], units[text[-2:].upper()]) if text[-2:].upper() in units else (text, 1)
    try:
        size = int(float(number) * factor)
    except (ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 500MB")
    return size


def positive(text: str) -> int:
    """Reads a positive integer."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def main() -> int:
    """Runs the command; returns the exit code: 0 done, 1 verification found something, 2 nothing was done."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", help="folder of the scenes (with or without dataset_map.json); any fsspec URL")
    parser.add_argument("--subset", help="folder inside --scenes that has the scenes' folders, such as square128")
    parser.add_argument(
        "--categories",
        action="append",
        metavar="'NAME: [START, STOP]'",
        help="scenes of dataset_map.json to pack; may be repeated; default: all",
    )
    parser.add_argument("--images", help="folder of natural images (searched recursively)")
    parser.add_argument("--output", help="folder or fsspec URL that the shards and manifest.json are written to")
    parser.add_argument("--resize", type=positive, metavar="N", help="bring images of other sizes to N x N pixels")
    parser.add_argument("--shard-size", type=parse_size, default="500MB", help="default 500MB; a scene is never split")
    parser.add_argument("--seed", type=int, default=0, help="seed of the order inside the shards")
    parser.add_argument("--workers", type=positive, default=len(os.sched_getaffinity(0)), help="default: all cores")
    parser.add_argument(
        "--skip-bad", action="store_true", help="leave bad scenes and natural images out, and list them"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace packed data in --output")
    parser.add_argument("--verify", metavar="DIR", help="read packed data again and compare it with its manifest")
    arguments = parser.parse_args()
    if not arguments.verify and (not arguments.output or not (arguments.scenes or arguments.images)):
        parser.error("give --output and --scenes, --images or both; or --verify DIR")
    try:
        return check(arguments) if arguments.verify else pack(arguments)
    except packing.Refused as error:
        report(error.problems)
        print("error: nothing was packed; mend the input, or leave these out with --skip-bad", file=sys.stderr)
    except (ValueError, OSError, ImportError, BrokenExecutor) as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("error: interrupted; the same command goes on with the shards that are left", file=sys.stderr)
    return 2


def pack(arguments: argparse.Namespace) -> int:
    """Packs and says what there is now."""
    manifest, left_out = packing.pack(
        arguments.output,
        scenes=arguments.scenes,
        subset=arguments.subset,
        categories=parse_categories(arguments.categories),
        images=arguments.images,
        resize=arguments.resize,
        shard_size=arguments.shard_size,
        seed=arguments.seed,
        workers=arguments.workers,
        skip_bad=arguments.skip_bad,
        overwrite=arguments.overwrite,
    )
    height, width = manifest.image_size
    views = sum(scene.views for scene in manifest.scenes)
    heldout = sum(scene.heldout for scene in manifest.scenes)
    print(
        f"{arguments.output}: {len(manifest.scenes)} scenes with {views} training and {heldout} held-out views, "
        f"{manifest.images} natural images, {width}x{height} pixels, {len(manifest.shards)} shards, "
        f"{sum(shard.bytes for shard in manifest.shards) / 1e6:.1f} MB"
    )
    if left_out:
        print(f"left out {len(left_out)}:", file=sys.stderr)
        report(left_out, shown=len(left_out))
    return 0


def check(arguments: argparse.Namespace) -> int:
    """Verifies and says what is wrong."""
    problems = packing.verify(arguments.verify, arguments.workers)
    report(problems, shown=len(problems))
    print(f"{arguments.verify}: {'damaged' if problems else 'every shard is as the manifest says'}")
    return 1 if problems else 0


def report(problems: list[str], shown: int = SHOWN) -> None:
    """Prints sentences, the first of many."""
    for problem in problems[:shown]:
        print(problem, file=sys.stderr)
    if len(problems) > shown:
        print(f"... and {len(problems) - shown} more", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
