# SPDX-License-Identifier: Apache-2.0
"""Data in a hub repository: packed straight from it, read there, and the commands of docs/cloud.md, by the hub's own
client and a hub on this machine."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import documents
import hub
import pytest
from scene_files import write_data

from igae.data import Manifest, PackOptions, pack

ROOT = Path(__file__).parent.parent
CODE = """
import json, sys
sys.path.insert(0, "data_tools")
import pack_shards, torch
from igae.data import DataConfig, Manifest, image_loader, view_loader

folder = sys.argv[1]
raw, there = "hf://datasets/user/raw/train", "hf://datasets/user/shards/packed"
sys.argv = ["pack_shards.py", "--scenes", raw + "/objaverse", "--subset", "square128"]
sys.argv += ["--images", raw + "/imagenet/square128"]
sys.argv += ["--output", folder + "/from-hub", "--shard-size", "20000", "--workers", "1"]
code = pack_shards.main()

def epoch(root):
    manifest = Manifest.load(root)
    config, arguments = DataConfig(root=root, shuffle=6, workers=0), {"batch_size": 4, "seed": 1, "repeat": False}
    views = view_loader(config, manifest, manifest.scenes, **arguments)
    natural_images = image_loader(config, manifest, **arguments)
    return [batch.images for batch in views] + list(natural_images)

same = all(torch.equal(one, other) for one, other in zip(epoch(there), epoch(folder + "/out"), strict=True))
try:
    Manifest.load("hf://datasets/user/raw/train")
except ValueError as error:
    missing = str(error)
print(json.dumps({"code": code, "same": same, "missing": missing}))
"""


def follow_the_page(folder: Path, environment: dict[str, str]) -> None:
    """The first two commands of docs/cloud.md (tests/test_docs.py trains), which README.md has too."""
    lines = documents.commands(ROOT / "docs" / "cloud.md")
    assert set(lines[:3]) <= set(documents.commands(ROOT / "README.md"))
    tools = {"hf": [str(Path(sys.executable).parent / "hf")], "python": [sys.executable]}
    for line in lines[:2]:
        first, *words = shlex.split(line.replace("k-kassab/igae-data", "user/raw"))
        words = [str(ROOT / word) if word.startswith("data_tools/") else word for word in words]
        command = [*tools[first], *words, *(["--workers", "1"] if first == "python" else [])]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd=folder)
        assert done.returncode == 0, done.stderr
    assert not (folder / "data/igae-data/README.md").exists()
    assert lines[2] == "igae train --config igae.yaml data.root=data/shards"


@pytest.mark.slow
def test_a_data_set_of_the_hub(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", views=(6, 3, 6), images=5)
    local = {"scenes": str(data / "scenes"), "images": str(data / "natural_images")}
    (data / "scenes" / "square16").rename(data / "scenes" / "square128")
    pack(str(tmp_path / "out"), PackOptions(**local, subset="square128", shard_size=20_000))
    manifest = Manifest.load(str(tmp_path / "out"))

    def files(folder: Path, inside: str) -> dict[str, bytes]:
        return {f"{inside}/{p.relative_to(folder)}": p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    with hub.running() as server:
        raw = files(data / "scenes", "train/objaverse") | files(data / "natural_images", "train/imagenet/square128")
        server.repos["datasets/user/raw"] = {"main": {**raw, "README.md": b"not wanted"}}
        server.repos["datasets/user/shards"] = {"main": files(tmp_path / "out", "packed")}
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(tmp_path / "hub"),
            "HF_TOKEN": "hf_test",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        command = [sys.executable, "-c", CODE, str(tmp_path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd=ROOT)
        log = list(server.log)
        follow_the_page(tmp_path, environment)
    pack(str(tmp_path / "whole"), PackOptions(**local, subset="square128"))
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "data/shards" / path.name).read_bytes() == path.read_bytes()
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["code"] == 0 and found["same"]
    assert found["missing"].startswith("no manifest.json in hf://datasets/user/raw/train: pack the data first")
    assert {path.name: path.read_bytes() for path in (tmp_path / "from-hub").iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()
    }
    # Each shard is one request of exactly its bytes; the folder is listed once by each thread that reads.
    asked = [(method, path, span) for method, path, span in log if "/user/shards/" in path]
    ranges = Counter((path.rsplit("/", 1)[-1], span) for _, path, span in asked if "/resolve/" in path)
    sizes = {shard.name: shard.bytes for shard in manifest.shards if shard.kind != "heldout"}
    sizes["manifest.json"] = (tmp_path / "out" / "manifest.json").stat().st_size
    assert ranges == {(name, f"bytes=0-{size - 1}"): 1 for name, size in sizes.items()}
    assert sum(bool(re.search(r"/tree/", path)) for _, path, _ in asked) <= 3
