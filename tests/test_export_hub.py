# SPDX-License-Identifier: Apache-2.0
"""Exports in hub repositories, by the hub's own client and a hub on this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import hub
from test_export_faults import content

from igae.export import Export, write

ROOT = Path(__file__).parent.parent
CODE = """
import json, os, time
from diffusers import AutoencoderKL
from test_export_faults import content
from igae.export import Export, write

def fails(call):
    start = time.monotonic()
    try:
        call()
    except ValueError as error:
        return [str(error), time.monotonic() - start]

write(content(), "hf://user/chairs")
write(content(2), "hf://user/chairs@other/deep/down/")
export, other = Export("hf://user/chairs"), Export("hf://user/chairs@other/deep/down")
names, scene = [export.names, other.names], export.scene("chair-1")
weights = AutoencoderKL.from_pretrained("user/chairs").state_dict()
deep = AutoencoderKL.from_pretrained("user/chairs", revision="other", subfolder="deep/down").state_dict()
taken = fails(lambda: write(content(), "hf://user/chairs"))
missing = fails(lambda: Export("hf://user/none"))
empty = fails(lambda: Export("hf://user/chairs/deep"))
os.environ["HF_TOKEN"] = "hf_wrong"
refused = fails(lambda: write(content(), "hf://user/tables"))
own = export.model.autoencoder.net.state_dict()
print(json.dumps({
    "names": names, "row": scene.row.tolist(), "failures": [taken, missing, empty, refused],
    "equal": [all((own[name] == found[name]).all().item() for name in own) for found in (weights, deep)],
}))
"""


def test_a_hub_repository(tmp_path: Path) -> None:
    with hub.running() as server:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(tmp_path / "hub"),
            "HF_TOKEN": "hf_test",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        done = subprocess.run(
            [sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, timeout=120, cwd=tmp_path
        )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["names"] == [["chair-0", "chair-1", "chair-2"], ["chair-0", "chair-1"]]
    assert found["row"] == content().rows(1, 2)[0].tolist()
    assert found["equal"] == [True, True]
    says = [
        "hf://user/chairs already holds an export: choose another name, branch or folder",
        "hf://user/none has no igae.json: give the folder of a complete export",
        "hf://user/chairs/deep has no igae.json: give the folder of a complete export",
        "hf://user/tables can't be written: ",
    ]
    for (text, seconds), wanted in zip(found["failures"], says, strict=True):
        assert text.startswith(wanted) and "\n" not in text and "hf_" not in text
        assert seconds < 5
    assert server.private == {"user/chairs"} and set(server.repos) == {"user/chairs"}
    # Each export came in one commit: there is never a half of one.
    names = {"README.md", "config.json", "diffusion_pytorch_model.safetensors", "igae.json", "igae.safetensors"}
    names |= {"scenes-00000.safetensors", "scenes.json"}
    assert [set(paths) for _, paths in server.commits] == [names, {f"deep/down/{name}" for name in names}]
    # What is there is what a folder holds.
    write(content(), str(tmp_path / "local"))
    for name in names - {"README.md", "igae.json"}:
        assert server.repos["user/chairs"]["main"][name] == (tmp_path / "local" / name).read_bytes()
    card = server.repos["user/chairs"]["main"]["README.md"].decode()
    assert 'AutoencoderKL.from_pretrained("user/chairs")' in card and 'Export("hf://user/chairs")' in card
    card = server.repos["user/chairs"]["other"]["deep/down/README.md"].decode()
    assert 'AutoencoderKL.from_pretrained("user/chairs", revision="other", subfolder="deep/down")' in card
    assert Export(str(tmp_path / "local")).names == found["names"][0]
