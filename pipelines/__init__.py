"""Ray, MLflow and command lines around `re2tal`: scaling, tracking, and the scripts."""

import sys
from pathlib import Path

# Python puts a script's own folder on its path, but not the parent: `python OTHER/pipelines/x.py`
# imports this package from wherever it is installed, which may be another checkout.
_ROOT = Path(__file__).resolve().parent.parent
_SCRIPT = Path(getattr(sys.modules["__main__"], "__file__", None) or __file__).resolve()
_OWN = _SCRIPT.parent.parent
_IS_OURS = _SCRIPT.parent.name in ("pipelines", "sweeps") and (_OWN / "re2tal").is_dir()
if _IS_OURS and _OWN != _ROOT:
    sys.exit(
        f"error: {_SCRIPT} would run the code of another checkout, {_ROOT}: install its own "
        f"(pip install -e {_OWN}), or set PYTHONPATH={_OWN}."
    )
