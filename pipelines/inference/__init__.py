"""From a trained detector to detections, their evaluation, and files that show them."""
