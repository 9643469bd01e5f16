# SPDX-License-Identifier: Apache-2.0
"""Configuration: files, bases, overrides, environment, and the one line that each mistake gives."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import Field, ValidationError, model_validator

from igae.config import ConfigError, Section, dump, load


@dataclass(frozen=True)
class Options:
    __pydantic_config__ = {"extra": "forbid"}
    near: float | Literal["auto"] = "auto"
    samples: int = 48

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError("samples must be at least 1")


class Stage(Section):
    batch_size: int = Field(default=12, gt=0)
    learning_rate: float = 1e-3
    optimizer: Literal["adam", "sgd"] = "adam"
    precision: Literal["no", "bf16"] = "no"
    decay: bool = True


class Train(Section):
    warmup: Stage = Stage()
    joint: Stage = Stage()
    extra: Stage | Literal["none"] | None = None
    stages: list[Stage] = []

    @model_validator(mode="after")
    def _compatible(self) -> "Train":
        if self.warmup.batch_size > 1000 and self.joint.batch_size > 1000:
            raise ValueError("warmup.batch_size and joint.batch_size cannot both exceed 1000")
        return self


class Config(Section):
    experiment: str = "run"
    root: Path | None = None
    train: Train = Train()
    renderer: Options = Options()
    categories: dict[str, tuple[int, int]] | None = None
    notes: dict[str, Any] = {}


class Required(Section):
    root: str


def read(tmp_path: Path, text: str = "", overrides: Sequence[str] = (), cls: type[Section] = Config) -> Any:
    path = tmp_path / "x.yaml"
    path.write_text(text, encoding="utf-8")
    return load(cls, path, overrides, search=[tmp_path / "configs"])


def mistake(tmp_path: Path, text: str = "", overrides: Sequence[str] = (), cls: type[Section] = Config) -> str:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text, overrides, cls)
    message = str(caught.value)
    assert "\n" not in message and "pydantic" not in message and len(message) < 300
    return message.replace(str(tmp_path), "DIR")


def test_empty_file_gives_defaults(tmp_path: Path) -> None:
    assert read(tmp_path) == Config()
    assert read(tmp_path, "# nothing\n") == Config()


def test_sections_are_immutable_and_closed() -> None:
    with pytest.raises(ValidationError):
        Config().experiment = "other"
    with pytest.raises(ValidationError):
        Stage(batchsize=3)  # type: ignore[call-arg]


def test_defaults_are_validated() -> None:
    class Wrong(Section):
        count: int = "many"  # type: ignore[assignment]

    with pytest.raises(ValidationError):
        Wrong()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {joint: {batchsize: 8}}", "unknown key train.joint.batchsize; did you mean train.joint.batch_size?"),
        ("trian: {joint: {batch_size: 8}}", "unknown key trian; did you mean train?"),
        ("joint: {batch_size: 8}", "unknown key joint; did you mean train.joint?"),
        ("renderer: {sample: 8}", "unknown key renderer.sample; did you mean renderer.samples?"),
        ("renderer: {zzz: 8}", "unknown key renderer.zzz; the keys of renderer are: near, samples"),
        ("train: {extra: {decoy: true}}", "unknown key train.extra.decoy; did you mean train.extra.decay?"),
        (
            "train: {stages: [{}, {learningrate: 1}]}",
            "unknown key train.stages.1.learningrate; did you mean train.stages.1.learning_rate?",
        ),
        # an unknown key says more than the other mistakes
        (
            "train: {joint: {batch_size: x, optimiser: 1}}",
            "unknown key train.joint.optimiser; did you mean train.joint.optimizer?",
        ),
        ("train: {joint: {batch_size: x}}", "train.joint.batch_size: got 'x' (a string), expected an integer"),
        ("train: {joint: {batch_size: 1.5}}", "train.joint.batch_size: got 1.5 (a number), expected an integer"),
        ("train: {joint: {batch_size: true}}", "train.joint.batch_size: got True, expected a number"),
        ("train: {joint: {batch_size: 0}}", "train.joint.batch_size: got 0 (an integer), expected greater than 0"),
        ("train: {joint: {batch_size: }}", "train.joint.batch_size: got nothing, expected an integer"),
        ("train: {joint: {learning_rate: [1]}}", "train.joint.learning_rate: got [1] (a list), expected a number"),
        ("train: {joint: {decay: maybe}}", "train.joint.decay: got 'maybe' (a string), expected true or false"),
        ("train: {joint: 3}", "train.joint: got 3 (an integer), expected a section (keys and values)"),
        ("renderer: 3", "renderer: got 3 (an integer), expected a section (keys and values)"),
        ("experiment: 3", "experiment: got 3 (an integer), expected text"),
        ("experiment: {a: 1}", "experiment: got {'a': 1} (a map), expected text"),
        (
            "train: {joint: {optimizer: adm}}",
            "train.joint.optimizer: got 'adm' (a string), expected 'adam' or 'sgd'; did you mean adam?",
        ),
        ("renderer: {near: far}", "renderer.near: got 'far' (a string), expected a number or 'auto'"),
        (
            "train: {extra: nine}",
            "train.extra: got 'nine' (a string), expected a section (keys and values) or 'none'; did you mean none?",
        ),
        ("train: {extra: {decay: 7}}", "train.extra.decay: got 7 (an integer), expected true or false"),
        ("categories: 3", "categories: got 3 (an integer), expected keys and values"),
        ("categories: {car: [0, x]}", "categories.car.1: got 'x' (a string), expected an integer"),
        ("categories: {car: [0]}", "categories.car: got [0] (a list), expected more than 1 entries"),
        ("categories: {car: [0, 1, 2]}", "categories.car: got [0, 1, 2] (a list), expected at most 2 items"),
        ("train: {stages: 3}", "train.stages: got 3 (an integer), expected a list"),
        ("renderer: {samples: -1}", "renderer: samples must be at least 1"),
        (
            "train: {warmup: {batch_size: 2000}, joint: {batch_size: 2000}}",
            "train: warmup.batch_size and joint.batch_size cannot both exceed 1000",
        ),
    ],
)
def test_mistakes_in_values(tmp_path: Path, text: str, message: str) -> None:
    assert mistake(tmp_path, text) == f"DIR/x.yaml: {message}"


def test_missing_key(tmp_path: Path) -> None:
    message = mistake(tmp_path, "", cls=Required)
    assert message == "DIR/x.yaml: missing key root; set it in the file or on the command line (root=...)"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("experiment: a\nexperiment: b", "line 2 duplicate key experiment"),
        ("train:\n  joint: {decay: true}\n  joint: {}", "line 3 duplicate key joint"),
        ("experiment: [a", "line 1"),
        ("experiment: a: b", "line 1"),
        ("- a\n- b", "expected keys and values at the top, got a list"),
        ("word", "expected keys and values at the top, got a string"),
        ("experiment: !!python/object:os.system x", "could not determine a constructor"),
        ("experiment: \x01", "not YAML"),
        ("base: [a, b]", "base: got ['a', 'b'], expected the name of one configuration file"),
        ("base: nowhere.yaml", "no such configuration"),
        ("base: x.yaml", "starts from this file again"),
    ],
)
def test_mistakes_in_files(tmp_path: Path, text: str, message: str) -> None:
    assert message in mistake(tmp_path, text)


def test_binary_file(tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"b\.yaml: cannot be read as text"):
        load(Config, tmp_path / "b.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("experiment", "'experiment' is not an override; write section.key=value"),
        ("=3", "'=3' is not an override"),
        ("train..joint=3", "'train..joint=3' is not an override"),
        ("experiment.name=3", "experiment.name: experiment is a string, not a section"),
        ("train.joint.decay=[", "train.joint.decay: line 1"),
        ("train.joint.lerning_rate=3", "unknown key train.joint.lerning_rate; did you mean train.joint.learning_rate?"),
        ("train.joint.batch_size=x", "train.joint.batch_size: got 'x'"),
        ("renderer.samples=0", "renderer: samples must be at least 1"),
        ("experiment=${IGAE_NONE}", "experiment: the environment variable IGAE_NONE is not set"),
    ],
)
def test_mistakes_in_overrides_name_the_command_line(tmp_path: Path, override: str, message: str) -> None:
    assert mistake(tmp_path, "experiment: a", [override]).startswith("command line: " + message)


def test_overrides(tmp_path: Path) -> None:
    text = "train: {joint: {batch_size: 3, decay: false}}\ncategories: {car: [0, 5]}"
    config = read(
        tmp_path,
        text,
        [
            "train.joint.batch_size=8",
            "train.extra.decay=false",
            "renderer.near=0.5",
            "categories={bus: [1, 2]}",
            "root=a=b",
        ],
    )
    assert config.train.joint == Stage(batch_size=8, decay=False)
    assert config.train.extra == Stage(decay=False)  # the section was not in the file
    assert config.renderer.near == 0.5
    assert config.categories == {"bus": (1, 2)}  # a value replaces, it is not merged
    assert config.root == Path("a=b")
    assert read(tmp_path, text, ["experiment=a", "experiment=b"]).experiment == "b"
    assert read(tmp_path, text, ["categories=null"]).categories is None
    assert read(tmp_path, "root: a", ["root="]).root is None


@pytest.mark.parametrize(
    ("scalar", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("-.5e+2", -50.0),
        ("1.", 1.0),
        (".inf", math.inf),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("010", 10),
        ("0x1F", 31),
        ("0o17", 15),
        ("12:30:00", "12:30:00"),
        ("1_000", "1_000"),
        ("2024-01-01", "2024-01-01"),
        ("e5", "e5"),
        ("1.2.3", "1.2.3"),
        ("'1e-4'", "1e-4"),
        ("~", None),
        ("", None),
    ],
)
def test_scalars_are_those_of_yaml_1_2(tmp_path: Path, scalar: str, value: Any) -> None:
    found = read(tmp_path, f"notes: {{a: {scalar}}}").notes["a"]
    assert found == value and type(found) is type(value)
    found = read(tmp_path, "", [f"notes.a={scalar}"]).notes["a"]
    assert found == value and type(found) is type(value)


def test_keys_are_text(tmp_path: Path) -> None:
    assert read(tmp_path, "categories: {02691156: [0, 5], no: [1, 2]}").categories == {"02691156": (0, 5), "no": (1, 2)}


def test_anchors_and_merge_keys(tmp_path: Path) -> None:
    config = read(tmp_path, "train:\n  warmup: &w {batch_size: 5, decay: false}\n  joint: {<<: *w, batch_size: 6}")
    assert config.train.joint == Stage(batch_size=6, decay=False)


def test_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IGAE_DIR", "/data")
    monkeypatch.setenv("IGAE_EMPTY", "")
    monkeypatch.setenv("IGAE_SIZE", "7")
    monkeypatch.setenv("IGAE_NESTED", "${IGAE_DIR}")
    monkeypatch.delenv("IGAE_NONE", raising=False)

    def value(text: str) -> Any:
        return read(tmp_path, f"notes: {{a: ['{text}']}}").notes["a"][0]

    assert value("${IGAE_DIR}/x/${IGAE_SIZE}") == "/data/x/7"
    assert value("${IGAE_EMPTY}") == ""
    assert value("${IGAE_EMPTY:-d}") == "d" and value("${IGAE_NONE:-}") == "" and value("${IGAE_DIR:-d}") == "/data"
    assert value("$${IGAE_NONE}") == "${IGAE_NONE}" and value("$5 $$ {}") == "$5 $$ {}"
    assert value("${IGAE_NESTED}") == "${IGAE_DIR}"
    assert read(tmp_path, "train: {joint: {batch_size: '${IGAE_SIZE}'}}").train.joint.batch_size == 7
    message = mistake(tmp_path, "notes: {a: {b: '${IGAE_NONE}'}}")
    assert message == "DIR/x.yaml: notes.a.b: the environment variable IGAE_NONE is not set; set it or this key"
    for wrong in ("${}", "${A-B}", "${1A}", "${OPEN"):
        assert "must be followed by a variable name" in mistake(tmp_path, f"notes: {{a: '{wrong}'}}")
    # a key that was replaced on the command line needs no variable
    assert read(tmp_path, "experiment: '${IGAE_NONE}'", ["experiment=a"]).experiment == "a"


def test_base_files(tmp_path: Path) -> None:
    (tmp_path / "configs" / "deep").mkdir(parents=True)
    (tmp_path / "configs" / "first.yaml").write_text(
        "experiment: first\n"
        "train: {joint: {batch_size: 3, decay: false}, stages: [{}, {}]}\n"
        "categories: {car: [0, 1]}\n"
    )
    # `first.yaml` is found in the search folder, `second.yaml` beside the file that names it
    (tmp_path / "configs" / "deep" / "second.yaml").write_text("base: first.yaml\ntrain: {joint: {learning_rate: 1}}\n")
    (tmp_path / "configs" / "deep" / "third.yaml").write_text(
        "base: second.yaml\ntrain: {joint: {batch_size: 4}, stages: [{}]}\n"
    )
    config = load(Config, "deep/third.yaml", ["categories.bus=[2, 3]"], search=[tmp_path / "configs"])
    assert config.experiment == "first"
    assert config.train.joint == Stage(batch_size=4, decay=False, learning_rate=1.0)
    assert config.train.stages == [Stage()]  # lists are replaced
    assert config.categories == {"car": (0, 1), "bus": (2, 3)}


def test_mistake_in_a_base_file_names_that_file(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("train: {joint: {batch_size: x, learning_rate: 1}}")
    assert mistake(tmp_path, "base: base.yaml\ntrain: {joint: {learning_rate: 2}}").startswith(
        "DIR/base.yaml: train.joint"
    )
    (tmp_path / "base.yaml").write_text("train: {joint: {batch_size: 1}}")
    assert mistake(tmp_path, "base: base.yaml\ntrain: {joint: {batch_size: x}}").startswith("DIR/x.yaml: train.joint")
    (tmp_path / "base.yaml").write_text("base: x.yaml")
    assert (
        mistake(tmp_path, "base: base.yaml")
        == "DIR/base.yaml: base: x.yaml starts from this file again; break the circle"
    )


def test_base_replaces_a_value_by_a_section(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("train: {extra: none}\ncategories: {a: [0, 1]}")
    config = read(tmp_path, "base: base.yaml\ntrain: {extra: {decay: false}}\ncategories: null")
    assert config.train.extra == Stage(decay=False) and config.categories is None


def test_lookup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "igae.yaml").write_text("experiment: searched")
    monkeypatch.chdir(tmp_path)
    assert load(Config, "igae.yaml").experiment == "searched"  # configs/ is searched by default
    (tmp_path / "igae.yaml").write_text("experiment: path")
    assert load(Config, "igae.yaml").experiment == "path"
    with pytest.raises(ConfigError, match=re.escape("igea.yaml: no such configuration")) as caught:
        load(Config, "igea.yaml")
    assert str(caught.value).endswith("did you mean igae.yaml?")
    with pytest.raises(ConfigError, match=r"there are: igae\.yaml"):
        load(Config, "qqqqqq", search=[tmp_path / "configs"])
    with pytest.raises(ConfigError, match="no such configuration"):
        load(Config, "configs", search=[])  # a folder


def test_dump_is_readable() -> None:
    text = dump(Config(train=Train(joint=Stage(learning_rate=1e-4, batch_size=3)), categories={"car": (0, 5)}))
    assert text.startswith("experiment: run\nroot: null\ntrain:\n  warmup:\n    batch_size: 12\n")
    assert "&" not in text and "!!" not in text
