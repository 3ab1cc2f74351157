"""Runs a module where nothing can be imported but what a machine with a GPU is sure to have.

`python tests/bare_environment.py -m pytest tests/test_*_gpu.py` runs a module as `python -m` does.
"""

import os
import runpy
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from importlib.metadata import packages_distributions, requires
from re import match

GIVEN = ("torch", "triton", "transformers", "numpy", "pytest")


def needed(names):
    """Distributions that these need, without extras, by their lower-case names."""
    found, todo = set(), list(names)
    while todo:
        name = todo.pop().lower().replace("_", "-")
        if name in found:
            continue
        found.add(name)
        try:
            lines = requires(name) or []
        except ModuleNotFoundError:
            continue
        todo += [match(r"[\w.-]+", line)[0] for line in lines if "extra ==" not in line]
    return found


class Bare(MetaPathFinder):
    """Finds no module of any other distribution."""

    def __init__(self):
        known = needed(GIVEN)
        self._hidden = {
            module
            for module, owners in packages_distributions().items()
            if not {owner.lower().replace("_", "-") for owner in owners} & known
        } - {"flexmask", "flexmask_kernels"}

    def find_spec(self, name, path=None, target=None):
        hidden = name.partition(".")[0] in self._hidden
        return None if hidden else PathFinder.find_spec(name, path, target)

    def find_distributions(self, *arguments):
        return PathFinder.find_distributions(*arguments)


if __name__ == "__main__":
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    sys.meta_path[sys.meta_path.index(PathFinder)] = Bare()
    _, module, *sys.argv[1:] = sys.argv[1:]  # "-m" first
    sys.path[0] = "."
    runpy.run_module(module, run_name="__main__", alter_sys=True)
