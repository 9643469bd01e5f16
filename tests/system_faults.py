# SPDX-License-Identifier: Apache-2.0
"""Whole small training runs in which one call of the system, or one request to an object store, fails.

    python tests/system_faults.py                        # 400 calls of the system, 60 requests
    python tests/system_faults.py --count 40 --store 0   # the first 40 calls of that seed
    python tests/system_faults.py --only 17 s3           # these two again

With the seed, the number of a fault says what happens where. Each run has to end in one sentence or go on, its newest
checkpoint has to load, and the same command has to end as an undisturbed run does: weights, planes and moments to the
bit, the same metrics and records, and the same files, with nothing that the fault has left. A line a fault goes to
stdout, and to --log as JSON; the exit code is 1 if one of them was not as it should be.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import failing_calls

COUNT, STORE = 400, 60
HERE = Path(__file__).parent


def report(name: str, what: str, found: Any, log: Path | None) -> None:
    codes, hit, problems = found
    print(f"{name:>4} {'BAD ' if problems else 'good'} {what} ({hit}): {codes} {'; '.join(problems)}", flush=True)
    if log is not None:
        with log.open("a") as file:
            entry = {"fault": name, "what": what, "hit": hit, "codes": codes, "problems": problems}
            file.write(json.dumps(entry) + "\n")


def main(arguments: argparse.Namespace) -> int:
    from igae.models import import_diffusers

    import_diffusers()  # before anything else imports diffusers, and with it what no run needs
    import call_faults
    import faulty_runs
    import store_faults

    faulty_runs.use_forks()
    span = range(arguments.first, arguments.first + arguments.count)
    wanted = [str(number) for number in span] + [f"s{number}" for number in range(arguments.store)]
    wanted, bad = arguments.only or wanted, 0
    with tempfile.TemporaryDirectory(prefix="faults-") as temporary, contextlib.ExitStack() as stack:
        folder = Path(temporary).resolve()
        labs = dict[str, Any]()
        for name in sorted(wanted, key=lambda name: name.startswith("s")):
            kind = "store" if name.startswith("s") else "calls"
            if kind not in labs:
                labs[kind] = (
                    call_faults.Lab(folder) if kind == "calls" else stack.enter_context(store_faults.lab(folder))
                )
            what, found = labs[kind].try_out(arguments.seed, int(name.removeprefix("s")))
            report(name, what, found, arguments.log)
            bad += bool(found[2])
            if (found[2] or arguments.only) and arguments.keep:
                shutil.copytree(folder / "fault", arguments.keep / name, dirs_exist_ok=True)
    print(f"{len(wanted)} faults, {bad} of them bad", flush=True)
    return int(bad > 0)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--count", type=int, default=COUNT, help="how many calls of the system fail")
    made.add_argument("--store", type=int, default=STORE, help="how many requests to a store fail")
    made.add_argument("--first", type=int, default=0, help="number of the first fault")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--only", nargs="+", help="numbers of faults: 17 of a call, s3 of a request")
    made.add_argument("--log", type=Path, help="a file that gets a line of JSON for each fault")
    made.add_argument("--keep", type=Path, help="a folder that gets the files of bad faults")
    return made


if __name__ == "__main__":
    if "failing_calls" not in os.environ.get("LD_PRELOAD", ""):
        with tempfile.TemporaryDirectory() as built:
            paths = os.pathsep.join(str(folder) for folder in (HERE, HERE.parent))
            environment = {"LD_PRELOAD": failing_calls.build(Path(built)), "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
            sys.exit(subprocess.run([sys.executable, *sys.argv], env=os.environ | environment).returncode)
    sys.exit(main(parser().parse_args()))
