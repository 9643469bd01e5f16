# SPDX-License-Identifier: Apache-2.0
"""Two hosts with addresses of their own (network namespaces), started as launch/kubernetes/pytorchjob.yaml says."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import runs
import yaml

from igae import checkpoint

ROOT = Path(__file__).resolve().parent.parent
ADDRESSES = ("192.0.2.1", "192.0.2.2")  # TEST-NET-1: leads nowhere but to the other namespace
PORT = 29500
TIMEOUT = 10


def manifest() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "launch" / "kubernetes" / "pytorchjob.yaml").read_text())
    return loaded


def test_the_manifest_is_of_one_piece() -> None:
    """Numbers that belong together agree, and what is mounted is there."""
    replicas = manifest()["spec"]["pytorchReplicaSpecs"]
    machines = sum(entry["replicas"] for entry in replicas.values())
    for entry in replicas.values():
        spec = entry["template"]["spec"]
        (container,) = spec["containers"]
        numbers = dict(re.findall(r"--(num_\w+)=(\d+)", " ".join(container["args"])))
        gpus = int(container["resources"]["limits"]["nvidia.com/gpu"])
        assert numbers == {"num_machines": str(machines), "num_processes": str(machines * gpus)}
        assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in spec["volumes"]}
        assert container["name"] == "pytorch" and entry["restartPolicy"] == "OnFailure"
        assert all((ROOT / name).is_file() for name in container["command"] if "/" in name)
        assert (ROOT / "configs" / "igae.yaml").is_file()


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=30)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two namespaces, joined by a cable whose ends are `cable` in each."""
    names = [f"igae-{os.getpid()}-{end}" for end in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        pytest.skip(f"network namespaces can't be made here (root is needed): {str(reason).strip()}")
    try:
        ip("-n", names[0], "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            ip("netns", "del", name)


class Pod(threading.Thread):
    """A machine that starts its command again when it fails, as a kubelet does with `restartPolicy: OnFailure`."""

    def __init__(self, host: str, rank: int, arguments: list[str], folder: Path) -> None:
        super().__init__(daemon=True)
        self.log = folder / f"{rank}.log"
        self.codes: list[int] = []
        self._ended = threading.Event()
        role = "Worker" if rank else "Master"
        container = manifest()["spec"]["pytorchReplicaSpecs"][role]["template"]["spec"]["containers"][0]
        # What the operator sets; the kubelet puts it into the arguments.
        given = {"RANK": str(rank), "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": str(PORT), "WORLD_SIZE": "2"}
        self._environment = os.environ | given | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "cable"}
        self._environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        changed = {"--num_processes": "2"}
        words = []
        for word in [*container["command"], *container["args"], *arguments]:
            name, equals, value = word.partition("=")
            value = changed.get(name, value)
            words.append(name + equals + re.sub(r"\$\((\w+)\)", lambda match: given[match[1]], value))
        self._command = ["ip", "netns", "exec", host, *words]
        self.process: subprocess.Popen[bytes] | None = None

    def run(self) -> None:
        while not self._ended.is_set():
            with self.log.open("a") as log:
                self.process = subprocess.Popen(
                    self._command, cwd=ROOT, env=self._environment, stdout=log, stderr=log, start_new_session=True
                )
            self.codes.append(self.process.wait())
            if self.codes[-1] == 0:
                return
            time.sleep(0.5)

    def end(self) -> None:
        self._ended.set()
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)  # the launcher ends its processes
        self.join(60)


@pytest.mark.slow
def test_a_host_is_cut_off_and_comes_back(hosts: list[str], tmp_path: Path) -> None:
    """Both sides notice and start again, wait for each other, and resume from the newest checkpoint."""
    shards = runs.packed_data(tmp_path)
    recipe = runs.recipe_file(tmp_path, shards)
    settings = ["train.warmup.epochs=0", "train.joint.epochs=15", "checkpoint.every=5", f"train.timeout={TIMEOUT}"]
    settings = [f"--config={recipe}", f"data.root={shards}", f"outputs={tmp_path / 'outputs'}", *settings]
    pods = [Pod(host, rank, settings, tmp_path) for rank, host in enumerate(hosts)]

    def logs() -> str:
        return "\n".join(pod.log.read_text() for pod in pods if pod.log.exists())

    try:
        for pod in pods:
            pod.start()
        saved = str(tmp_path / "outputs" / "run" / "checkpoints")
        deadline = time.monotonic() + 120
        while not checkpoint.list_complete(saved):
            assert time.monotonic() < deadline and not any(pod.codes for pod in pods), logs()
            time.sleep(0.1)
        ip("-n", hosts[1], "link", "set", "cable", "down")
        deadline = time.monotonic() + 90
        while not all(pod.codes for pod in pods):
            assert time.monotonic() < deadline, logs()
            time.sleep(0.2)
        steps = int(checkpoint.list_complete(saved)[-1][-8:])
        ip("-n", hosts[1], "link", "set", "cable", "up")
        for pod in pods:
            pod.join(180)
        assert [pod.codes[-1] for pod in pods] == [0, 0], logs()
    finally:
        for pod in pods:
            pod.end()
    text = logs()
    assert all(0 not in pod.codes[:-1] for pod in pods)
    assert "has lost another rank" in text
    assert f"resumes from step {steps}, {saved}/step-{steps:08d}" in text, text
    assert text.count("2 ranks, DDP") >= 2 and "1 rank," not in text
    assert checkpoint.load_checkpoint(checkpoint.list_complete(saved)[-1]).progress.total == 60
