"""Unit tests start no ranks."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence

import pytest


@pytest.fixture(scope="module", autouse=True)
def no_launches() -> Iterator[None]:
    """A launch fails the test: it belongs to another tier."""
    popen = subprocess.Popen.__init__

    def checked(self, args: str | Sequence[str], *rest, **options) -> None:
        words = args.split() if isinstance(args, str) else list(map(str, args))
        launched = [w for w in words if w == "torch.distributed.run" or "/recipes/" in w]
        assert not launched, f"a unit test launches {launched[0]}; move it to another tier"
        popen(self, args, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess.Popen, "__init__", checked)
        yield
