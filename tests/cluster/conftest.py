"""The tiny data set of the pipelines' tests."""

from tests.pipelines.conftest import (  # noqa: F401 - fixtures
    _no_store_is_left_over,
    tiny_plan,
    tiny_set,
)
