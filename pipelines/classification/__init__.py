"""Training a backbone to classify trimmed videos: what `finetune_backbone.py` is made of."""
