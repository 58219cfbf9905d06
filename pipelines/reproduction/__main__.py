"""Runs the paper's experiments in this process, without Ray and MLflow.

python -m pipelines.reproduction

It takes what `pipelines/reproduce.py` takes, and writes the same report.
"""

import sys

from pipelines.reproduction.execution import execute_here
from pipelines.reproduction.running import reproduce
from pipelines.reproduction.settings import parse

if __name__ == "__main__":
    sys.exit(reproduce(parse(sys.argv[1:], __doc__ or ""), execute_here).failures)
