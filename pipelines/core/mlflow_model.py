"""A trained detector as an MLflow model: code plus a folder of weights, nothing pickled.

MLflow runs this file when the model is loaded. `predict` takes paths of video files.
"""

from typing import Any

import mlflow.models
import pandas as pd
from mlflow.pyfunc.model import PythonModel

from re2tal.inference import detect
from re2tal.trained import load_detector


class DetectorModel(PythonModel):
    """Detector of actions in video files."""

    def load_context(self, context: Any) -> None:
        """Read the saved detector that was logged with the model."""
        self.model = load_detector(context.artifacts["detector"])

    # MLflow reads these annotations: it checks the input by them, and warns of any that it does
    # not know, such as a data frame.
    def predict(  # type: ignore[no-untyped-def]
        self,
        context,  # noqa: ARG002 - MLflow calls it with these three
        model_input: list[str],
        params=None,  # noqa: ARG002
    ):
        """Detect actions in the video files at the paths of `model_input`.

        Returns:
            A row for each detection: `video`, `start` and `end` in seconds, `label`, `score`; the
            best of a video first.
        """
        table = []
        for path in model_input:
            for row in detect(path, self.model).to_list():
                start, end = row.pop("segment")
                table.append({"video": path, "start": start, "end": end, **row})
        return pd.DataFrame(table, columns=["video", "start", "end", "label", "score"])


mlflow.models.set_model(DetectorModel())
