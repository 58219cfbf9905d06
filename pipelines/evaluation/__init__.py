"""What `evaluate.py` is made of: detections with classes, numbers, tables."""
