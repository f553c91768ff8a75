"""Triton kernels for erniequant. Importing this package does not import Triton; its modules do."""
