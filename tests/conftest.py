"""What all tests share."""

import torch

# tests run beside one another and beside Ray's workers; small tensors gain nothing from threads
torch.set_num_threads(1)
