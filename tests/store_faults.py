# SPDX-License-Identifier: Apache-2.0
"""Runs with data and checkpoints in an object store, of whose requests one fails, and what comes of it."""

import collections
import os
import random
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import failing_store
import faulty_runs
import fsspec
import object_store
import ranks
import runs
from faulty_runs import KILLED, Found, Outcome

from igae.storage import LIMITS

STARTS = ("new", "resumed")
BUCKET = "s3://bucket"


@dataclass(frozen=True)
class Fault:
    """What is done to the request at a position among those of its method."""

    start: str
    method: str
    position: int
    what: str

    def __str__(self) -> str:
        return f"{self.start}: {self.method} {self.position} {self.what}"


def start_of(number: int) -> str:
    return STARTS[number % 3 == 2]


def draw(seed: int, number: int, requests: dict[str, list[str]]) -> Fault:
    """The fault with a number; what is done, and the methods, take turns.

    Args:
        requests: methods of each kind of start's.
    """
    rng = random.Random(f"store {seed} {number}")
    start, what = start_of(number), list(failing_store.ANSWERS)[number % len(failing_store.ANSWERS)]
    counts = collections.Counter(requests[start])
    method = sorted(counts)[number % len(counts)]
    return Fault(start, method, rng.randrange(counts[method]) + 1, what)


def use(port: int) -> None:
    """Make s3:// mean the store behind a port, and wait less for it than in earnest."""
    os.environ["AWS_DEFAULT_REGION"] = "us-east-1"
    fsspec.config.conf["s3"] = object_store.options(port, retries={"max_attempts": 1}, read_timeout=20)
    LIMITS.first_wait, LIMITS.claim_seconds = 0.01, 0.05


def train_in_store(port: int, process: str, recipe: str, *arguments: str) -> None:
    use(port)
    Path(process).write_text(str(os.getpid()))
    runs.train(recipe, *arguments)


def fill(port: int, shards: str) -> None:
    """Put packed data into the store."""
    use(port)
    fs = fsspec.filesystem("s3")
    fs.mkdir("bucket")
    for path in Path(shards).iterdir():
        fs.pipe_file(f"bucket/packed/{path.name}", path.read_bytes())


def look(port: int, run: Path, root: str) -> Outcome:
    use(port)
    return faulty_runs.look(run, root)


def check(port: int, run: Path, root: str, expected: Outcome | None, text: str, ended: bool) -> list[str]:
    use(port)
    problems = faulty_runs.newest_loads(root, set())
    return problems + (faulty_runs.compare(run, root, expected, text, ended) if expected else [])


class Lab:
    """Runs of this process's children, below a folder, and in a bucket of the store at a port."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port, self.number = folder, port, 0
        (folder / "store").mkdir()
        shards = runs.packed_data(folder / "store")
        self.recipe = str(runs.recipe_file(folder / "store", f"{BUCKET}/packed"))
        ranks.run(fill, 1, port, shards)
        self.requests: dict[str, list[str]] = {}
        self.expected: dict[str, Outcome] = {}
        self.leave_undisturbed("new")

    def leave_undisturbed(self, how: str) -> None:
        """Find out what a kind of run asks for, and what it ends with."""
        place, root = self.prepare(how)
        codes, text = self.start(place, root)
        assert codes == [0], text
        found = (place / "requests").read_text().splitlines()
        self.requests[how] = [line.split()[0] for line in found]
        self.expected[how] = ranks.run(look, 1, self.port, place / "outputs/run", root)[0]
        if how == "new":
            puts = [line for line in found if line.startswith("PUT ")]
            self.killed_at = next(i for i, line in enumerate(puts, 1) if f"{KILLED}/state.json" in line)

    def start(self, folder: Path, root: str, method: str = "", position: int = 0, what: str = "") -> faulty_runs.Ended:
        """A run in a folder with checkpoints in a root; something is done to one of its requests."""
        (folder / "requests").unlink(missing_ok=True)
        process = folder / "process"
        with failing_store.between(self.port, folder / "requests", process, method, position, what) as port:
            arguments = [*faulty_runs.QUICK, f"outputs={folder / 'outputs'}", f"checkpoint.root={root}"]
            given = (port, str(process), self.recipe, *arguments)
            return faulty_runs.start(train_in_store, 1, folder / "log", *given)

    def prepare(self, how: str) -> tuple[Path, str]:
        """An empty folder and root, or those of a run that was killed while it wrote a checkpoint."""
        self.number += 1
        place, root = self.folder / "fault", f"{BUCKET}/run-{self.number}"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        if how == "resumed":
            codes, text = self.start(place, root, "PUT", self.killed_at, "kills before")
            assert codes == [-9], text
        return place, root

    def try_out(self, seed: int, number: int) -> tuple[str, Found]:
        """What the fault with a number is, and what comes of it."""
        if (start := start_of(number)) not in self.expected:
            self.leave_undisturbed(start)
        fault = draw(seed, number, self.requests)
        folder, root = self.prepare(fault.start)
        codes, text = self.start(folder, root, fault.method, fault.position, fault.what)
        lines = (folder / "requests").read_text().splitlines()
        hit = next((re.sub(r"/run-\d+", "", line[2:]) for line in lines if line.startswith("! ")), "")
        problems = [] if hit else ["the request did not come"]
        problems += faulty_runs.how_it_ended(codes, text, fault.what.startswith("kills"))
        expected = self.expected[fault.start]
        of_first = None if any(codes) else expected
        problems += ranks.run(check, 1, self.port, folder / "outputs/run", root, of_first, text, False)[0]
        again, more = self.start(folder, root)
        (folder / "log").write_text(f"{text}\n---- again\n{more}")
        if again != [0] or "Traceback" in more:
            problems.append(f"the second run ended with {again}")
        else:
            problems += ranks.run(check, 1, self.port, folder / "outputs/run", root, expected, text + more, True)[0]
        return str(fault), Found(codes, hit, problems)


@contextmanager
def lab(folder: Path) -> Iterator[Lab]:
    """With a store of its own."""
    with object_store.moto() as port:
        yield Lab(folder, port)
