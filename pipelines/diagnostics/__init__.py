"""Checks of `pipelines/doctor.py`, each of which returns findings.

`Cluster.ask` gathers facts of nodes as plain data; functions that need no cluster judge them.
"""
