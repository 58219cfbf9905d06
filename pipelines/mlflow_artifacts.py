"""Files that lie in MLflow, brought onto this machine."""

import os
from pathlib import Path

import mlflow
from mlflow.artifacts import download_artifacts
from mlflow.exceptions import MlflowException

from pipelines.storage import StorageError


def fetch(uri: str, folder: Path, *, tracking_uri: str | None, what: str) -> Path:
    """Downloads an artifact.

    Args:
        uri: `runs:/RUN/NAME`, `models:/NAME/VERSION` or `mlflow-artifacts:/...`.
        folder: where to; it exists.
        tracking_uri: of the store; None for that of this process.
        what: it is, for the message ("The model").

    Raises:
        StorageError: if there is nothing.
    """
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    if tracking_uri is not None:
        # of this process: given with the call, `models:/` would be looked for elsewhere
        mlflow.set_tracking_uri(tracking_uri)
    try:
        return Path(download_artifacts(artifact_uri=uri, dst_path=str(folder)))
    except (MlflowException, OSError) as error:
        store = mlflow.get_tracking_uri()
        raise StorageError(
            f"{what}: {uri} cannot be had from MLflow's store {store} ({error}). Correct the URI, "
            "or say where the runs are."
        ) from error
