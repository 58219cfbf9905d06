"""An object store that speaks S3, in this process; other processes reach it over HTTP."""

import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow.fs as pafs
from moto.server import ThreadedMotoServer

BUCKET = "re2tal"


@contextmanager
def object_store() -> Iterator[dict[str, str]]:
    """Starts an empty store with one bucket.

    Yields:
        The environment in which `s3://re2tal/...` leads to it.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # else a line a request
    server = ThreadedMotoServer("127.0.0.1", port, verbose=False)
    server.start()
    endpoint = f"127.0.0.1:{port}"
    keys = {"access_key": "tester", "secret_key": "nobody knows"}
    try:
        store = pafs.S3FileSystem(
            endpoint_override=endpoint,
            scheme="http",
            region="us-east-1",
            allow_bucket_creation=True,
            **keys,
        )
        store.create_dir(BUCKET)
        yield {
            "AWS_ENDPOINT_URL": f"http://{endpoint}",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": keys["access_key"],
            "AWS_SECRET_ACCESS_KEY": keys["secret_key"],
        }
    finally:
        server.stop()
