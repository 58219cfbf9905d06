"""Video backbones: frames in, temporal features out."""
