"""Trained detector as an MLflow model: code plus a folder of weights, nothing pickled.

MLflow runs this file when it loads the model. `predict` takes videos by path, by URI or by content:

  python -m mlflow models serve --model-uri models:/NAME/1 --env-manager local --port 5001

and a POST to `/invocations` with the JSON

  {"inputs": ["/videos/a.mp4", "s3://bucket/b.mp4", "data:video/mp4;base64,AAAA..."]}
"""

import base64
import binascii
from typing import Any

import mlflow.models
import pandas as pd
import pyarrow.fs as pafs
from mlflow.exceptions import MlflowException
from mlflow.pyfunc.model import PythonModel

from re2tal.inference import detect
from re2tal.trained import load_detector
from re2tal.videos.limits import VideoError

_SHOWN = 40  # characters of a video's content, in base64, in the answer


class DetectorModel(PythonModel):
    """Detector of actions in video files."""

    def load_context(self, context: Any) -> None:
        """Read the saved detector that was logged with the model."""
        self.model = load_detector(context.artifacts["detector"])

    # MLflow validates the input by these annotations, and warns of types that it does not know,
    # such as a data frame.
    def predict(  # type: ignore[no-untyped-def]
        self,
        context,  # noqa: ARG002 - MLflow calls it with these three
        model_input: list[str],
        params=None,  # noqa: ARG002
    ):
        """Detect actions in videos.

        Args:
            context: given by MLflow.
            model_input: for each video a path, a URI that pyarrow opens (s3://, gs://, file://), or
                the content as a data URI, `data:video/mp4;base64,...`.
            params: given by MLflow.

        Returns:
            A row for each detection: `video`, `start` and `end` in seconds, `label`, `score`. Each
            video's detections are sorted by score, the best first.

        Raises:
            MlflowException: a video does not exist or cannot be read. The error code is that of an
                invalid parameter, which a server reports as the client's error.
        """
        table = []
        for name in model_input:
            try:
                found = detect(_source(name), self.model).to_list()
            except (VideoError, ValueError, OSError) as problem:
                said = str(problem)
                message = said if _shown(name) in said else f"{_shown(name)}: {said}"
                raise MlflowException.invalid_parameter_value(message) from problem
            for row in found:
                start, end = row.pop("segment")
                table.append({"video": _shown(name), "start": start, "end": end, **row})
        return pd.DataFrame(table, columns=["video", "start", "end", "label", "score"])


def _source(name: str) -> str | bytes:
    """Return the path or the content of a video."""
    if name.startswith("data:"):
        head, _, content = name.partition(",")
        if not head.endswith(";base64"):
            raise ValueError("A video's content must begin with data:video/mp4;base64,")
        try:
            return base64.b64decode(content, validate=True)
        except binascii.Error as problem:
            raise ValueError(f"The content is not base64 ({problem}).") from problem
    if "://" not in name:
        return name
    filesystem, path = pafs.FileSystem.from_uri(name)
    with filesystem.open_input_stream(path) as stream:
        content_read: bytes = stream.read()
    return content_read


def _shown(name: str) -> str:
    return f"{name[:_SHOWN]}..." if name.startswith("data:") else name


mlflow.models.set_model(DetectorModel())
