"""Engines of small networks, compiled once."""

from __future__ import annotations

import pytest
from inference.networks import NETWORKS

from elf_fast import inference


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="session")
def compiled(cache):
    """compiled(name) -> (model, x, engine "inductor" of the network with that name), made once."""
    made = {}

    def get(name: str):
        if name not in made:
            model, x = NETWORKS[name]()
            buckets = (1,) if name == "maps" else ()
            engine = inference.compile(
                model, x[:3], engine="inductor", max_batch=64, buckets=buckets, cache_dir=cache
            )
            made[name] = model, x, engine
        return made[name]

    return get
