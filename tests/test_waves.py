# SPDX-License-Identifier: Apache-2.0
"""How a fit's scenes are cut into waves."""

from hypothesis import given
from hypothesis import strategies as st

from igae.data import Manifest, Scene, Scenes, Shard, Shards
from igae.training import waves


@given(st.lists(st.integers(0, 6), min_size=1, max_size=6), st.integers(1, 9), st.data())
def test_waves_are_even_and_in_the_order_of_the_shards(counts: list[int], most: int, data: st.DataObject) -> None:
    ids = data.draw(st.permutations(range(sum(counts))))
    scenes = Scenes.of([Scene(i, f"s{i}", "all", 3, 0) for i in range(len(ids))])
    shards, order = [], list(ids)
    for number, count in enumerate(counts):
        own, order = order[:count], order[count:]
        for kind in ("scenes", "heldout"):
            shards.append(Shard(f"{kind}-{number:05d}.tar", kind, 1, "0" * 64, 1, {f"s{i}": 3 for i in own}))
    chosen = scenes.take([i for i in range(len(ids)) if data.draw(st.booleans())])
    manifest = Manifest((16, 16), 0, "all", Shards.of(shards, scenes), scenes, 0, None)
    found = waves(manifest, chosen, most)
    assert [scene.id for wave in found for scene in wave] == [i for i in ids if i in chosen.ids]
    sizes = [len(wave) for wave in found]
    assert not sizes or (max(sizes) <= most and max(sizes) - min(sizes) <= 1 and min(sizes) > 0)
    assert len(found) == -(-len(chosen) // most)
