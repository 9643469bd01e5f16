# SPDX-License-Identifier: Apache-2.0
"""The kernels compile for every architecture, without a GPU or a driver, and within their registers."""

import ctypes
import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("cuda.core", reason="needs cuda-core")
pytest.importorskip("cuda.bindings", reason="needs cuda-bindings")

from igae.kernels import compile as compiling  # noqa: E402
from igae.rendering import build, launch  # noqa: E402

KERNELS: tuple[build.Kernel, ...] = ("forward", "backward")

try:
    from cuda.bindings import nvrtc

    nvrtc.nvrtcVersion()
except Exception as error:  # the library that is looked for is another package's
    pytest.skip(f"needs NVRTC (nvidia-cuda-nvrtc): {error}", allow_module_level=True)


@pytest.mark.parametrize("arch", build.ARCHITECTURES)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_default_kernels_do_not_spill(kernel: build.Kernel, arch: int, precision: str) -> None:
    variant = build.Variant(fp32=precision == "fp32")
    code, usage = build.compile_kernel(kernel, variant, arch)
    assert code[:4] == b"\x7fELF"
    launched = build.shape(kernel, variant, arch)
    assert 0 < usage.registers <= 65536 // (32 * launched.warps * launched.blocks)
    assert usage.spilled == 0


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"bf16": True},
        {"colors": 3},
        {"colors": 12, "disparity": True},
        {"coarse": 96, "fine": 0},
        {"deterministic": True},
    ],
    ids=["default", "bf16", "three colors", "twelve colors", "coarse only", "deterministic"],
)
def test_many_backward_blocks_run_at_once_on_90(change: dict[str, Any]) -> None:
    variant = build.Variant(**change)
    _, blocks, shared = build.shape("backward", variant, 90)
    assert blocks == (3 if variant.deterministic else 4)
    assert blocks * (shared + 1024) <= 228 * 1024  # 1 KiB of each is the system's
    _, usage = build.compile_kernel("backward", variant, 90)
    assert 0 < usage.registers <= 65536 // (128 * blocks) // 8 * 8 and usage.spilled == 0


@pytest.mark.parametrize(
    "change",
    [
        {"features": 8, "colors": 1, "coarse": 16, "fine": 0},
        {"features": 24, "colors": 3, "coarse": 17, "fine": 33, "eg3d": True, "product": True, "disparity": True},
        {"features": 64, "colors": 32, "coarse": 128, "fine": 128},
        {"bf16": True},
        {"deterministic": True},
    ],
    ids=["smallest", "uneven", "largest", "bf16", "deterministic"],
)
@pytest.mark.parametrize("arch", [80, 86])
def test_variants_compile(change: dict[str, Any], arch: int) -> None:
    # The largest on 86, which has the least shared memory: one or two warps a block. Spills are a matter of speed here.
    for kernel in KERNELS:
        _, usage = build.compile_kernel(kernel, build.Variant(**change), arch)
        assert usage.registers <= 255 and usage.spilled < 4000


def test_every_supported_size_fits_every_architecture() -> None:
    for arch in build.ARCHITECTURES:
        for features in range(8, 65, 8):
            for colors in (1, 7, 8, 31, 32):
                for samples in (2, 128):
                    for kernel in KERNELS:
                        variant = build.Variant(features, colors, samples, samples)
                        limit = {80: 163, 90: 227, 100: 227}.get(arch, 99) * 1024
                        assert build.shape(kernel, variant, arch).shared <= limit


def test_too_many_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="shared memory on sm_86"):
        build.shape("forward", build.Variant(coarse=2000), 86)


def test_broken_source_is_reported_with_its_log(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for path in build.SOURCES.iterdir():
        (tmp_path / path.name).write_text(path.read_text().replace("scan_sum(sum);", "scan_sum(nonsense);"))
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    with pytest.raises(RuntimeError, match='did not compile forward for sm_90[^"]*(.|\n)*"nonsense" is undefined'):
        build.compile_kernel("forward", build.Variant(), 90)


def test_the_argument_is_laid_out_as_in_the_source() -> None:
    source = (build.SOURCES / "common.cuh").read_text()
    body = re.sub(r"//.*", "", re.search(r"struct Params \{(.*?)\};", source, re.S)[1])  # type: ignore[index]
    found = []
    for declaration in filter(str.strip, body.split(";")):
        kind = "pointer" if "*" in declaration else declaration.split()[0]
        names = re.sub(r"^\s*(const )?(long long|\w+)", "", declaration).replace("*", "").split(",")
        found += [(name.strip(), kind) for name in names]
    kinds = {
        ctypes.c_void_p: "pointer", ctypes.c_uint64: "u64", ctypes.c_int: "int", ctypes.c_float: "float",
    }  # fmt: skip
    assert found == [(name, kinds[kind]) for name, kind in launch.Params._fields_]


def test_processes_share_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small = ["--arch", "80", "--features", "8", "--colors", "1", "--samples", "4", "0"]
    command = [sys.executable, "-m", "igae.rendering.build", *small]
    environment = os.environ | {"IGAE_KERNEL_CACHE": str(tmp_path / "new" / "folder")}
    started = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) for _ in range(2)]
    assert all(process.wait() == 0 for process in started)
    names = sorted(path.name for path in (tmp_path / "new" / "folder").iterdir())
    assert len(names) == 2 and all(name.endswith(".cubin") for name in names)  # and nothing half-written
    monkeypatch.setenv("IGAE_KERNEL_CACHE", environment["IGAE_KERNEL_CACHE"])
    monkeypatch.setattr(compiling, "compile_source", lambda *a: pytest.fail("compiled again"))
    variant = build.Variant(8, 1, 4, 0)
    code = build.cubin("forward", variant, 80)
    assert code[:4] == b"\x7fELF"

    monkeypatch.setattr(compiling, "compile_source", lambda *a: (b"new", compiling.Usage(1, 0)))
    assert build.cubin("forward", dataclasses.replace(variant, eg3d=True), 80) == b"new"
    assert build.cubin("forward", variant, 90) == b"new"
    monkeypatch.setenv("IGAE_KERNEL_CACHE", "/proc/nowhere")  # cannot be written
    assert build.cubin("forward", dataclasses.replace(variant, product=True), 80) == b"new"


def test_the_cache_knows_the_sources(tmp_path: Path) -> None:
    copied, changed = tmp_path / "copied", tmp_path / "changed"
    shutil.copytree(build.SOURCES, copied)
    shutil.copytree(build.SOURCES, changed)
    (changed / "ray.cuh").write_text("//")
    assert compiling._fingerprint(copied) == compiling._fingerprint(build.SOURCES) != compiling._fingerprint(changed)
