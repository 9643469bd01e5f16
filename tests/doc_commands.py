# SPDX-License-Identifier: Apache-2.0
"""How tests/test_docs.py tries each command of the documents. A new command gets a line in TABLE."""

from dataclasses import dataclass, field

# What makes a training small; nothing is fetched.
SMALL = (
    "autoencoder.path=demo autoencoder.scale=0.5 planes.resolution=8 planes.features=8 "
    "render.coarse_samples=4 render.fine_samples=4 train.joint.weights.natural_lpips=0"
).split()
SHORT = (
    "train.warmup.epochs=1 train.warmup.batch_size=4 train.joint.epochs=1 train.joint.batch_size=4 data.workers=0 "
    "evaluation.views=1 evaluation.natural_images=2 evaluation.pictures=1 evaluation.orbits=1 "
    "evaluation.orbit_frames=2"
).split()
# What stands in the documents for something of the reader's.
NAMES = {
    "outputs/NAME": "outputs/igae",
    "outputs/RUN": "outputs/igae",
    "hf://user/NAME": "exports/NAME",
    "step-00001000": "step-00000002-end",
    "chair-0017 chair-0018": "mug teddy",
    "data.root=SHARDS": "data.root=data/shards",
    "data.root=data/new-shards": "data.root=data/shards",
    "$DATA_DIR": "data/demo",
    "[--output FILE]": "--output page.html",
    "<dir or s3://...>": "data/packed-again",
}


@dataclass
class Executed:
    """Here: with ``NAMES`` for what is the reader's and ``more`` arguments, by the program's own launcher where it
    is ``launched``, else by the script or module that it starts."""

    more: list[str] = field(default_factory=list)
    launched: bool = False
    ranks: int = 1


@dataclass
class CoveredBy:
    """By a test of another file, ``file::name``."""

    by: str


@dataclass
class Left:
    """Not executed."""

    because: str


How = Executed | CoveredBy | Left
INSTALLS = Left("installs into the environment that runs the tests (`test_extras_exist` looks at the names)")
MEASURES = Left("measures on GPUs, for minutes; its metrics are in docs/experiments")

# From a command (`*` stands for anything) to how it is tried; the first that fits counts. Commands are executed in the
# order of the pages, in one folder.
TABLE: dict[str, How] = {
    # -- demo data and the quickstart, as `make -n quickstart` says
    "make quickstart": Left("makes an environment, and trains for minutes; what it starts is executed in its place"),
    "PIP_EXTRA_INDEX_URL=* make quickstart": Left("as make quickstart"),
    "python data_tools/make_demo.py --output data/demo": Executed(
        "--scenes 2 --views 4 --size 16 --natural-images 4 --supersample 1 --workers 1".split()
    ),
    "python data_tools/pack_shards.py --scenes data/demo/* --output data/demo-shards": Executed(["--workers=1"]),
    "igae train --config quickstart.yaml": Executed([*SHORT, "train.joint.epochs=0"]),
    # -- packing, training
    "python data_tools/pack_shards.py --scenes data/igae-data/* --output data/shards": Executed(["--workers=1"]),
    "python data_tools/pack_shards.py --scenes $DATA_DIR/* --output <dir or s3://...>": Executed(["--workers=1"]),
    "python data_tools/pack_shards.py --verify data/shards": Executed(),
    "python data_tools/render_objects.py *": CoveredBy("test_render_objects.py::test_two_commands_lead_to_training"),
    "python data_tools/pack_shards.py --scenes data/objects *": Executed(["--workers=1"]),
    "python data_tools/pack_shards.py --scenes photos *": Executed(["--resize=16", "--workers=1"]),
    "igae train --config igae.yaml data.root=data/shards": Executed([*SMALL, *SHORT]),
    "accelerate launch train.py --config igae.yaml": Executed(
        [*SMALL, *SHORT, "train.joint.epochs=0", "experiment=launched", "data.root=data/shards"], launched=True
    ),
    "igae train --config own_data.yaml *": Executed(
        [*SMALL, *SHORT, "train.joint.epochs=0", "train.warmup.min_steps=0"]
    ),
    "igae train --config own_data_small.yaml *": Executed([*SHORT, "train.joint.epochs=0", "train.warmup.min_steps=0"]),
    "igae evaluate --checkpoint outputs/NAME": Executed(["data.workers=0"]),
    "igae evaluate --checkpoint outputs/NAME evaluation.scenes=null": Executed(["data.workers=0"]),
    "igae evaluate --checkpoint outputs/NAME/checkpoints/*": Executed(["data.workers=0"]),
    "accelerate launch * -m igae.evaluate --checkpoint outputs/NAME": Executed(["data.workers=0"], ranks=2),
    "igae report outputs/NAME [--output FILE]": Executed(),
    "igae report outputs/A outputs/B outputs/C": CoveredBy("test_report.py::test_several_runs_side_by_side"),
    "igae train --config igae.yaml data.root=data/shards train.joint.epochs=100 *": CoveredBy(
        "test_extend.py::test_a_finished_run_is_extended_to_what_a_longer_one_is"
    ),
    "igae export outputs/NAME exports/NAME": Executed(),
    "igae export outputs/NAME exports/NAME data.root=SHARDS autoencoder.path=FOLDER": CoveredBy(
        "test_export_runs.py::test_what_moved_is_found_where_it_is_said_to_be"
    ),
    "igae export outputs/NAME s3://*": CoveredBy("test_export.py::test_an_object_store"),
    "igae export outputs/NAME hf://*": CoveredBy("test_export_hub.py::test_a_hub_repository"),
    "igae evaluate --checkpoint hf://*": Executed(["data.workers=0"]),
    "igae published *": CoveredBy("test_published.py::test_renders_as_the_published_code"),
    "igae train --config igae.yaml experiment=again autoencoder.path=exports/NAME data.root=SHARDS": Executed(
        [*SMALL[1:], *SHORT, "train.joint.epochs=0"]
    ),
    "igae fit model=outputs/*": Executed(SHORT),
    "igae fit model=exports/NAME data.root=SHARDS": Executed([*SHORT, "experiment=fit-of-an-export"]),
    "igae reference": Executed(),
    "igae --help": CoveredBy("test_cli.py::test_help"),
    "igae train --config igae.yaml --print-config": CoveredBy(
        "test_cli.py::test_the_resolved_recipe_is_printed_and_nothing_else_happens"
    ),
    "igae train --config igae.yaml data.root=SHARDS 'tracking.trackers=[wandb]'": CoveredBy(
        "test_tracking.py::test_wandb_offline_loses_nothing_when_it_is_killed"
    ),
    "wandb sync*": CoveredBy("test_tracking.py::test_wandb_offline_loses_nothing_when_it_is_killed"),
    # -- buckets and the hub
    "hf download k-kassab/igae-data *": CoveredBy("test_cloud_hub.py::test_a_data_set_of_the_hub"),
    "python data_tools/pack_shards.py --scenes s3://*": CoveredBy(
        "test_pack_remote.py::test_from_and_to_s3_in_two_runs"
    ),
    "igae train --config igae.yaml data.root=s3://* data.cache=*": CoveredBy("test_cloud.py::test_runs"),
    "hf upload": Left("writes to the hub, with an account"),
    # -- the viewer
    "igae view *": CoveredBy("test_view.py::test_the_command_serves_this_machine_alone_until_it_is_ended"),
    "ssh *": Left("needs another machine"),
    # -- docs/extending.md
    "pip install ./igae-example": CoveredBy("test_extending.py::made"),
    "igae pack --scenes captures *": CoveredBy("test_extending.py::test_an_input_format"),
    "igae train --config igae.yaml experiment=example *": CoveredBy("test_extending.py::test_a_loss"),
    "igae export outputs/example exports/example": CoveredBy("test_extending.py::test_an_autoencoder_and_a_field"),
    "igae evaluate --checkpoint exports/example *": CoveredBy("test_extending.py::test_an_autoencoder_and_a_field"),
    "igae kernels *": CoveredBy("test_cuda_build.py::test_processes_share_the_cache"),
    # -- many GPUs, many machines
    "accelerate launch --config_file launch/accelerate/ddp.yaml --num_processes 8 train.py *": CoveredBy(
        "test_launch.py::test_each_file_starts_its_strategy"
    ),
    "accelerate launch --config_file launch/accelerate/ddp.yaml --num_machines 2 *": CoveredBy(
        "test_hosts.py::test_a_host_is_cut_off_and_comes_back"
    ),
    "torchrun --nnodes 1:2 *": CoveredBy("test_launch.py::test_torchrun_goes_on_with_fewer_ranks"),
    "sbatch launch/slurm/single_node.sbatch": CoveredBy("test_slurm.py::test_slurm_would_take_each_script"),
    "STRATEGY=* sbatch * launch/slurm/multi_node.sbatch *": CoveredBy(
        "test_slurm.py::test_two_machines_save_at_signals_and_go_on"
    ),
    "CONFIG=* sbatch --array=* launch/slurm/array.sbatch": CoveredBy(
        "test_slurm.py::test_slurm_would_take_each_script"
    ),
    "scancel *": CoveredBy("test_slurm.py::test_two_machines_save_at_signals_and_go_on"),
    "docker build *": Left("needs Docker and a network; tests/test_cluster_files.py reads the Dockerfile"),
    "kubectl apply *": Left("needs a cluster; tests/test_hosts.py starts what the manifest says"),
    "python train.py": CoveredBy("test_training.py::test_signals_save_and_it_exits_with_0"),
    # -- the environment
    "pip install *": INSTALLS,
    "python -m pip install *": INSTALLS,
    "apt-get install *": Left("installs system packages, as root; .ci/run does"),
    "hf auth login": Left("asks for an account"),
    "wandb login": Left("asks for an account"),
    "accelerate config": Left("asks questions; igae needs none of its files"),
    "accelerate launch --cpu": Left("what not to do"),
    "python3 -m venv *": INSTALLS,
    "make test": Left("runs these tests"),
    "make docs": CoveredBy("test_site.py::test_the_site"),
    "*mkdocs build --strict": CoveredBy("test_site.py::test_the_site"),
    "mike *": Left("commits to a branch of the repository, and pushes it"),
    ".ci/run": Left("runs these tests"),
    "python -m pytest -q *": Left("runs these tests"),
    "pytest -m gpu": Left("needs a GPU"),
    "ruff *": Left("make test starts it"),
    "mypy igae": Left("make test starts it"),
    # -- what docs/experiments measured
    "SETTINGS=*": Left("names settings (`test_keys` looks at them)"),
    "python train.py --config * $SETTINGS*": MEASURES,
    "python train.py --config rgb_triplanes.yaml*": MEASURES,
    "python data_tools/pack_shards.py --scenes DEV/*": MEASURES,
    "accelerate launch train.py --config autoencoder.yaml": MEASURES,
    "python benchmarks/*": MEASURES,
}
