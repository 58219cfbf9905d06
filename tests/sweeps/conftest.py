"""The tiny data set and recipe of the pipelines' tests."""

from tests.pipelines.conftest import (  # noqa: F401 - fixtures
    _new_stores_are_copies,
    _no_store_is_left_over,
    ray_instance,
    tiny_plan,
    tiny_recipe,
    tiny_set,
)
