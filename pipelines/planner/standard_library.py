"""A way around a clash of names: Python has a `profile` too."""

import importlib.util
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType


def standard_library_profile() -> ModuleType:
    """Python's own module `profile`.

    A script's folder comes first on its path, so in `python pipelines/train.py` the standard
    library's `cProfile`, which PyTorch imports, would get `pipelines/profile.py` as `profile`.
    """
    ours = Path(__file__).parents[1]
    others = [folder for folder in sys.path if Path(folder).resolve() != ours]
    spec = PathFinder.find_spec("profile", others)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
