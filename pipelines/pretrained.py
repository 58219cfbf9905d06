"""The pretrained weights of a backbone, wherever a command line says that they are."""

from pathlib import Path

from pipelines.storage import local_copy, require
from re2tal.backbones.published.by_name import PREFIX


def require_weights(weights: str | None, *, option: str = "--model.weights") -> str | None:
    """Checks that there is something where the weights should be.

    Args:
        weights: path or URI, URI of an artifact or a model in MLflow, or name of torchvision's such
            as `torchvision:swin3d_t/KINETICS400_V1`; None for a random beginning.
        option: the command-line option that sets them.

    Returns:
        The same, paths absolute.

    Raises:
        StorageError: if there is nothing.
    """
    if weights is None or weights.startswith(PREFIX):
        return weights
    return require(weights, what="The backbone's weights", option=option)


def fetch_weights(
    weights: str | None, folder: Path, *, tracking_uri: str | None = None
) -> str | Path | None:
    """Brings weights onto this machine.

    Args:
        weights: what `require_weights` returned.
        folder: where a copy may go; it exists.
        tracking_uri: MLflow's store.

    Returns:
        What `load_backbone_weights` takes; None for a random beginning.

    Raises:
        StorageError: if there is nothing in MLflow.
    """
    if weights is None or weights.startswith(PREFIX):
        return weights
    return local_copy(weights, folder, tracking_uri=tracking_uri)
