# SPDX-License-Identifier: Apache-2.0
"""Runs in which a call of the system fails: which calls there are, which one fails how, and what comes of it."""

import collections
import os
import random
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import failing_calls
import faulty_runs
import runs
from faulty_runs import KILLED, LAST, Found, Outcome

from igae.ranks import rank

STARTS = {
    "new": (1, ["evaluation.pictures=1"]),
    "resumed": (1, []),
    "in the background": (1, ["checkpoint.background=true"]),
    "two ranks": (2, ["train.warmup.epochs=2", "train.joint.epochs=2"]),  # as many steps
}
"""Name of each kind of run -> number of ranks, settings."""
SHARES = [*["new", "resumed"] * 5, "in the background", "two ranks"]
DONE = ("fsync", "close", "rename", "link", "unlink", "rmdir", "mkdir")
"""Calls that a network file system may do although it reports an error."""


@dataclass(frozen=True)
class Fault:
    """What is done to the call at a position among those of its kind."""

    start: str
    call: str
    position: int
    action: str
    error: str = ""
    lasts: bool = False
    rank: int = 0

    def __str__(self) -> str:
        parts = [f"{self.start}, rank {self.rank}:", self.call, str(self.position), self.action, self.error]
        return " ".join(filter(None, [*parts, "from then on" if self.lasts else ""]))


def start_of(number: int) -> str:
    return SHARES[number % len(SHARES)]


def draw(seed: int, number: int, calls: dict[str, list[list[str]]]) -> Fault:
    """The fault with a number; the starts and the kinds of calls take turns.

    Args:
        calls: kinds of those of each rank, for each kind of start.
    """
    rng = random.Random(f"{seed} {number}")
    start = start_of(number)
    counts = [collections.Counter(kinds) for kinds in calls[start]]
    call = sorted(counts[0])[(number + number // len(SHARES)) % len(counts[0])]
    actions = ["fails"] * 6 + ["kills before", "kills after"]
    actions += ["is cut short"] * 2 * (call in ("write", "read")) + ["fails though it is done"] * (call in DONE)
    action = rng.choice(actions)
    error = rng.choice(failing_calls.NAMED) if action.startswith("fails") else ""
    lasts = action == "fails" and error != "EINTR" and rng.random() < 0.3  # an interrupted call is made again
    victim = rng.randrange(STARTS[start][0])
    if not counts[victim][call]:
        victim = 0  # the second of two ranks makes few calls
    return Fault(start, call, rng.randrange(counts[victim][call]) + 1, action, error, lasts, victim)


def train_with(fault: dict[str, Any], victim: int, folder: str, log: str, recipe: str, *arguments: str) -> None:
    """Train; on one of the ranks something happens below a folder. Its calls are in a log with its number."""
    if victim == rank() or not fault:
        failing_calls.arm(Path(folder), Path(f"{log}-{rank()}"), **fault)
    runs.train(recipe, *arguments)


class Lab:
    """Runs of this process's children, below a folder; `fault` in it is that of the last run with a fault."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recipe = str(runs.recipe_file(folder, runs.packed_data(folder)))
        self.damaged = set[str]()
        """Checkpoints that a resumed run finds damaged."""
        self.calls: dict[str, list[list[str]]] = {}
        self.expected: dict[str, Outcome] = {}
        self.leave_undisturbed("new")

    def leave_undisturbed(self, how: str) -> None:
        """Find out which calls a kind of run makes, and what it ends with."""
        place = self.folder / how.replace(" ", "-")
        self.prepare(how, place)
        codes, text = self.start(how, place, {})
        assert codes == [0] * STARTS[how][0], text
        made = [failing_calls.calls(place / f"calls-{number}") for number in range(STARTS[how][0])]
        self.calls[how] = [[kind for kind, _ in calls] for calls in made]
        if how == "new":
            renamed = [path for kind, path in made[0] if kind == "rename" and "/pictures/" not in path]
            self.killed_at = next(i for i, path in enumerate(renamed, 1) if path.endswith(f"{KILLED}/state.json"))
        self.expected[how] = faulty_runs.look(*places(place))

    def start(self, how: str, folder: Path, fault: dict[str, Any], victim: int = 0) -> tuple[list[int | None], str]:
        """A run of a kind in a folder; on one of its ranks something happens."""
        world, settings = STARTS[how]
        for log in folder.glob("calls-*"):
            log.unlink()
        arguments = [self.recipe, *faulty_runs.QUICK, *settings, f"outputs={folder / 'outputs'}"]
        given = (fault, victim, str(folder / "outputs"), str(folder / "calls"), *arguments)
        return faulty_runs.start(train_with, world, folder / "log", *given)

    def prepare(self, how: str, folder: Path) -> None:
        """Put there what a run of this kind finds: nothing, or what a kill has left, and a damaged checkpoint."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        if how != "resumed":
            return
        killed = self.folder / "killed"
        if not killed.exists():
            killed.mkdir()
            kill = {"call": "rename", "position": self.killed_at, "action": "kills before"}
            codes, text = self.start("resumed", killed, kill)
            newest = Path(faulty_runs.complete(f"{killed}/outputs/run/checkpoints")[-1])
            assert codes == [-9] and newest.name == LAST, (codes, newest, text)
            self.damaged.add(newest.name)
            os.truncate(newest / "shared.safetensors", 100)
        shutil.copytree(killed / "outputs", folder / "outputs")

    def try_out(self, seed: int, number: int) -> tuple[str, Found]:
        """What the fault with a number is, and what comes of it."""
        if (start := start_of(number)) not in self.expected:
            self.leave_undisturbed(start)
        fault = draw(seed, number, self.calls)
        folder, how, world = self.folder / "fault", fault.start, STARTS[fault.start][0]
        self.prepare(how, folder)
        plan = {name: value for name, value in asdict(fault).items() if name not in ("start", "rank")}
        codes, text = self.start(how, folder, plan, fault.rank)
        log = folder / f"calls-{fault.rank}"
        hit = next(iter(failing_calls.struck(log) if log.exists() else []), "")
        run, root = places(folder)
        problems = [] if hit else ["the call did not come"]
        problems += faulty_runs.how_it_ended(codes, text, fault.action.startswith("kills"))
        problems += faulty_runs.newest_loads(root, self.damaged if how == "resumed" else set())
        if codes == [0] * world:
            problems += faulty_runs.compare(run, root, self.expected[how], text, ended=False)
        again, more = self.start(how, folder, {})
        (folder / "log").write_text(f"{text}\n---- again\n{more}")
        if again != [0] * world or "Traceback" in more:
            problems.append(f"the second run ended with {again}")
        else:
            problems += faulty_runs.compare(run, root, self.expected[how], text + more)
        return str(fault), Found(codes, hit, problems)


def places(folder: Path) -> tuple[Path, str]:
    """The run in a folder, and the root of its checkpoints."""
    return folder / "outputs/run", str(folder / "outputs/run/checkpoints")
