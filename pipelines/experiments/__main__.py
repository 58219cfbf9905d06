"""Runs the paper's experiments in this process, without Ray and MLflow.

python -m pipelines.experiments

It takes what `pipelines/reproduce.py` takes, and writes the same report.
"""

import sys

from pipelines.experiments.execution import execute_here
from pipelines.experiments.running import reproduce
from pipelines.experiments.settings import parse

if __name__ == "__main__":
    sys.exit(reproduce(parse(sys.argv[1:], __doc__ or ""), execute_here).failures)
