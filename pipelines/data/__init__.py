"""From annotations and videos, shards or features to batches of windows."""
