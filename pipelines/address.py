"""The cluster that `RAY_ADDRESS` names: whether anything answers there."""

import os
import socket

_KNOCK_SECONDS = 5.0


class ClusterError(ConnectionError):
    """There is no cluster where there should be one; the message says where, and what to do."""


def require_cluster() -> None:
    """Ends a program in seconds whose cluster is gone.

    Raises:
        ClusterError: if nothing answers at `RAY_ADDRESS`.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    if problem := unreachable(address):
        raise ClusterError(
            f"The cluster at {address} (RAY_ADDRESS) cannot be joined ({problem}). Start it (ray "
            "start --head), correct the variable, or unset it to use this machine alone."
        )


def unreachable(address: str) -> str:
    """Knocks at a cluster's address: Ray itself would wait for minutes, and say nothing.

    Args:
        address: as in `RAY_ADDRESS`.

    Returns:
        Why nothing answers; empty if something does, or the address is no host and port.
    """
    host, _, port = address.rpartition("/")[2].rpartition(":")
    if not host or not port.isdigit():
        return ""
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_SECONDS):
            return ""
    except OSError as error:
        return str(error) or type(error).__name__
