# SPDX-License-Identifier: Apache-2.0
"""Configuration: properties of any values and any text."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_config import Config, Options, Stage, Train

from igae.config import ConfigError, dump, load

INTEGERS = st.integers(-(2**63) + 1, 2**63 - 1)  # what a configuration may have
values: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | INTEGERS
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
    | st.sampled_from(
        ["1e-4", "no", "null", "${HOME}", "$${A}", "${", "0x1", "~", "1_0", "<<", "=", "2024-01-01", "01"]
    ),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5) | st.sampled_from(["1", "<<", "no"]), inner, max_size=3)
    ),
    max_leaves=6,
)
stages = st.builds(
    Stage,
    batch_size=st.integers(1, 2**63 - 1),
    learning_rate=st.floats(allow_nan=False),
    optimizer=st.sampled_from(["adam", "sgd"]),
    precision=st.sampled_from(["no", "bf16"]),
    decay=st.booleans(),
)
configs = st.builds(
    Config,
    experiment=st.text(),
    root=st.none() | st.text(min_size=1).filter(lambda s: "\0" not in s).map(Path),
    train=st.builds(
        Train, joint=stages, extra=st.none() | st.just("none") | stages, stages=st.lists(stages, max_size=2)
    ),
    renderer=st.builds(Options, near=st.just("auto") | st.floats(allow_nan=False), samples=st.integers(1, 99)),
    categories=st.none() | st.dictionaries(st.text(), st.tuples(INTEGERS, INTEGERS), max_size=3),
    notes=st.dictionaries(st.text(), values, max_size=3),
)


@given(config=configs)
def test_dump_and_load_are_inverse(tmp_path_factory: pytest.TempPathFactory, config: Config) -> None:
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(dump(config), encoding="utf-8", newline="")
    assert load(Config, path) == config


@given(text=st.text(max_size=40) | st.text(alphabet="ab:-{}[]&*!|>'\"%@`#,? \n${<=1.", max_size=30))
def test_any_text_loads_or_gives_one_line(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text, encoding="utf-8", newline="")
    try:
        assert isinstance(load(Config, path, search=[]), Config)
    except ConfigError as error:
        assert len(str(error).splitlines()) == 1
