# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of several ranks, in real processes: read by another number of them, killed, refused by a disk."""

import os
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import ranks
import torch
from checkpoints import Bits, State, at, bits, complete, names
from object_store import moto

from igae.checkpoint import CheckpointWriter, Progress, folder_of, list_complete, load_checkpoint
from igae.errors import LostRank
from igae.ranks import Channel, rank, world_size
from igae.storage import LIMITS

SCENES = 20
# By number of ranks, what each of them owns: uneven, unordered, one with nothing.
OWNED = {
    1: [[*range(SCENES)]],
    2: [[19, 3, 4], [i for i in range(SCENES) if i not in (19, 3, 4)]],
    3: [[*range(1, SCENES, 2), 0, 2], [], [*range(SCENES - 2, 2, -2)]],
}
SHARED = {"shared.safetensors", "optimizer.safetensors", "config.yaml", "state.json"}


def files(world: int) -> set[str]:
    return SHARED | {f"scenes-{number:05d}.safetensors" for number in range(world)}


def whole(total: int, size: int = 2) -> State:
    """All of a run's state at a step, as one rank would hold it; a row has 192 * size bytes."""
    generator = torch.Generator().manual_seed(total)
    planes = torch.randn(SCENES, 3, 4, 4, size, generator=generator)
    scenes = {
        "ids": torch.arange(SCENES),
        "planes": planes,
        "exp_avg": -planes,
        "updated": torch.arange(SCENES) * total,
    }
    shared = {"weight": torch.randn(5, generator=generator), "count": torch.tensor(total)}
    progress = Progress("joint", total, total, consumed={"views": total}, world=world_size())
    return State(progress, f"step: {total}\n", shared, {"weight/exp_avg": torch.rand(5, generator=generator)}, scenes)


def of_this_rank(state: State) -> State:
    mine = OWNED[world_size()][rank()]
    scenes = {name: tensor[mine] for name, tensor in state.scenes.items()}
    return State(state.progress, state.config, state.shared, state.optimizer, scenes)


@contextmanager
def writing(root: str, background: bool = False, keep: int = 3) -> Iterator[CheckpointWriter]:
    torch.distributed.init_process_group("gloo")
    yield CheckpointWriter(root, keep, Channel(), background)
    torch.distributed.destroy_process_group()


def put(maker: CheckpointWriter, state: State) -> str:
    main = rank() == 0
    return maker.save(
        state.progress, state.config, state.shared if main else None, state.optimizer if main else None, state.scenes
    )


def save_steps(root: str, steps: list[int], background: bool = False, keep: int = 3) -> list[str]:
    with writing(root, background, keep) as maker:
        folders = [put(maker, of_this_rank(whole(total))) for total in steps]
        maker.close()
    return folders


def read(folder: str) -> tuple[Progress, str, Bits, Bits, list[int], Bits]:
    """Everything, with the rows that this rank owns now."""
    found = load_checkpoint(folder)
    rows = found.rows(OWNED[world_size()][rank()])
    return found.progress, found.config, bits(found.shared), bits(found.optimizer), found.ids.tolist(), bits(rows)


def expected(total: int, written_by: int, world: int, number: int) -> tuple[Any, ...]:
    state, mine = whole(total), OWNED[world][number]
    state.progress.world = written_by
    rows = {name: tensor[mine] for name, tensor in state.scenes.items() if name != "ids"}
    everyone = list(range(SCENES))
    return state.progress, state.config, bits(state.shared), bits(state.optimizer), everyone, bits(rows)


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("before", [1, 2, 3])
def test_any_number_of_ranks_reads_it(before: int, background: bool, tmp_path: Path) -> None:
    folders = ranks.run(save_steps, before, str(tmp_path), [7], background)
    assert folders == [[folder_of(str(tmp_path), 7)]] * before
    assert set(names(at(tmp_path, 7))) == files(before)
    for after in (1, 2, 3):
        found = ranks.run(read, after, folders[0][0])
        assert found == [expected(7, before, after, number) for number in range(after)]


def test_one_after_another(tmp_path: Path) -> None:
    """Each waits for the one before; old ones go; one that is complete is kept, with the ranks that wrote it."""
    ranks.run(save_steps, 2, str(tmp_path), [1, 2, 3, 4], True, 2)
    assert names(tmp_path) == complete(tmp_path) == ["step-00000003", "step-00000004"]
    ranks.run(save_steps, 3, str(tmp_path), [4, 5], False, 2)
    assert names(tmp_path) == complete(tmp_path) == ["step-00000004", "step-00000005"]
    for total, world in ((4, 2), (5, 3)):
        assert set(names(at(tmp_path, total))) == files(world)
        assert read(str(at(tmp_path, total))) == expected(total, world, 1, 0)


def kill(path: str | Path, data: bytes) -> None:
    """Leave a file as far as it came, and die."""
    Path(path).write_bytes(data)
    os.kill(os.getpid(), signal.SIGKILL)


def save_and_die(root: str, dying: dict[int, str], notes: str, background: bool) -> None:
    """Save step 2 beside step 1; some ranks are killed while they write a file, rank 0 before or after its last."""
    replace, sync, when = os.replace, os.fsync, dying.get(rank())

    def die_at_state(source: Path, target: Path) -> None:
        if target.name == "state.json" and when == "before state":
            kill(source, b"as far as it came")
        replace(source, target)
        if target.name == "state.json" and when == "after state":
            os.kill(os.getpid(), signal.SIGKILL)

    def die_at_file(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if path.endswith(".safetensors"):
            kill(path, b"as far as it came")
        sync(descriptor)

    with writing(root, background) as maker:
        put(maker, of_this_rank(whole(1)))
        maker.wait()
        if when == "file":
            os.fsync = die_at_file
        os.replace = die_at_state
        try:
            put(maker, of_this_rank(whole(2)))
            maker.wait()
            (Path(notes) / str(rank())).write_text("no error")
        except LostRank as error:
            (Path(notes) / str(rank())).write_text(str(error))
        os._exit(3)


@pytest.mark.parametrize(
    ("world", "dying", "background"),
    [
        (2, {1: "file"}, False),
        (2, {0: "file"}, True),
        (3, {0: "file", 1: "file", 2: "file"}, True),
        (2, {0: "before state"}, False),
        (2, {0: "after state"}, True),
    ],
)
def test_killed_while_saving(world: int, dying: dict[int, str], background: bool, tmp_path: Path) -> None:
    """The others end with an error and do not wait; the checkpoint before is whole; another number of ranks then
    writes the same step, and nothing is left of the files of the first attempt."""
    root, notes = tmp_path / "checkpoints", tmp_path / "notes"
    notes.mkdir()
    began = time.monotonic()
    codes = ranks.Ranks(save_and_die, world, str(root), dying, str(notes), background).exit_codes(60)
    assert codes == [-9 if number in dying else 3 for number in range(world)]
    assert time.monotonic() - began < 50  # nobody waited for the dead until a timeout
    for note in notes.iterdir():
        text = note.read_text()
        assert f"the checkpoint {at(root, 2)} can't be written: rank {note.name} has lost another one" in text
        assert "\n" not in text
    published = dying.get(0) == "after state"
    assert complete(root) == ["step-00000001", "step-00000002"][: 1 + published]
    assert len(names(root)) == 2
    assert read(str(at(root, 1))) == expected(1, world, 1, 0)
    other = 3 if world == 2 else 1
    ranks.run(save_steps, other, str(root), [2])
    by = world if published else other
    assert set(names(at(root, 2))) == files(by) and read(str(at(root, 2))) == expected(2, by, 1, 0)


def save_large(root: str, limited: list[int], large: list[int], background: bool) -> str:
    """Save step 1; then step 2, of which some ranks have 4 MB, and some may write files of 100 kB only; then step 3
    without limits. Returns the error."""
    message = "none"
    with writing(root, background) as maker:
        put(maker, of_this_rank(whole(1)))
        maker.wait()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if rank() in limited:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            put(maker, of_this_rank(whole(2, 1000 if rank() in large else 2)))
            maker.wait()
        except ValueError as error:
            message = str(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        there = sorted(os.listdir(root)) if rank() == 0 else []
        put(maker, of_this_rank(whole(3)))
        maker.close()
    return f"{message}; {there}" if rank() == 0 else message


def check_refused(root: Path, large: list[int], background: bool, limited: list[int], reason: str) -> None:
    first, *others = ranks.run(save_large, 2, str(root), limited, large, background)
    message = others[0]
    number, _, rest = reason.partition(": ")
    what, *more = rest.split(" (and")
    file = at(root, 2) / f"scenes-0000{number[-1]}.safetensors"
    told = f"the checkpoint {at(root, 2)} can't be written: {number}: {file} can't be written: {what} ("
    assert message.startswith(told)
    assert message.endswith("; earlier ones are untouched") and all(f") (and{end};" in message for end in more)
    # The same on all ranks:
    assert first == f"{message}; ['step-00000001']"  # and the half written one is gone
    assert complete(root) == names(root) == ["step-00000001", "step-00000003"]
    for total in (1, 3):
        assert read(str(at(root, total))) == expected(total, 2, 1, 0)


@pytest.mark.parametrize("background", [False, True])
def test_one_rank_may_not_write_so_much(background: bool, tmp_path: Path) -> None:
    check_refused(tmp_path / "root", [1], background, [1], "rank 1: File too large")


def test_no_rank_may_write_so_much(tmp_path: Path) -> None:
    check_refused(tmp_path / "root", [0, 1], False, [0, 1], "rank 0: File too large (and 1 more ranks)")


def test_a_full_disk(small_disk: Path) -> None:
    # Neither rank's part fits, whoever comes first: 1.2 and 6.5 MB.
    check_refused(small_disk, [0, 1], True, [], "rank 0: No space left on device (and 1 more ranks)")


def save_apart(root: str) -> str:
    with writing(f"{root}/node-{rank()}") as maker, mock.patch.object(LIMITS, "visible_seconds", 0.2):
        try:
            put(maker, of_this_rank(whole(1)))
        except ValueError as error:
            return str(error).replace(f"node-{rank()}", "node-N")
    return "none"


def test_nodes_that_share_no_folder(tmp_path: Path) -> None:
    """Found when it is written, not when it is needed."""
    messages = ranks.run(save_apart, 2, str(tmp_path))
    assert "scenes-00001.safetensors is not there as it was written, and all nodes must share the folder" in messages[0]
    assert messages[0] == messages[1] and complete(tmp_path / "node-0") == []


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """An S3 server on this machine: the environment in which it is found."""
    pytest.importorskip("moto")
    s3fs = pytest.importorskip("s3fs")
    with moto() as port:
        variables = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("AWS_PROFILE", raising=False)
        s3fs.S3FileSystem.clear_instance_cache()
        yield variables
        s3fs.S3FileSystem.clear_instance_cache()


def in_environment(variables: dict[str, str], function: Any, *arguments: Any) -> Any:
    os.environ.update(variables)
    return function(*arguments)


def test_an_object_store(store: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Written by two ranks, read by three; removed, cleared of what was left, and damaged."""
    import fsspec

    fs, root = fsspec.filesystem("s3"), "s3://bucket/run/checkpoints"
    fs.mkdir("bucket")
    assert list_complete(root) == []
    fs.pipe_file("bucket/run/checkpoints/step-00000001/scenes-00004.safetensors", b"stale")
    fs.pipe_file("bucket/run/checkpoints/step-00000003/scenes-00004.safetensors", b"stale")
    folders = ranks.run(in_environment, 2, store, save_steps, root, [2, 3, 4], True, 2)
    assert folders[0] == folders[1] == [f"{root}/step-0000000{total}" for total in (2, 3, 4)]
    assert list_complete(root) == folders[0][1:]
    fs.invalidate_cache()
    found = {path.removeprefix("bucket/run/checkpoints/") for path in fs.find("bucket")}
    assert found == {f"step-0000000{total}/{name}" for total in (3, 4) for name in files(2)}
    for total in (3, 4):
        rows = ranks.run(in_environment, 3, store, read, f"{root}/step-0000000{total}")
        assert rows == [expected(total, 2, 3, number) for number in range(3)]
    # It is there for a process that has looked before; the object's size alone does not tell.
    name = "bucket/run/checkpoints/step-00000004/scenes-00001.safetensors"
    raw = bytearray(fs.cat_file(name))
    raw[len(raw) // 2] ^= 8
    fs.pipe_file(name, bytes(raw))
    with pytest.raises(ValueError, match="step-00000004/scenes-00001.safetensors is damaged: the checksum of row"):
        read(f"{root}/step-00000004")
    fs.rm_file(name)
    with pytest.raises(ValueError, match="step-00000004/scenes-00001.safetensors is missing"):
        read(f"{root}/step-00000004")
    with pytest.raises(ValueError, match="the checkpoint s3://no-such-bucket.* can't be written: rank 0: "):
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "")
        monkeypatch.setattr(type(fs), "makedirs", mock.Mock(side_effect=PermissionError("Access Denied")))
        put(CheckpointWriter("s3://no-such-bucket/run", 2, Channel()), whole(1))
