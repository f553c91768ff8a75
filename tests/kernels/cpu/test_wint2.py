"""WINT2 on the CPU against its decoder in plain torch."""

import pytest
import torch

from erniequant.codes.ccq.decode import decode_wint2
from erniequant.codes.ccq.order import K_ORDERS
from erniequant.packing.products import experts_forward
from erniequant_kernels.cpu.wint2_moe import moe_experts_wint2_cpu
from erniequant_kernels.matrices import Wint2Matrices
from tests.kernels.cpu.test_product import MACHINES

EXPERTS = 3


def matrix(inputs, outputs, k_order, spread=60.0):
    """Random codes with maps whose words go round, below zero and beyond 15 bits."""
    return Wint2Matrices(
        torch.randint(0, 256, (EXPERTS, inputs // 4, outputs)).to(torch.uint8),
        torch.randint(0, 256, (EXPERTS, inputs // 128, outputs)).to(torch.uint8),
        (torch.rand(EXPERTS, outputs) * 2e-4 + 1e-4).bfloat16(),
        torch.randn(EXPERTS, outputs) * spread,
        torch.randn(EXPERTS, outputs) * 1000,
        k_order,
    )


def reference(x, index, routing, gate_up, down):
    both = {"gate_up_proj": gate_up, "down_proj": down}

    def weight(projection, expert):
        m = both[projection]
        return decode_wint2(*(part[expert] for part in m.parts), k_order=m.k_order).T

    return experts_forward(x.float(), index, routing.float(), EXPERTS, weight, "silu")


# Outputs: 2 * 128 and 384 fill cache lines; 2 * 128 + inner of 128 is the smallest K of the format.
# 40 = 8 * 5 and 44 = 4 * 11 outputs (of down, the hidden size is free of its inputs here) leave
# vectors of eight and of four lanes.
@pytest.mark.parametrize("on", MACHINES)
@pytest.mark.parametrize("k_order", K_ORDERS)
@pytest.mark.parametrize("outputs", [384, 40, 44])
def test_one_projection(outputs, k_order, on):
    from erniequant_kernels.cpu.wint2_moe import _multiply

    m = matrix(256, outputs, k_order)
    x = torch.randn(9, 256)
    rows = torch.tensor([8, 1, 1, 0, 2, 3, 4, 5])
    found = _multiply(m, on, x, rows, [1, 0, 7], False)
    for row, source, expert in ((0, 8, 0), (1, 1, 2), (7, 5, 2)):
        weight = decode_wint2(*(part[expert] for part in m.parts), k_order=k_order)
        expected = x[source].double() @ weight.double()
        bound = 1e-5 * float(expected.abs().max())
        torch.testing.assert_close(found[row].double(), expected, rtol=0, atol=bound)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("tokens", [1, 13])
def test_a_layer(dtype, bound, tokens):
    gate_up, down = matrix(384, 2 * 128, "mma64"), matrix(128, 384, "mma64")
    x = torch.randn(tokens, 384).to(dtype)
    index = torch.randint(0, EXPERTS + 1, (tokens, 2))
    index[0, 0] = 1
    routing = torch.rand(tokens, 2).to(dtype)
    expected = reference(x, index, routing, gate_up, down)
    found = moe_experts_wint2_cpu(x, index, routing, gate_up, down)
    assert found.dtype == dtype
    limit = bound * float(expected.abs().max())
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=limit)


def test_words_beyond_int32_saturate():
    # As the decoder has them: every byte's word is the largest or the smallest number.
    m = matrix(128, 16, "plain", spread=1e9)
    x = torch.eye(128)
    from erniequant_kernels.cpu.machine import machine
    from erniequant_kernels.cpu.wint2_moe import _multiply

    found = _multiply(m, machine(), x, torch.arange(128), [128, 0, 0], False)
    expected = decode_wint2(*(part[0] for part in m.parts), k_order="plain")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
