"""What tests of products with packed weights share."""

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random_words(*shape):
    return torch.randint(-(2**31), 2**31, shape).to(torch.int32).to(DEVICE)


def assert_close(found, expected):
    # bfloat16 factors are multiplied exactly; only the order of float32 sums differs.
    bound = 1e-5 * expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=bound)
