# SPDX-License-Identifier: Apache-2.0
"""Where compiled code is kept: `IGAE_KERNEL_CACHE`, by default `~/.cache/igae/kernels`."""

import contextlib
import os
from pathlib import Path

COMPILED = {"TORCHINDUCTOR_CACHE_DIR": "torchinductor", "TRITON_CACHE_DIR": "triton"}
"""Variables of torch.compile, and the folder that each names."""


def cache_folder() -> Path:
    return Path(os.environ.get("IGAE_KERNEL_CACHE") or Path.home() / ".cache" / "igae" / "kernels")


def keep_compiled(processes: int) -> None:
    """Have torch.compile keep what it makes in folders beside the kernels, so that a second start takes seconds. (torch
    has a place in the temporary folder, which a job's end or a restart empties.)

    Entries are named by hashes of what is compiled, of torch's sources and of the device, and moved into place whole:
    any number of ranks and versions may share the folders. Variables that are set stay as they are, and where the
    folders can't be written torch has its own.

    Args:
        processes: that compile at a time; torch would start one for each core of the machine, on each rank.
    """
    from torch._inductor import config
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    if "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ:
        config.compile_threads = processes
    # torch may have set its own place in the environment, as if it were the user's.
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR", default_cache_dir()) != default_cache_dir():
        return  # Triton's is inside of it
    with contextlib.suppress(OSError, RuntimeError):  # there is no home
        folders = {variable: cache_folder() / name for variable, name in COMPILED.items()}
        for folder in folders.values():
            folder.mkdir(parents=True, exist_ok=True)
        if all(os.access(folder, os.W_OK | os.X_OK) for folder in folders.values()):
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folders["TORCHINDUCTOR_CACHE_DIR"])
            os.environ.setdefault("TRITON_CACHE_DIR", str(folders["TRITON_CACHE_DIR"]))
