"""What `pipelines/doctor.py` looks at: a file a check, each of which returns findings.

What has to be seen on a node is gathered there as plain data (`nodes.ask`); what it means is told
by functions of that data, which need no cluster.
"""
