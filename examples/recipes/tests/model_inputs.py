"""What several tests of networks look at: an image, and the parameters that learn."""

import torch


def photo(size, batch=1):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, 3, size, size), generator=generator, dtype=torch.uint8)


# What is learned


def learned(module):
    return {name for name, p in module.named_parameters() if p.requires_grad}
