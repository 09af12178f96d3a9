"""What tests share: worlds of one rank, for models that are built on a mesh and for programs, the
browser of the report page, and the line that says when there is none."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from chromium import Browser, chromium, missing
from hypothesis import settings
from torch.distributed.device_mesh import DeviceMesh

from mesh.layout.meshes import AXES
from mesh.lifecycle.process import Process, start

WITHOUT_A_BROWSER = "report page: not tested in a browser: "
"""How the reason begins for which a test that needs a browser is skipped."""

settings.register_profile("shared machine", deadline=None)  # an example may wait for the CPU
settings.load_profile("shared machine")


@pytest.fixture(scope="module")
def solo_mesh() -> Iterator[DeviceMesh]:
    """A role's mesh of this process alone; the process group ends with the module."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield DeviceMesh("cpu", torch.zeros(1, 1, 1, dtype=torch.int64), mesh_dim_names=AXES)
    dist.destroy_process_group()


@pytest.fixture
def unlaunched(monkeypatch) -> None:
    """No launcher's variables in the environment, now and afterwards."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def process(unlaunched) -> Iterator[Process]:
    """This process as a program's only rank."""
    with start(device="cpu", timeout_seconds=30) as process:
        yield process


@pytest.fixture(scope="session")
def browser(tmp_path_factory) -> Iterator[Browser]:
    """Debian's Chromium, one for all tests of a worker."""
    if problem := missing():
        pytest.skip(f"{WITHOUT_A_BROWSER}{problem}")
    with chromium(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


def pytest_terminal_summary(terminalreporter) -> None:
    """Say at the end, also with -q, that the browser's part of the tests was left out, and why."""
    reasons = [str(report.longrepr[2]) for report in terminalreporter.stats.get("skipped", [])]
    found = [reason for reason in reasons if WITHOUT_A_BROWSER in reason]
    if found:
        terminalreporter.write_line(f"{found[0].removeprefix('Skipped: ')} ({len(found)} skipped)")
