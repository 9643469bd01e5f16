#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Measures new scenes in a trained latent space: held-out quality, bytes and seconds of a scene, with and without base
planes, and as RGB.

    python benchmarks/objects.py --data DEV --autoencoder AE --output FOLDER
    python benchmarks/objects.py --data DEV --autoencoder AE --output FOLDER --variants macro --lengths 5 10 20 40

The first half of the scenes (--learn N: the first N), in the order of their manifest, trains autoencoder, MLP and base
planes together (stage 1); the others are fitted to that, with all of it frozen, and evaluated on their held-out views.

    plain   planes of a scene's own alone
    macro   micro features of its own, and the weights of base planes
    light   the weights of base planes alone
    micro   as macro, without the base planes: what these add
    rgb     RGB tri-planes of the same views, without a stage 1

Each variant is some runs of train.py, whose commands are printed and which are in FOLDER/runs. Finished runs are not
made again and one that was stopped goes on, so several calls, each with some variants, make one table: it has all that
is finished with these settings. Stage 1 is igae_improved.yaml, shortened (STAGE1); fits are fit.yaml. --stage1, --fit
and key=value (all runs) set anything else.
"""

import argparse
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import yaml

from benchmarks.objects_table import Row, table
from igae.data import Manifest
from igae.scenes import StoredPlanesConfig

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = ("plain", "macro", "light", "micro", "rgb")
JOINT_SHARE = 0.6  # of a fit's epochs on latents: those that align decoded renders (fit.yaml: 12 and 20)
# Weights of LPIPS are a download.
STAGE1 = ["train.warmup.epochs=15", "train.joint.epochs=15", "train.joint.weights.natural_lpips=0"]
NO_NATURAL_IMAGES = [f"train.joint.{key}=0" for key in ("natural_images", "weights.natural_ae", "weights.natural_tv")]
QUIET = ["evaluation.scenes=null", "evaluation.natural_images=0", "evaluation.orbits=0", "evaluation.pictures=0"]


@dataclass(frozen=True)
class Job:
    """A run of train.py: the folder of its results, its settings, and the stage whose metrics end it."""

    name: str
    config: str
    settings: tuple[str, ...]
    stage: str

    @property
    def command(self) -> list[str]:
        return ["train.py", "--config", self.config, f"experiment={self.name}", *self.settings]

    @property
    def text(self) -> str:
        """The command, to be given by hand in the project's folder."""
        return shlex.join(["python", *self.command])


def halves(scenes: int, learn: int | None, most: int | None = None) -> tuple[tuple[int, int], tuple[int, int]]:
    """Ranges [start, stop) of the scenes of stage 1 (the first half, or ``learn``) and of those that are fitted (the
    others), of the first ``most`` of all scenes.

    Raises:
        ValueError: one of them would have none.
    """
    count = scenes if most is None else min(scenes, most)
    middle = count // 2 if learn is None else learn
    if not 0 < middle < count:
        raise ValueError(
            f"{count} scenes can't be split into {middle} that are learned from and {count - middle} that are fitted: "
            "both must be at least 1 (--learn, --scenes, --data)"
        )
    return (0, middle), (middle, count)


def planes_of(variant: str, resolution: int, base_planes: int, micro: int, features: int = 32) -> dict[str, object]:
    """Settings of `planes` of a variant."""
    if variant in ("plain", "rgb", "micro"):
        return {"resolution": resolution, "features": micro if variant == "micro" else features}
    own = micro if variant == "macro" else 0
    shared = {"base_planes": base_planes, "micro_features": own, "macro_features": features - own, "bias": True}
    return {"resolution": resolution, "features": features, **shared}


def jobs_of(variant: str, arguments: argparse.Namespace, shards: str, manifest: Manifest) -> list[Job]:
    """The runs of a variant, in their order: stage 1 and the fits (for RGB only these)."""
    first, second = halves(len(manifest.scenes), arguments.learn, arguments.scenes)
    runs = Path(arguments.output) / "runs"

    def common(scenes: tuple[int, int]) -> list[str]:
        chosen = f"data.categories={{{manifest.dataset}: [{scenes[0]}, {scenes[1]}]}}"
        return [f"outputs={runs}", f"data.root={shards}", chosen, *QUIET]

    lengths = sorted(arguments.lengths)
    if variant == "rgb":
        planes = planes_of("rgb", arguments.rgb_resolution, 0, 0)
        runs_of_rgb = [[f"planes={json.dumps(planes)}", f"train.warmup.epochs={views_share(n)}"] for n in lengths]
        return [
            Job(f"rgb-{n:g}", "rgb_triplanes.yaml", (*common(second), *own, *arguments.overrides), "warmup")
            for n, own in zip(lengths, runs_of_rgb, strict=True)
        ]
    planes = planes_of(variant, arguments.resolution, arguments.base_planes, arguments.micro)
    autoencoder = {"path": str(arguments.autoencoder), "scale": arguments.scale}
    settings = [f"autoencoder={json.dumps(autoencoder)}", f"planes={json.dumps(planes)}", *STAGE1]
    settings += [] if manifest.images else NO_NATURAL_IMAGES
    if "base_planes" in planes:
        settings += [f"train.{stage}.learning_rates.base_planes=1.0e-2" for stage in ("warmup", "joint")]
    model = Job(
        f"stage1-{variant}",
        "igae_improved.yaml",
        (*common(first), *settings, *arguments.stage1, *arguments.overrides),
        "joint",
    )
    fits = [
        Job(
            f"fit-{variant}-{n:g}",
            "fit.yaml",
            (
                f"model={runs / model.name}",
                *common(second),
                *(f"train.warmup.epochs={n:g}", f"train.joint.epochs={JOINT_SHARE * n:g}"),
                *arguments.fit,
                *arguments.overrides,
            ),
            "fit",
        )
        for n in lengths
    ]
    return [model, *fits]


def views_share(epochs: float) -> float:
    """Epochs in all of a fit with so many on latents."""
    return round((1 + JOINT_SHARE) * epochs, 6)


# ---- Runs


class Runner:
    """Makes runs, several at once, and leaves out what is there. Told to stop, it tells them: they save and end."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self._processes: list[subprocess.Popen[bytes]] = []
        self._lock, self.stopped = threading.Lock(), False
        (output / "logs").mkdir(parents=True, exist_ok=True)

    def stop(self, number: int, _: FrameType | None) -> None:
        """Handler of a signal."""
        self.stopped = True
        for process in self._processes:
            process.terminate()

    def chain(self, jobs: list[Job]) -> bool:
        """Make runs one after another; False where one did not end, which ends the chain."""
        return all(self._make(job) for job in jobs)

    def _make(self, job: Job) -> bool:
        done = self.done(job)
        if done.is_file():
            if not self.finished(job):
                raise ValueError(f"{done.parent} is a run with other settings: take another --output, or remove it")
            return True
        log, start = self.output / "logs" / f"{job.name}.log", time.perf_counter()
        with self._lock, log.open("ab") as file:
            if self.stopped:
                return False
            print(f"{job.text}\n", flush=True)
            begun = done.parent.exists()
            process = subprocess.Popen([sys.executable, *job.command], cwd=ROOT, stdout=file, stderr=file)
            self._processes.append(process)
        code = process.wait()
        seconds = time.perf_counter() - start
        if code or job.stage not in metrics(done.parent):
            if not self.stopped:
                tail = log.read_text(errors="replace").splitlines()[-5:]
                print("\n".join([f"{job.name} ended with code {code} ({log}):", *tail]), file=sys.stderr, flush=True)
            return False
        # What a run that was stopped has cost in all is not known.
        done.write_text(json.dumps({"command": job.text, "seconds": None if begun else seconds}) + "\n")
        print(f"{job.name}: {seconds:.0f} s\n", flush=True)
        return True

    def done(self, job: Job) -> Path:
        """The file that says that a run is finished."""
        return self.output / "runs" / job.name / "benchmark.json"

    def finished(self, job: Job) -> bool:
        """Whether a run is finished, with these settings."""
        return self.done(job).is_file() and json.loads(self.done(job).read_text())["command"] == job.text

    def seconds(self, job: Job) -> float | None:
        """What a finished run took; None where it was stopped and went on."""
        value: float | None = json.loads(self.done(job).read_text())["seconds"]
        return value


def metrics(run: Path) -> dict[str, dict[str, float]]:
    """The metrics at the end of each stage of a run."""
    path = run / "metrics.json"
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def training_seconds(run: Path, scenes: int) -> float:
    """Of a fit: its waves', from their data to their files; of another run: its steps'. No imports, no evaluation."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    waves = [line["seconds_per_scene"] for line in lines if "seconds_per_scene" in line]
    if waves:
        return float(scenes * sum(waves) / len(waves))
    train = yaml.safe_load((run / "config.yaml").read_text())["train"]
    total, before = 0.0, 0
    for line in lines:
        if "views_per_second" in line:
            total += (line["step"] - before) * train[line["stage"]]["batch_size"] / line["views_per_second"]
            before = line["step"]
    return total


def row_of(variant: str, epochs: float, jobs: list[Job], job: Job, runner: Runner, manifest: Manifest) -> Row:
    """The metrics of a finished fit."""
    run, figures = runner.done(job).parent, metrics(runner.done(job).parent)[job.stage]
    recipe = yaml.safe_load((run / "config.yaml").read_text())
    planes, chosen = StoredPlanesConfig.model_validate(recipe["planes"]), manifest.select(recipe["data"]["categories"])
    seen = sum(recipe["train"][stage]["epochs"] for stage in ("warmup", "joint"))
    return Row(
        variant,
        epochs,
        figures["heldout/rgb_psnr"],
        figures["heldout/latent_psnr"] if variant != "rgb" else None,
        figures.get("heldout/ae_psnr"),
        figures.get("heldout/baseline_psnr"),
        4 * math.prod(planes.row_shape),
        4 * planes.base_planes * 3 * planes.resolution**2 * planes.macro_features,
        seen * sum(scene.views for scene in chosen) / len(chosen),
        runner.seconds(jobs[0]) if variant != "rgb" else None,
        runner.seconds(job),
        training_seconds(run, len(chosen)) / len(chosen),
    )


def find_shards(arguments: argparse.Namespace) -> str:
    """The folder of shards: what is given, or what is packed from it."""
    data = Path(arguments.data)
    if (data / "manifest.json").is_file():
        return str(data)
    scenes, packed = data / "train" / "objaverse", Path(arguments.output) / "shards"
    subsets = sorted(path.name for path in scenes.glob("square*") if path.is_dir())
    if len(subsets) != 1:
        raise ValueError(f"{data} has neither manifest.json nor one folder train/objaverse/square*: give shards")
    if not (packed / "manifest.json").is_file():
        command = [sys.executable, "data_tools/pack_shards.py", "--scenes", str(scenes), "--subset", subsets[0]]
        command += ["--output", str(packed), *(["--resize", str(arguments.resize)] if arguments.resize else [])]
        print(f"{shlex.join(['python', *command[1:]])}\n", flush=True)
        if subprocess.run(command, cwd=ROOT).returncode:
            raise ValueError(f"{data} can't be packed")
    return str(packed)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="packed shards, or a folder in the igae-data layout")
    parser.add_argument("--autoencoder", default="demo", help="hub id or folder of diffusers' format (default: demo)")
    parser.add_argument("--scale", default="auto", help="of its normalizer (default: auto)")
    parser.add_argument("--output", type=Path, required=True, help="folder of shards, runs and logs")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--lengths", nargs="+", type=float, default=[20.0], help="epochs of fits on latents")
    parser.add_argument("--scenes", type=int, help="take only the first so many scenes")
    parser.add_argument("--learn", type=int, help="scenes of stage 1 (default: half of all)")
    parser.add_argument("--resize", type=int, help="pixels that images are brought to when they are packed")
    parser.add_argument("--base-planes", type=int, default=16)
    parser.add_argument("--micro", type=int, default=10, help="of 32 features, a scene's own (default: 10)")
    parser.add_argument("--resolution", type=int, default=48, help="of latent planes (default: 48)")
    parser.add_argument("--rgb-resolution", type=int, default=64, help="of RGB planes (default: 64)")
    parser.add_argument("--parallel", type=int, default=1, help="variants at once on the GPU; changes their times")
    parser.add_argument("--stage1", nargs="+", default=[], metavar="key=value", help="settings of stage 1 alone")
    parser.add_argument("--fit", nargs="+", default=[], metavar="key=value", help="settings of the fits alone")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of all runs")
    arguments = parser.parse_intermixed_args(argv)
    arguments.output = arguments.output.resolve()
    # Runs start in the project's folder; what is no folder is a name.
    for name in ("data", "autoencoder"):
        if Path(getattr(arguments, name)).is_dir():
            setattr(arguments, name, str(Path(getattr(arguments, name)).resolve()))
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 all runs are there, 1 some failed or were stopped, 2 wrong input."""
    arguments, before = parse(argv), {}
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
        shards = find_shards(arguments)
        manifest = Manifest.load(shards)
        chains = {variant: jobs_of(variant, arguments, shards, manifest) for variant in VARIANTS}
        runner = Runner(arguments.output)
        before = {number: signal.signal(number, runner.stop) for number in (signal.SIGTERM, signal.SIGINT)}
        with ThreadPoolExecutor(arguments.parallel) as pool:
            complete = list(pool.map(runner.chain, (chains[variant] for variant in arguments.variants)))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    rows = []
    for variant, jobs in chains.items():
        fits = zip(sorted(arguments.lengths), jobs if variant == "rgb" else jobs[1:], strict=True)
        rows += [row_of(variant, n, jobs, job, runner, manifest) for n, job in fits if runner.finished(job)]
    _, (learned, end) = halves(len(manifest.scenes), arguments.learn, arguments.scenes)
    print(f"{arguments.data}: {learned} scenes learned from, {end - learned} fitted; load {os.getloadavg()[0]:.1f}")
    print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 0 if all(complete) else 1


if __name__ == "__main__":
    sys.exit(main())
