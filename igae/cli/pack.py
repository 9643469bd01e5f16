# SPDX-License-Identifier: Apache-2.0
"""Packs scenes and natural images into tar shards, or verifies packed shards. See docs/data-format.md."""

import argparse
import logging
import os
import typing
from collections.abc import Sequence

import yaml

import igae.data as data  # imports torch with the first name that is taken from it
from igae.errors import Parser, command, counted, log_to_stderr, redact, say

SHOWN = 20


def parse_categories(texts: Sequence[str] | None) -> dict[str, tuple[int, int]] | None:
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


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = Parser(description=__doc__)
    parser.add_argument("--scenes", help="folder or zip file of the scenes, or any fsspec URL of one")
    parser.add_argument("--subset", help="folder inside --scenes that has the scenes' folders, such as square128")
    parser.add_argument(
        "--categories",
        action="append",
        metavar="'NAME: [START, STOP]'",
        help="scenes of dataset_map.json to pack; may be repeated; default: all",
    )
    parser.add_argument("--format", choices=list(data.formats()), help="of the scenes; default: by content")
    parser.add_argument(
        "--convention",
        choices=typing.get_args(data.Convention),
        help="of the scenes' matrices; default: as their format has it",
    )
    parser.add_argument(
        "--normalize",
        choices=typing.get_args(data.Normalize),
        default="auto",
        help="move and scale cameras so that what all look at is in the box: auto (default) where the format does not "
        "say that it is there; none: leave all cameras as they are",
    )
    parser.add_argument(
        "--heldout",
        choices=typing.get_args(data.HeldOut),
        default="auto",
        help="which tenth of a scene's views is held out; auto (default): what the source lists, else every tenth, the "
        "first tenth of igae-data",
    )
    parser.add_argument("--images", help="folder of natural images (searched recursively)")
    parser.add_argument("--output", help="folder or fsspec URL that the shards and manifest.json are written to")
    parser.add_argument("--resize", type=positive, metavar="N", help="bring images of other sizes to N x N pixels")
    parser.add_argument(
        "--fit",
        choices=typing.get_args(data.Fit),
        default="refuse",
        help="what --resize does with views that are not square: refuse them (default), crop the largest centered "
        "square, or pad with a transparent border",
    )
    parser.add_argument("--shard-size", type=parse_size, default="500MB", help="default 500MB; a scene is never split")
    parser.add_argument("--seed", type=int, default=0, help="seed of the order inside the shards")
    parser.add_argument("--workers", type=positive, default=len(os.sched_getaffinity(0)), help="default: all cores")
    parser.add_argument(
        "--skip-bad", action="store_true", help="leave bad scenes and natural images out, and list them"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace packed data in --output")
    parser.add_argument("--verify", metavar="DIR", help="read packed data again and compare it with its manifest")
    return parser


@command
def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 verification found something, 2 nothing was done, 130 interrupted."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    log_to_stderr()
    logging.getLogger("igae").setLevel(logging.INFO)
    if arguments.verify:
        return _verify(arguments.verify, arguments.workers)
    if not arguments.output or not (arguments.scenes or arguments.images):
        parser.error("give --output and --scenes, --images or both; or --verify DIR")
    try:
        return _pack(arguments)
    except data.Refused as error:
        _report(error.problems, SHOWN)
        say("error: nothing was packed; mend the input, or leave these out with --skip-bad")
        return 2
    except KeyboardInterrupt:
        say("error: interrupted; the same command continues with the shards that are left")
        return 130


def _pack(arguments: argparse.Namespace) -> int:
    options = {key: value for key, value in vars(arguments).items() if key not in ("output", "verify")}
    options["categories"] = parse_categories(arguments.categories)
    manifest, left_out = data.pack(arguments.output, data.PackOptions(**options))
    height, width = manifest.image_size
    print(
        f"{redact(arguments.output)}: {counted(len(manifest.scenes), 'scene')} with "
        f"{manifest.scenes.views.sum()} training and "
        f"{manifest.scenes.heldout.sum()} held-out views, {manifest.images} natural images, {width}x{height} pixels, "
        f"{len(manifest.shards)} shards, {sum(shard.bytes for shard in manifest.shards) / 1e6:.1f} MB"
    )
    if left_out:
        say(f"left out {len(left_out)}:")
        _report(left_out, len(left_out))
    return 0


def _verify(root: str, workers: int) -> int:
    problems = data.verify_packed(root, workers)
    _report(problems, len(problems))
    print(f"{redact(root)}: {'damaged' if problems else 'every shard is as the manifest says'}")
    return 1 if problems else 0


def _report(problems: Sequence[str], shown: int) -> None:
    """Prints sentences, the first of many."""
    for problem in problems[:shown]:
        say(problem)
    if len(problems) > shown:
        say(f"... and {len(problems) - shown} more")
