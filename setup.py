"""What pyproject.toml cannot say: `recipes/` and `conf/` lie beside the package and ship inside it.

In a checkout `mesh/__init__.py` finds them where they are, in a wheel they are `mesh/recipes` and
`mesh/conf`.
"""

from setuptools import find_packages, setup

BESIDE = {"mesh.recipes": "recipes", "mesh.conf": "conf"}

setup(
    packages=[*find_packages(include=["mesh", "mesh.*"]), *BESIDE],
    package_dir=BESIDE,
    package_data={"mesh": ["data/*/*"], "mesh.conf": ["*.yaml"]},
)
