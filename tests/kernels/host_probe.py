"""What `test_host` looks at, in a process of its own: the interpreter compiles nothing.

Prints one JSON object. Driver and device are not there; Triton and all of ours are.
"""

import json
import re
from collections.abc import Callable
from typing import Any

import torch
import triton

from erniequant.errors import ErnieQuantError
from erniequant.packing.schema import LayerSpec, MatrixSpec
from erniequant.runtime import experts, ops
from erniequant.runtime.experts import PackedExperts
from erniequant.runtime.warm_up import warm_up
from erniequant_kernels import launch
from erniequant_kernels.bench import host
from erniequant_kernels.bench.problem import SHAPES, random_matrices
from erniequant_kernels.moe import moe_experts
from erniequant_kernels.tuning import tables

PTX = re.compile(
    r"griddepcontrol\.\w+|\b(?:ld|st|cp\.async\.\w+\.shared|red|atom)\.global|cp\.async\.c[ag]"
)

TOKENS = (*range(1, 257), *range(257, 4097, 61), *range(272, 4097, 304))
"""Every count up to more than ten tokens an expert, which is where tiles change; then odd ones and
multiples of 16, which Triton by itself compiles apart."""

Arguments = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def batch(tokens: int, offset: int = 0) -> Arguments:
    """Inputs of the tiny shape; those of the experts begin ``offset`` elements into memory."""
    shape = SHAPES["tiny"]
    memory = torch.zeros(tokens * shape.hidden + offset, dtype=torch.bfloat16)
    x = memory[offset:].view(tokens, shape.hidden)
    return x, torch.zeros(tokens, shape.top_k, dtype=torch.int64), torch.ones(tokens, shape.top_k)


class Layer:
    """A tiny layer on a driver that keeps its launches."""

    def __init__(self, mocked: host.MockedDriver) -> None:
        self.mocked = mocked
        self.tuning = tables()["sm_90"]
        self.workspace: dict[int, str] = {}
        self.both = random_matrices(SHAPES["tiny"], 2, SHAPES["tiny"].experts, torch.device("cpu"))

    def fixed(self) -> list[torch.Tensor]:
        """Tensors of the weights."""
        return [tensor for matrix in self.both for tensor in matrix.tensors]

    def run(self, arguments: Arguments) -> list[list[Any]]:
        """Name, grid and arguments of every launch. Pointers into tensors of the layer are the
        tensor's name and an offset, those into the workspace numbers in order of appearance."""
        self.mocked.launches.clear()
        out = moe_experts(*arguments, *self.both, self.tuning)
        named = dict(enumerate([*arguments, *self.fixed(), out]))
        workspace = self.workspace = {}

        def name(arg: Any) -> Any:
            is_tensor = isinstance(arg, torch.Tensor)
            address = arg.data_ptr() if is_tensor else arg
            if not is_tensor and not (isinstance(arg, int) and arg > 2**32):
                return arg
            for slot, tensor in named.items():
                if 0 <= address - tensor.data_ptr() < tensor.nbytes:
                    return f"tensor {slot} + {address - tensor.data_ptr()}"
            return workspace.setdefault(address, f"workspace {len(workspace)}")

        return [
            [made.kernel, made.grid, [name(arg) for arg in made.args]]
            for made in self.mocked.launches
        ]


def same_launches(mocked: host.MockedDriver) -> dict[str, Any]:
    """Launches as Triton makes them, and those that are made again for other tensors."""
    layer = Layer(mocked)
    found = {}
    for tokens in (1, 7):
        recorded = layer.run(batch(tokens))
        pointers = counted(mocked, torch.Tensor)
        again = layer.run(batch(tokens))
        found[str(tokens)] = {
            "ordinary": recorded, "again": again,
            "tensors passed": [pointers, counted(mocked, torch.Tensor)],
        }  # fmt: skip
    return found


def counted(mocked: host.MockedDriver, kind: type) -> int:
    """Arguments of a type in the last launches."""
    return sum(isinstance(arg, kind) for made in mocked.launches for arg in made.args)


def pieces(mocked: host.MockedDriver) -> list[tuple[int, int]]:
    """First byte and end of each piece of the workspace, where launches are made again."""
    layer, sizes, real = Layer(mocked), {}, torch.empty

    def counting(*args: Any, **options: Any) -> torch.Tensor:
        made = real(*args, **options)
        sizes[made.data_ptr()] = made.nbytes
        return made

    torch.empty = counting  # type: ignore[assignment]
    layer.run(batch(5))
    torch.empty = real
    of = {name: sizes.get(address, 4) for address, name in layer.workspace.items()}
    layer.run(batch(5))
    return [(address, address + of[name]) for address, name in layer.workspace.items()]


def unaligned(mocked: host.MockedDriver) -> dict[str, Any]:
    """Compilations for inputs that begin in the middle of 16 bytes, after aligned ones."""
    layer = Layer(mocked)
    layer.run(batch(3))
    layer.run(batch(3))
    before = len(mocked.compiled)
    layer.run(batch(3, offset=1))
    tensors = counted(mocked, torch.Tensor)
    return {"compiled": mocked.compiled[before:], "tensors passed": tensors}


def ordered(_: host.MockedDriver) -> dict[str, list[list[str]]]:
    """What kernels do to global memory and to the order of launches, in PTX, by architecture; and
    whether they are launched early."""
    found = {}
    for arch in (80, 90):
        with host.mocked_driver(arch) as mocked:
            layer = Layer(mocked)
            for tokens in (1, 4000):  # packed and fused products
                layer.run(batch(tokens))
            kernels = {
                compiled.name: compiled
                for function in mocked.functions
                for compiled in function.device_caches[mocked.get_current_device()][0].values()
            }
            found[str(arch)] = [
                [name, compiled.metadata.launch_pdl, *PTX.findall(compiled.asm["ptx"])]
                for name, compiled in kernels.items()
            ]
    return found


def capture(mocked: host.MockedDriver) -> dict[str, Any]:
    """What is said in a capture before and after the kernels are ready."""
    layer = Layer(mocked)
    torch.cuda.is_available = lambda: True
    torch.cuda.is_current_stream_capturing = lambda: True
    said = []
    for ready in (False, True):
        if ready:
            torch.cuda.is_current_stream_capturing = lambda: False
            layer.run(batch(9))
            torch.cuda.is_current_stream_capturing = lambda: True
        try:
            layer.run(batch(9))
            said.append("")
        except ErnieQuantError as error:
            said.append(str(error))
    hook = triton.knobs.runtime.jit_cache_hook
    return {"said": said, "hook left": hook is not None}


def warmed_up(mocked: host.MockedDriver) -> dict[str, Any]:
    """Kernels that a layer compiles or loads after `warm_up`, whatever the batch, and before; and
    launches of `warm_up` itself."""
    shape = SHAPES["tiny"]
    spec = LayerSpec(MatrixSpec("cc2", 12, 64, 64), MatrixSpec("cc4", 13, 32, 64))
    layer = PackedExperts(shape.experts, shape.hidden, shape.inner, spec, "silu", "layer 1")

    def on_kernels(x: torch.Tensor, index: torch.Tensor, routing: torch.Tensor, *rest: Any) -> Any:
        *tensors, _spec, _activation = rest
        return ops.run_kernels(x, index, routing, tuple(tensors[:3]), tuple(tensors[3:]), spec)

    experts.moe_experts = on_kernels
    PackedExperts.launches_kernels = lambda *_: True  # type: ignore[method-assign]
    warm_up(layer, top_k=shape.top_k)
    ready, launched = list(mocked.compiled), [made.kernel for made in mocked.launches]
    for tokens in TOKENS:
        x, index, routing = batch(tokens)
        layer(x, index, routing.bfloat16())
    late = mocked.compiled[len(ready) :]
    warm_up(layer, top_k=shape.top_k)
    again = len(mocked.launches)
    warm_up(layer, top_k=shape.top_k)
    return {
        "ready": ready, "late": late, "launched": launched,
        "again": len(mocked.launches) - again,
    }  # fmt: skip


def forgotten(mocked: host.MockedDriver) -> list[bool]:
    """Whether batches of three sizes are launched again as they were, where two are kept."""
    layer, launch.MOST_KEPT = Layer(mocked), 2
    for tokens in (1, 2, 3):
        layer.run(batch(tokens))
    found = []
    for tokens in (3, 2, 1):  # the last is kept anew
        layer.run(batch(tokens))
        found.append(counted(mocked, torch.Tensor) == 0)
    return found


def watched(mocked: host.MockedDriver) -> int:
    """Launches made the ordinary way while somebody watches, after others that were kept."""
    layer = Layer(mocked)
    layer.run(batch(4))
    runtime = triton.knobs.runtime
    before, runtime.launch_enter_hook = runtime.launch_enter_hook, lambda _: None
    layer.run(batch(4))
    runtime.launch_enter_hook = before
    return counted(mocked, torch.Tensor)


def counts(_: host.MockedDriver) -> dict[str, int]:
    """Variants of each kernel."""
    return {
        f"{bits} bits {shape}: {kernel} {dict(matrix)}": count
        for shape, bits in (("21b", 2), ("21b", 4), ("vl", 2))
        for (kernel, matrix), count in host.variants(SHAPES[shape], bits, TOKENS).items()
    }


def main() -> None:
    """Run every probe on a driver of its own."""
    probes: tuple[Callable[[host.MockedDriver], Any], ...] = (
        same_launches, pieces, unaligned, warmed_up, watched, forgotten, ordered, counts, capture,
    )  # fmt: skip
    found = {}
    for probe in probes:
        with host.mocked_driver() as mocked:
            mocked.keeping = True
            found[probe.__name__] = probe(mocked)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
