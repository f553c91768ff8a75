"""Matrix products of llama.cpp and ik_llama.cpp, through their shared library.

``pip install ik-llama-cpp-python`` brings a ``libggml.so`` that has the types of both.
"""

import ctypes
import weakref
from ctypes import POINTER, c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path

import torch

F32 = 0
HIGHEST_TYPE = 240
GRAPH_NODES = 64
ALIGNMENT = 64


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


class _Plan(ctypes.Structure):
    _fields_ = [
        ("work_size", c_size_t), ("work_data", c_void_p), ("n_threads", c_int),
        ("abort_callback", c_void_p), ("abort_callback_data", c_void_p),
    ]  # fmt: skip


_SIGNATURES: dict[str, tuple[object, list[object]]] = {
    "ggml_init": (c_void_p, [_InitParams]),
    "ggml_free": (None, [c_void_p]),
    "ggml_type_name": (c_char_p, [c_int]),
    "ggml_row_size": (c_size_t, [c_int, c_int64]),
    "ggml_quantize_chunk": (
        c_size_t, [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]
    ),
    "ggml_new_tensor_2d": (c_void_p, [c_void_p, c_int, c_int64, c_int64]),
    "ggml_get_data": (c_void_p, [c_void_p]),
    "ggml_mul_mat": (c_void_p, [c_void_p] * 3),
    "ggml_tensor_overhead": (c_size_t, []),
    "ggml_graph_overhead_custom": (c_size_t, [c_size_t, c_bool]),
    "ggml_new_graph_custom": (c_void_p, [c_void_p, c_size_t, c_bool]),
    "ggml_build_forward_expand": (None, [c_void_p] * 2),
    "ggml_graph_plan": (_Plan, [c_void_p, c_int]),
    "ggml_graph_compute": (c_int, [c_void_p, POINTER(_Plan)]),
}  # fmt: skip


class Ggml:
    """The library, and the numbers of its types by name."""

    def __init__(self, path: Path) -> None:
        self.lib = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self.lib, name)
            function.restype, function.argtypes = result, arguments
        # The first context fills the library's tables.
        self.lib.ggml_free(self.lib.ggml_init(_InitParams(1 << 20, None, False)))
        names = {number: self.lib.ggml_type_name(number) for number in range(HIGHEST_TYPE)}
        self.types = {name.decode(): number for number, name in names.items() if name}

    def row_bytes(self, kind: str, inputs: int) -> int:
        """Bytes of a row of weights."""
        return int(self.lib.ggml_row_size(self.types[kind], inputs))

    def quantised(self, kind: str, weights: torch.Tensor) -> torch.Tensor:
        """Float32 ``[N, K]`` to uint8 ``[N, bytes]``, all inputs of the same importance."""
        outputs, inputs = weights.shape
        rows = torch.zeros(outputs, self.row_bytes(kind, inputs), dtype=torch.uint8)
        importance = torch.ones(inputs)
        self.lib.ggml_quantize_chunk(
            self.types[kind], weights.data_ptr(), rows.data_ptr(), 0, outputs, inputs,
            importance.data_ptr(),
        )  # fmt: skip
        return rows

    def dequantised(self, kind: str, rows: torch.Tensor, inputs: int) -> torch.Tensor:
        """The weights that rows stand for, float32 ``[N, K]``."""
        function = getattr(self.lib, f"dequantize_row_{kind}")
        function.restype, function.argtypes = None, [c_void_p, c_void_p, c_int64]
        weights = torch.empty(len(rows), inputs)
        for row, target in zip(rows, weights, strict=True):
            function(row.data_ptr(), target.data_ptr(), inputs)
        return weights


class Products:
    """Products of tokens with many matrices, a few of them in a call.

    Weights of every matrix are the same few quantised rows, repeated:
    how long a product takes does not depend on them.
    """

    def __init__(
        self, ggml: Ggml, kind: str, sizes: list[tuple[int, int]], copies: int, tokens: int,
        threads: int,
    ) -> None:  # fmt: skip
        """sizes: outputs and inputs of the matrices of one call; ``copies`` calls have matrices of
        their own."""
        self.lib, self.kind = ggml.lib, kind
        row_bytes = {inputs: ggml.row_bytes(kind, inputs) for _, inputs in sizes}
        graph = self.lib.ggml_graph_overhead_custom(GRAPH_NODES, False)
        tensor = self.lib.ggml_tensor_overhead() + ALIGNMENT
        weights = sum(outputs * row_bytes[inputs] for outputs, inputs in sizes)
        results = sum(4 * tokens * outputs for outputs, _ in sizes)
        given = sum(4 * tokens * inputs + tensor for inputs in row_bytes)
        each = graph + weights + results + 2 * tensor * len(sizes) + (1 << 16)
        size = given + copies * each + (1 << 20)
        self.context = self.lib.ggml_init(_InitParams(size, None, False))
        if not self.context:
            raise MemoryError(f"no {size} bytes for the matrices")
        weakref.finalize(self, self.lib.ggml_free, self.context)
        self.inputs = {inputs: self._tensor(F32, inputs, tokens) for inputs in row_bytes}
        self.x = {inputs: torch.randn(tokens, inputs) for inputs in row_bytes}
        for inputs, x in self.x.items():
            ctypes.memmove(self.lib.ggml_get_data(self.inputs[inputs]), x.data_ptr(), x.nbytes)
        self.rows = {k: ggml.quantised(kind, torch.randn(64, k)) for k in row_bytes}
        self.sizes, self.tokens = sizes, tokens
        self.graphs = [self._graph(ggml.types[kind]) for _ in range(copies)]
        self.plans = [self.lib.ggml_graph_plan(graph, threads) for graph, _ in self.graphs]
        work = max(plan.work_size for plan in self.plans)
        self.work = torch.empty(work + ALIGNMENT, dtype=torch.uint8)
        for plan in self.plans:
            plan.work_data = self.work.data_ptr() + -self.work.data_ptr() % ALIGNMENT
        self.call_bytes = weights

    def _tensor(self, kind: int, inputs: int, rows: int) -> int:
        tensor = self.lib.ggml_new_tensor_2d(self.context, kind, inputs, rows)
        assert tensor, "the context is too small"
        return int(tensor)

    def _graph(self, kind: int) -> tuple[int, list[int]]:
        graph = self.lib.ggml_new_graph_custom(self.context, GRAPH_NODES, False)
        products = []
        for outputs, inputs in self.sizes:
            matrix = self._tensor(kind, inputs, outputs)
            rows = self.rows[inputs].repeat(-(-outputs // 64), 1)[:outputs].contiguous()
            ctypes.memmove(self.lib.ggml_get_data(matrix), rows.data_ptr(), rows.nbytes)
            product = self.lib.ggml_mul_mat(self.context, matrix, self.inputs[inputs])
            self.lib.ggml_build_forward_expand(graph, product)
            products.append(product)
        return graph, products

    def run(self, call: int) -> None:
        """Multiply the tokens with the matrices of a call."""
        i = call % len(self.graphs)
        status = self.lib.ggml_graph_compute(self.graphs[i][0], ctypes.byref(self.plans[i]))
        assert status == 0, status

    def result(self, call: int, matrix: int) -> torch.Tensor:
        """What a call computed: float32 ``[T, N]``."""
        found = torch.empty(self.tokens, self.sizes[matrix][0])
        address = self.lib.ggml_get_data(self.graphs[call][1][matrix])
        ctypes.memmove(found.data_ptr(), address, found.nbytes)
        return found
