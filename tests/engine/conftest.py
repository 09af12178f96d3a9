"""vLLM reads its environment when a test file imports it."""

import pytest
from small_engines import Maker

from mesh.engine.vllm.environment import prepare

prepare()


@pytest.fixture(scope="module")
def make(solo_mesh):
    maker = Maker(solo_mesh)
    yield maker
    for engine in maker.built:
        engine.close()
