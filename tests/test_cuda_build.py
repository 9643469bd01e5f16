# SPDX-License-Identifier: Apache-2.0
"""The kernels compile for every architecture, without a GPU or a driver, and within their registers."""

import ctypes
import functools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("cuda.core", reason="needs cuda-core")
pytest.importorskip("cuda.bindings", reason="needs cuda-bindings")

from igae.kernels import ARCHITECTURES, Usage, cached_cubin, compile_source  # noqa: E402
from igae.models import KERNELS as LAYERS  # noqa: E402
from igae.rendering import build, cuda  # noqa: E402
from igae.scenes import KERNELS as ROWS  # noqa: E402

KERNELS: tuple[build.Pass, ...] = ("forward", "backward")

try:
    from cuda.bindings import nvrtc

    nvrtc.nvrtcVersion()
except Exception as error:  # the library that is looked for is another package's
    pytest.skip(f"needs NVRTC (nvidia-cuda-nvrtc): {error}", allow_module_level=True)


@functools.cache
def compiled(
    kernel: build.Pass, variant: build.Variant, arch: int, sources: Path = build.SOURCES
) -> tuple[bytes, Usage]:
    return compile_source(sources / f"{kernel}.cu", build.macros(kernel, variant, arch), arch)


# Blocks in fp32 have the same registers everywhere; of the sources, 90 and later take another part.
@pytest.mark.parametrize(
    ("arch", "precision"), [*((arch, "fp16") for arch in ARCHITECTURES), *((arch, "fp32") for arch in (86, 90))]
)
@pytest.mark.parametrize("kernel", KERNELS)
def test_default_kernels_do_not_spill(kernel: build.Pass, arch: int, precision: str) -> None:
    variant = build.Variant(fp32=precision == "fp32")
    code, usage = compiled(kernel, variant, arch)
    assert code[:4] == b"\x7fELF"
    launched = build.shape(kernel, variant, arch)
    assert 0 < usage.registers <= 65536 // (32 * launched.warps * launched.blocks)
    assert usage.spilled == 0


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"colors": 3},
        {"colors": 12, "disparity": True},
        {"coarse": 96, "fine": 0},
        {"deterministic": True},
        {"side": 2},
        {"side": 3},
        {"side": 2, "distortion": True},
    ],
    ids=[
        "default",
        "three colors",
        "twelve colors",
        "coarse only",
        "deterministic",
        "2 x 2 rays",
        "3 x 3 rays",
        "distortion",
    ],
)
def test_many_backward_blocks_run_at_once_on_90(change: dict[str, Any]) -> None:
    variant = build.Variant(**change)
    _, blocks, shared = build.shape("backward", variant, 90)
    assert blocks == (3 if variant.deterministic else 4)
    assert blocks * (shared + 1024) <= 228 * 1024  # 1 KiB of each is the system's
    _, usage = compiled("backward", variant, 90)
    assert 0 < usage.registers <= 65536 // (128 * blocks) // 8 * 8 and usage.spilled == 0


@pytest.mark.parametrize(
    "change",
    [
        {"features": 8, "colors": 1, "coarse": 16, "fine": 0},
        {"features": 24, "colors": 3, "coarse": 17, "fine": 33, "eg3d": True, "product": True, "disparity": True},
        {"features": 64, "colors": 32, "coarse": 128, "fine": 128},
        {"deterministic": True},
    ],
    ids=["smallest", "uneven", "largest", "deterministic"],
)
@pytest.mark.parametrize("arch", [86])
def test_variants_compile(change: dict[str, Any], arch: int) -> None:
    # 86 has the least shared memory: the largest has one or two warps a block. Spills are a matter of speed here.
    for kernel in KERNELS:
        _, usage = compiled(kernel, build.Variant(**change), arch)
        assert usage.registers <= 255 and usage.spilled < 4000


def test_every_supported_size_fits_every_architecture() -> None:
    for arch in ARCHITECTURES:
        for features in range(8, 65, 8):
            for colors in (1, 7, 8, 31, 32):
                for samples in (2, 128):
                    for kernel in KERNELS:
                        variant = build.Variant(features, colors, samples, samples, fp32=True, distortion=True)
                        limit = {80: 163, 90: 227, 100: 227}.get(arch, 99) * 1024
                        assert build.shape(kernel, variant, arch).shared <= limit


def test_too_many_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="shared memory on sm_86"):
        build.shape("forward", build.Variant(coarse=2000), 86)


def test_broken_source_is_reported_with_its_log(tmp_path: Path) -> None:
    for path in build.SOURCES.iterdir():
        (tmp_path / path.name).write_text(path.read_text().replace("scan_sum(sum);", "scan_sum(nonsense);"))
    with pytest.raises(RuntimeError, match='did not compile forward for sm_90[^"]*(.|\n)*"nonsense" is undefined'):
        compiled("forward", build.Variant(), 90, tmp_path)


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
    assert found == [(name, kinds[kind]) for name, kind in cuda.Params._fields_]


def test_processes_share_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small = ["--arch", "80", "--features", "8", "--colors", "1", "--samples", "4", "0"]
    command = [sys.executable, "-c", "from igae.cli.kernels import main; raise SystemExit(main())", *small]
    environment = os.environ | {"IGAE_KERNEL_CACHE": str(tmp_path / "new" / "folder")}
    started = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) for _ in range(2)]
    assert all(process.wait() == 0 for process in started)
    names = sorted(path.name for path in (tmp_path / "new" / "folder").iterdir())
    # Two of the renderer, layers in two precisions, rows.
    assert len(names) == 5 and all(name.endswith(".cubin") for name in names)  # and nothing half-written
    # What is there is read, and not compiled again.
    monkeypatch.setenv("IGAE_KERNEL_CACHE", environment["IGAE_KERNEL_CACHE"])
    for name in names:
        kept = tmp_path / "new" / "folder" / name
        assert kept.read_bytes()[:4] == b"\x7fELF"
        kept.write_bytes(b"as it was kept")
    assert all(cached_cubin(*kernel, 80) == b"as it was kept" for kernel in (*LAYERS, *ROWS))
    variant = build.Variant(8, 1, 4, 0)
    assert cached_cubin(build.SOURCES / "forward.cu", build.macros("forward", variant, 80), 80) == b"as it was kept"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One that is empty."""
    monkeypatch.setenv("IGAE_KERNEL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_sources(folder: Path, header: str = "constexpr int ONE = 1;\n") -> Path:
    """A small kernel that includes a file."""
    folder.mkdir()
    (folder / "ones.cuh").write_text(header)
    source = folder / "ones.cu"
    source.write_text('#include "ones.cuh"\nextern "C" __global__ void ones(int *p) { *p = ONE * N; }\n')
    return source


def test_the_cache_knows_macros_and_architecture(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_sources(tmp_path / "sources")
    first = cached_cubin(source, {"N": 1}, 80)
    assert first[:4] == b"\x7fELF" and [path.read_bytes() for path in cache.iterdir()] == [first]
    assert cached_cubin(source, {"N": 2}, 80) != first and cached_cubin(source, {"N": 1}, 90) != first
    assert len(list(cache.iterdir())) == 3
    monkeypatch.setenv("IGAE_KERNEL_CACHE", "/proc/nowhere")  # cannot be written
    assert cached_cubin(source, {"N": 1}, 80)[:4] == b"\x7fELF"


def test_the_cache_knows_the_sources(cache: Path, tmp_path: Path) -> None:
    source, copied = write_sources(tmp_path / "sources"), write_sources(tmp_path / "copied")
    changed = write_sources(tmp_path / "changed", "constexpr int ONE = 2;\n")
    for one in (source, copied):
        cached_cubin(one, {"N": 1}, 80)
        assert len(list(cache.iterdir())) == 1
    cached_cubin(changed, {"N": 1}, 80)
    assert len(list(cache.iterdir())) == 2
