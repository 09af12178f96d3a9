"""The meshes of split and colocated layouts, in four real processes."""

from __future__ import annotations

from launching import launch


def test_meshes_of_four_processes():
    launch("tests/programs/meshes_program.py", 1)
