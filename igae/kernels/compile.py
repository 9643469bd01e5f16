# SPDX-License-Identifier: Apache-2.0
"""Compiles CUDA sources with NVRTC, and keeps the results on disk."""

import contextlib
import functools
import hashlib
import io
import os
import re
import time
import uuid
from pathlib import Path
from typing import NamedTuple

ARCHITECTURES = (80, 86, 89, 90, 100)
"""Compute capabilities that are tested to compile: A100, RTX 30, L4 and RTX 40, H100 and H200, B200."""

STALE = 60.0
"""Seconds after which a file that is being written is taken for what a kill left: writing one takes milliseconds."""


def cache_folder() -> Path:
    return Path(os.environ.get("IGAE_KERNEL_CACHE") or Path.home() / ".cache" / "igae" / "kernels")


class Usage(NamedTuple):
    """What the assembler reports of a kernel."""

    registers: int
    spilled: int
    """Bytes of spill stores and loads."""


def compile_source(path: Path, defines: dict[str, int], arch: int) -> tuple[bytes, Usage]:
    """A cubin of a source that includes files of its folder, and the most that one of its kernels uses.

    Raises:
        ModuleNotFoundError: cuda-core is not installed.
        RuntimeError: NVRTC refused the source; its log is in the message.
    """
    from cuda.core import Program, ProgramOptions

    options = ProgramOptions(
        std="c++17",
        arch=f"sm_{arch}",
        include_path=str(path.parent),
        define_macro=[(name, str(int(value))) for name, value in defines.items()] or None,
        ptxas_options=["-v"],
    )
    log = io.StringIO()
    try:
        code = Program(path.read_text(), code_type="c++", options=options).compile("cubin", logs=log).code
    except Exception as error:
        raise RuntimeError(f"NVRTC did not compile {path.stem} for sm_{arch}: {error}\n{log.getvalue()}") from error
    report = log.getvalue()
    registers = re.findall(r"Used (\d+) registers", report)
    spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", report)
    return bytes(code), Usage(max(map(int, registers), default=-1), sum(map(int, spilled)))


@functools.cache
def _fingerprint(folder: Path) -> bytes:
    """Hash of what a cubin depends on besides macros and architecture: the sources and the compiler's version."""
    from cuda.bindings import nvrtc

    digest = hashlib.sha256(repr(nvrtc.nvrtcVersion()[1:]).encode())
    for path in sorted(folder.iterdir()):
        digest.update(path.read_bytes())
    return digest.digest()


def cached_cubin(source: Path, defines: dict[str, int], arch: int) -> bytes:
    """What `compile_source` makes, from disk if it is there.

    Any number of processes may ask at once: each that finds nothing compiles, and moves its whole result into place. A
    folder that cannot be written costs a compilation in each process and is otherwise fine.
    """
    key = hashlib.sha256(_fingerprint(source.parent) + repr(sorted(defines.items())).encode()).hexdigest()[:32]
    folder = cache_folder()
    path = folder / f"{source.stem}-sm{arch}-{key}.cubin"
    try:
        return path.read_bytes()
    except OSError:
        code, _ = compile_source(source, defines, arch)
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.part"):
            if time.time() - old.stat().st_mtime > STALE:
                old.unlink()
        part.write_bytes(code)
        os.replace(part, path)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink()
    return code
