"""Features of a frozen backbone: how videos are sampled for them, files of them, reading them."""
