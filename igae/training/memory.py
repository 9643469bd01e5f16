# SPDX-License-Identifier: Apache-2.0
"""Where the planes of a rank's scenes are: on its device, in host memory or on a local disk, as there is room."""

import logging
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import get_args

import torch

from igae.ranks import Channel, control_groups, local_world_size
from igae.scenes import Storage, Tier
from igae.training.preflight import check_memory, scene_bytes
from igae.training.recipe import Recipe

TIERS: tuple[Tier, ...] = get_args(Tier)
SHARES: dict[Tier, float] = {"device": 0.75, "host": 0.8, "disk": 0.95}
"""Of what is free there, for planes that `auto` puts there: training needs the rest."""
POOL_SHARE = 0.5
"""Of a GPU's free memory, for planes that are there for a time only."""
GROUP_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache"),
    2: ("memory.max", "memory.current", "file"),
}
"""By version of control groups: files of the limit and of what is used, name of its part for caches."""
log = logging.getLogger("igae")


def choose_storage(recipe: Recipe, count: int, device: torch.device, channel: Channel, instead: str) -> Storage:
    """Where the planes of a rank's scenes and their moments are: as the recipe says, or in the first tier that has room
    for them on all ranks. Collective.

    Args:
        count: scenes of this rank.
        instead: what to do where there is no room, besides settings of `planes`.

    Raises:
        ValueError: on all ranks alike, there is no room, or the device has none for what a step needs.
    """
    planes, size, wanted = recipe.planes, scene_bytes(recipe.planes), recipe.planes.storage
    folder = planes.scratch or tempfile.gettempdir()
    where = {"device": str(device), "host": "host memory", "disk": f"the disk of {folder}"}
    room = {"device": free_memory(device)}

    def choose() -> int:
        if wanted == "device":
            check_memory(count * size, device, instead)
            return 0
        tried = TIERS if wanted == "auto" else (wanted,)
        for tier in tried:
            if tier == "host":
                room[tier] = free_memory(torch.device("cpu"))
            elif tier == "disk":
                room[tier] = free_disk(folder, needed=wanted == "disk")
            if count * size <= SHARES[tier] * room[tier]:
                return TIERS.index(tier)
        there = ", ".join(f"{where[tier]} has {room[tier] / 2**30:.1f} GiB free for it" for tier in tried)
        raise ValueError(
            f"the planes and their optimizer state of this rank need {count * size / 2**30:.1f} GiB, and {there}: "
            "lower planes.resolution or planes.features, set planes.scratch to a folder on a larger local disk and "
            f"planes.storage=disk, or {instead}"
        )

    tier = TIERS[max(channel.gather(channel.together(choose)))]
    slots = count if tier == "device" else min(count, planes.resident or int(POOL_SHARE * room["device"] / size))

    def check() -> None:
        for name, stage in recipe.train.stages.items():
            if (needed := min(count, stage.batch_size * stage.accumulate)) > slots:
                raise ValueError(
                    f"a step of train.{name} may need {needed} scenes on {device} and planes.resident is {slots}"
                    f"{'' if planes.resident else ' by its free memory'}: set planes.resident={needed} or more, or "
                    f"lower train.{name}.batch_size"
                )

    channel.together(check)
    if tier != "device":
        log.info(
            "planes and moments of %d scenes, %.2f GiB, are in %s (%s has %.1f GiB free), %d of them at a time on %s",
            *(count, count * size / 2**30, where[tier], device, room["device"] / 2**30, slots, device),
        )
    return Storage(tier, slots, folder)


def free_memory(device: torch.device, root: str = "/") -> int:
    """Bytes of a GPU that are free; or of the machine's memory, what this rank may use: an equal part, among its ranks,
    of what is available and what control groups leave. ``root``: where /proc and /sys are."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    facts = dict(line.split(":") for line in Path(root, "proc/meminfo").read_text().splitlines())
    free = [1024 * int(facts["MemAvailable"].split()[0])]
    for version, group in control_groups("memory", Path(root, "proc/self/cgroup"), Path(root, "sys/fs/cgroup")):
        limit, used, cache = GROUP_FILES[version]
        with suppress(OSError, ValueError):  # no limit, or not to be seen from a container
            facts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            taken = int((group / used).read_text()) - int(facts[cache])
            free.append(int((group / limit).read_text()) - taken)
    return max(0, min(free)) // local_world_size()


def free_disk(folder: str, *, needed: bool) -> int:
    """Bytes of a disk of this machine that this rank may use; 0 where there is none. ValueError where it is needed."""
    try:
        number = os.stat(folder).st_dev
        mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        kinds = {line[line.index("-") + 1] for line in mounts if line[2] == f"{os.major(number)}:{os.minor(number)}"}
        problem = "is in memory" if kinds & {"tmpfs", "ramfs"} else ""
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free // local_world_size()
    except OSError as error:
        problem, free = f"can't be used ({error.strerror})", 0
    if problem and needed:
        raise ValueError(f"planes.scratch: {folder} {problem}: set it to a folder on a disk of this machine")
    return 0 if problem else free
