"""Object store with the S3 API, in this process; other processes reach it over HTTP."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow.fs as pafs
from moto.server import ThreadedMotoServer

from pipelines.core.cluster import free_port

BUCKET = "re2tal"


@contextmanager
def object_store(address: str = "127.0.0.1") -> Iterator[dict[str, str]]:
    """Start an empty store with one bucket.

    Args:
        address: address of this machine at which the store is reached.

    Yields:
        Environment variables with which `s3://re2tal/...` leads to it.
    """
    port = free_port()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # else a line a request
    server = ThreadedMotoServer(address, port, verbose=False)
    server.start()
    endpoint = f"{address}:{port}"
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
