"""Reads a quantised checkpoint with numpy and safetensors alone; written from docs/format.md.

Usage: python standalone_reader.py FOLDER     prints the mean square of every decoded matrix
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors import safe_open

CODES = {
    "cc2": (2, 2, "pair"),
    "cc2s": (2, 1, "half_sum"),
    "cc3": (3, 1, "half_sum"),
    "cc4": (4, 1, "half_sum"),
}
MULTIPLIERS = {
    "cc2": {
        8: 0x45C16C71,
        9: 0x7CA3694B,
        10: 0x9C7E8FCB,
        11: 0x82C4715F,
        12: 0x8F39E161,
        13: 0xEB945FB5,
        14: 0x899E2839,
        15: 0xA69A8B89,
        16: 0x93E6BC43,
    },
    "cc2s": {
        8: 0x74F3ABFF,
        9: 0x68FDB383,
        10: 0x523C5ECB,
        11: 0x8398C0C1,
        12: 0x582D6C9D,
        13: 0x5D0F3233,
        14: 0x518CAD05,
        15: 0xF3895985,
        16: 0xD33CB44F,
    },
    "cc3": {
        8: 0xEDA09CD3,
        9: 0x5A1C28CB,
        10: 0xE1E836FF,
        11: 0x78404F7D,
        12: 0xDAC43A8F,
        13: 0x4D58D98B,
        14: 0x83FB20B7,
        15: 0x737B4E41,
        16: 0xDA8CDBFF,
    },
    "cc4": {
        8: 0xB5FA5C69,
        9: 0x5A1C28CB,
        10: 0xAE3FF167,
        11: 0x9A5F88FD,
        12: 0xC4BCB17B,
        13: 0xCEE04E0F,
        14: 0xCF5FD7B9,
        15: 0x824EF67F,
        16: 0x59B4E6DB,
    },
}


def registers(sequences: np.ndarray, length: int, step: int) -> np.ndarray:
    """Step 2 and 3: uint32 [..., words] to register values [..., steps]."""
    bits = np.unpackbits(sequences.astype(">u4").view(np.uint8), axis=-1)
    n_bits = bits.shape[-1]
    last = np.arange(step - 1, n_bits, step)
    found = np.zeros((*bits.shape[:-1], last.size), dtype=np.uint32)
    for age in range(length):
        found |= bits[..., (last - age) % n_bits].astype(np.uint32) << np.uint32(age)
    return found


def labels(product: np.ndarray, kind: str) -> np.ndarray:
    """Step 5: products [..., steps] to weights [..., weights]."""
    q = (product & np.uint32(0x81F081F0)) ^ np.uint32(0x3F003F00)
    low = (q << np.uint32(16)).view(np.float32)
    high = (q & np.uint32(0xFFFF0000)).view(np.float32)
    if kind == "half_sum":
        return low + high
    return np.stack([low, high], axis=-1).reshape(*q.shape[:-1], -1)


def hadamard(matrix: np.ndarray, block: int) -> np.ndarray:
    """Step 7, along the last axis."""
    y = matrix.reshape(-1, block).copy()
    distance = 1
    while distance < block:
        pairs = y.reshape(y.shape[0], -1, 2, distance)
        y = np.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], axis=2)
        y = y.reshape(y.shape[0], block)
        distance *= 2
    return (y * np.float32(block**-0.5)).reshape(matrix.shape)


def decode(packed: np.ndarray, scale: np.ndarray, signs: np.ndarray, spec: dict) -> np.ndarray:
    """One expert: int32 [N/tile, K*words], int16 [N, 1], int32 [K/32] to float32 [N, K]."""
    bits, per_step, kind = CODES[spec["code"]]
    length, tile = spec["register_length"], spec["tile"]
    sequences = packed.view(np.uint32).reshape(packed.shape[0], -1, tile * bits // 32)
    state = registers(sequences, length, bits * per_step)
    product = state * np.uint32(MULTIPLIERS[spec["code"]][length])
    weights = labels(product, kind)  # [N/tile, K, tile]
    rotated = weights.transpose(0, 2, 1).reshape(-1, weights.shape[1])
    rotated = rotated * (scale.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    channel = np.arange(rotated.shape[1])
    negative = (signs.view(np.uint32)[channel // 32] >> (channel % 32).astype(np.uint32)) & 1
    return hadamard(rotated, spec["rotation_block"]) * (1 - 2 * negative.astype(np.float32))


def read(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """All quantised matrices of a checkpoint, float32 [N, K], under the names of the original."""
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    if settings["quant_method"] != "erniequant" or settings["format_version"] not in (1, 2):
        raise SystemExit(f"{folder} is not of format version 1 or 2")
    tensors = {}
    for shard in folder.glob("*.safetensors"):
        with safe_open(shard, "np") as file:
            for name in file.keys():  # noqa: SIM118
                if name.endswith(("_packed", "_scale", "_signs")) and ".mlp." in name:
                    tensors[name] = file.get_tensor(name)
    for layer, projections in settings["layers"].items():
        index, _, group = layer.partition(".")
        dense = group == "mlp"  # one expert, which has no number
        several = f"{group}." if group and not dense else ""
        prefix = f"model.layers.{index}.mlp." + ("" if dense else f"{several}experts.")
        for projection, spec in projections.items():
            parts = [tensors[f"{prefix}{projection}_{s}"] for s in ("packed", "scale", "signs")]
            for expert in range(parts[0].shape[0]):
                matrix = decode(parts[0][expert], parts[1][expert], parts[2][0, 0], spec)
                # Experts for images come after those for text.
                number = expert + (parts[0].shape[0] if group == "vision_moe" else 0)
                original = prefix if dense else f"{prefix.replace(several, '')}{number}."
                if projection == "down_proj":
                    yield f"{original}down_proj.weight", matrix
                else:
                    gate, up = np.split(matrix, 2)
                    yield f"{original}gate_proj.weight", gate
                    yield f"{original}up_proj.weight", up


if __name__ == "__main__":
    for matrix_name, values in read(Path(sys.argv[1])):
        print(matrix_name, values.shape, float(np.square(values).mean()))
