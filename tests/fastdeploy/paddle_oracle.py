"""Compare our wint8 and wint4 packers with paddle.nn.quant.weight_quantize, byte for byte.

Run by an interpreter that has paddlepaddle (CPU), numpy and torch or only the first two: in two
steps then, because paddlepaddle and torch stay in environments of their own.

    python tests/fastdeploy/paddle_oracle.py expect FILE.npz     # where paddle is
    python tests/fastdeploy/paddle_oracle.py compare FILE.npz    # where erniequant is
"""

import sys
from collections.abc import Iterator

import numpy as np

SHAPES = ((64, 16), (64, 64), (256, 128), (512, 64), (128, 1040), (2560, 3072))
DTYPES = ("bfloat16", "float16")
ALGORITHMS = ("weight_only_int8", "weight_only_int4")


def cases() -> Iterator[tuple[str, np.ndarray]]:
    """Weights float32 ``[K, N]`` by name: Gaussian, outliers, ties, zeros, subnormal scales."""
    rng = np.random.default_rng(20250723)
    for inputs, outputs in SHAPES:
        weight = rng.standard_normal((inputs, outputs)).astype(np.float32) * 0.05
        weight[rng.integers(inputs), rng.integers(outputs)] = 3.0
        yield f"gauss_{inputs}x{outputs}", weight
    # Largest magnitude 127 * 2**-6 or 7 * 2**-6: the scale is 2**-6 and halves are exact ties.
    for largest in (127, 7):
        halves = rng.integers(-2 * largest, 2 * largest + 1, (128, 64)).astype(np.float32) / 2
        halves[0] = largest
        yield f"ties_{largest}", halves * np.float32(2.0**-6)
    zeros = rng.standard_normal((64, 64)).astype(np.float32)
    zeros[:, ::3] = 0
    zeros[:, 1] = -0.0
    yield "zero_columns", zeros
    # float16 rounds the scale of the first half to zero.
    tiny = rng.standard_normal((64, 64)).astype(np.float32)
    tiny[:, :32] *= 1e-7
    yield "tiny", tiny


def expect(path: str) -> None:
    """Write Paddle's answers."""
    import paddle
    from paddle.nn.quant import weight_quantize

    found: dict[str, np.ndarray] = {}
    for name, weight in cases():
        for dtype in DTYPES:
            for algorithm in ALGORITHMS:
                tensor = paddle.to_tensor(weight).astype(dtype)
                packed, scale = weight_quantize(tensor, algo=algorithm, arch=80)
                key = f"{name}/{dtype}/{algorithm}"
                found[f"{key}/packed"] = packed.numpy()
                found[f"{key}/scale"] = scale.astype("float32").numpy()
    np.savez(path, **found)
    print(f"paddle {paddle.__version__}: {len(found) // 2} answers")


def compare(path: str) -> int:
    """Number of matrices whose bytes or scales differ from ours; prints each."""
    import torch

    from erniequant.formats.fastdeploy.packers import WINT4, WINT8

    wrong = total = 0
    with np.load(path) as expected:
        for name, weight in cases():
            for dtype in DTYPES:
                for algorithm, packing in zip(ALGORITHMS, (WINT8, WINT4), strict=True):
                    key = f"{name}/{dtype}/{algorithm}"
                    ours = packing.round(torch.from_numpy(weight), getattr(torch, dtype))
                    theirs = expected[f"{key}/packed"]
                    same_scale = np.array_equal(
                        ours.weight_scale.float().numpy(), expected[f"{key}/scale"]
                    )
                    same_shape = ours.quant_weight.shape == theirs.shape
                    bytes_off = (
                        int((ours.quant_weight.numpy() != theirs).sum()) if same_shape else -1
                    )
                    total += 1
                    if bytes_off or not same_scale:
                        wrong += 1
                        print(f"{key}: {bytes_off} bytes differ, scales equal: {same_scale}")
    print(f"{total} matrices, {wrong} differ from paddle")
    return wrong


if __name__ == "__main__":
    command, file = sys.argv[1:]
    sys.exit(1 if command == "compare" and compare(file) else command == "expect" and expect(file))
