"""Reinforcement learning of language models as one SPMD program, exact to the bit."""

from pathlib import Path

# A wheel has `mesh/recipes`; in a checkout it lies beside the package, and `mesh.recipes` finds it.
if not Path(__file__).with_name("recipes").is_dir():
    __path__.append(str(Path(__file__).resolve().parents[1]))
