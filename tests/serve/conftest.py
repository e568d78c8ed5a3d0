"""One server in front of the bundled model, for every module that asks."""

from collections.abc import Iterator

import pytest
from serving import Running, serve

from pagoda import EngineConfig, ServeConfig, pipeline
from pagoda.offline import Pipeline


@pytest.fixture(scope="session")
def mini() -> Iterator[Pipeline]:
    config = EngineConfig(device="cpu", dtype="float32", session_len=1024, max_batch_size=16, num_threads=2)
    with pipeline("mini", config) as pipe:
        yield pipe


@pytest.fixture(scope="session")
def server(mini: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    yield from serve(mini, ServeConfig(session_dir=str(tmp_path_factory.mktemp("sessions"))))
