"""Checks of `pipelines/doctor.py`; each returns findings.

Facts of a node are gathered there as plain data (`Cluster.ask`); functions of that data, which need
no cluster, judge them.
"""
