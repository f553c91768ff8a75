"""The measurements among the parts of `make gpu`; `benchmarks.gpu.report` starts each by its name.

Each exits with 1 where something is wrong and tells it in a line; what it finds goes into records.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks.codes.study import measure as measure_code
from benchmarks.gpu.records import record
from benchmarks.gpu.search import search
from erniequant.codes import code_for_bits, register_length
from erniequant.codes.spec import ConvolutionalCode
from erniequant_kernels.bench.compiling import compiled_by, compiling_only
from erniequant_kernels.bench.cpu.machine import cores
from erniequant_kernels.bench.methods import TRITON_CONFIGS, packed, triton_bf16
from erniequant_kernels.bench.problem import (
    SHAPES,
    DenseExperts,
    Shape,
    make_batch,
    random_matrices,
)
from erniequant_kernels.bench.rows import against_the_fastest, wrong
from erniequant_kernels.bench.run import measure
from erniequant_kernels.bench.timing import copy_bandwidth, cuda_timer
from erniequant_kernels.moe import moe_experts
from erniequant_kernels.tuning import tuning_for

META = torch.device("meta")
RIVALS = 16
"""Among widths to compile for: our kernels on bfloat16 weights, the rivals that Triton compiles."""

GRAPH_BATCHES = 3
PROMPT = "The quick brown fox"
PERPLEXITY_TOKENS, CONTEXT = 4096, 512
PERPLEXITY_TOLERANCE = 0.01
"""Between a CPU and a GPU: sums in other orders, rounded to bfloat16 at other places."""

ENCODED_SEQUENCES = 500


@dataclass(frozen=True)
class Compiling:
    """A task: our kernels at some width for one batch, or the rival of some number for all."""

    shape: str
    tokens: tuple[int, ...]
    bits: int
    rival: int | None = None

    def __str__(self) -> str:
        what = f"{self.bits} bits" if self.rival is None else f"rival {self.rival}"
        return f"{self.shape}, {what}, {','.join(map(str, self.tokens))} tokens"

    def run(self, device: str) -> float:
        """Compile what the layers launch on a device; gives the seconds that it took."""
        begun = time.perf_counter()
        size = SHAPES[self.shape]
        if self.rival is None:
            method = packed(size, self.bits, META, tuning_for(torch.device(device)))
        else:
            method = triton_bf16(TRITON_CONFIGS[self.rival], no_weights(size))
        with compiling_only():
            for tokens in self.tokens:
                compiled_by(method.prepare(make_batch(size, tokens, META)))
        return time.perf_counter() - begun


def no_weights(size: Shape) -> DenseExperts:
    """Shapes and types without memory."""
    empty = partial(torch.empty, size.experts, dtype=torch.bfloat16, device=META)
    return DenseExperts(empty(2 * size.inner, size.hidden), empty(size.hidden, size.inner))


def tasks(shapes: list[str], widths: list[int], tokens: list[int]) -> Iterator[Compiling]:
    """All that has to be compiled, in pieces that different processes can do."""
    for shape in shapes:
        for bits in widths:
            if bits == RIVALS:
                for rival in range(len(TRITON_CONFIGS)):
                    yield Compiling(shape, tuple(tokens), bits, rival)
            else:
                yield from (Compiling(shape, (count,), bits) for count in tokens)


def compile_all(options: argparse.Namespace) -> bool:
    """Fill Triton's cache from as many processes as there are cores."""
    right = True
    begun = time.perf_counter()
    with ProcessPoolExecutor(len(cores()), mp_context=get_context("spawn")) as pool:
        jobs = {
            pool.submit(task.run, options.device): task
            for task in tasks(options.shapes, options.bits, options.tokens)
        }
        for job in as_completed(jobs):
            error = job.exception()
            found = f"{type(error).__name__}: {error}" if error else f"{job.result():.1f} s"
            print(f"{jobs[job]}: {found}", flush=True)
            right = right and error is None
    seconds = round(time.perf_counter() - begun, 1)
    record(compiled=len(jobs), processes=len(cores()), seconds=seconds)
    return right


def products(options: argparse.Namespace) -> bool:
    """Times of a layer's experts, ours and in bfloat16."""
    timer = cuda_timer()
    bandwidth = copy_bandwidth(timer)
    record(copy_gb_per_s=bandwidth / 1e9)
    device = torch.device(options.device)
    right = True
    for found in measure(options.shapes, options.tokens, options.bits, device, timer, bandwidth):
        for row in found.rows:
            record(row=row.to_dict())
            time_ = f"{row.microseconds:.1f} us" if row.microseconds else f"not run: {row.reason}"
            print(f"{row.shape} {row.tokens} tokens {row.method}: {time_}", flush=True)
        for ratio in found.ratios:
            record(ratio=ratio.to_dict())
        for best in against_the_fastest(found.rows, found.ratios):
            spread = f"{best.median:.2f} x ({best.low:.2f} ... {best.high:.2f})"
            print(f"{best.method}: {spread} as fast as {best.rival}", flush=True)
        for problem in wrong(found.rows):
            print(f"wrong: {problem}", flush=True)
            right = False
    return right


@torch.no_grad()
def graphs(options: argparse.Namespace) -> bool:
    """Whether a captured layer gives, on inputs and routing that change under it, the bits that it
    gives eagerly."""
    right = True
    device = torch.device(options.device)
    for shape in options.shapes:
        for bits in options.bits:
            run_layer = layer(shape, bits, device)
            for tokens in options.tokens:
                same = replays_equal(run_layer, shape, tokens, device)
                record(shape=shape, bits=bits, tokens=tokens, replay_equals_eager=same)
                print(f"{shape}, {bits} bits, {tokens} tokens: {same}", flush=True)
                right = right and same
    return right


Layer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def layer(shape: str, bits: int, device: torch.device) -> Layer:
    """The operator on random weights: inputs, indices and routing weights to outputs."""
    gate_up, down = random_matrices(SHAPES[shape], bits, SHAPES[shape].experts, device)
    tuning = tuning_for(device)
    return lambda x, index, routing: moe_experts(x, index, routing, gate_up, down, tuning)


def replays_equal(run: Layer, shape: str, tokens: int, device: torch.device) -> bool:
    """Capture on one batch, replay on others."""
    size = SHAPES[shape]
    static = make_batch(size, tokens, device)
    inputs = (static.x, static.expert_index, static.routing)
    run(*inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(*inputs)
    for turn in range(GRAPH_BATCHES):
        generator = torch.Generator().manual_seed(turn)
        # Tokens in another order bring other experts, and row tiles elsewhere.
        order = torch.randperm(tokens, generator=generator)
        index = (static.expert_index[order.to(device)] + turn) % size.experts
        x = torch.randn(tokens, size.hidden, generator=generator).to(static.x)
        static.x.copy_(x)
        static.expert_index.copy_(index)
        graph.replay()
        torch.cuda.synchronize()
        if not torch.equal(out, run(*inputs)):
            return False
    return True


def model(options: argparse.Namespace) -> bool:
    """The embedded tiny model, quantised here: perplexity on the GPU against that on the CPU,
    generation, speed."""
    import erniequant
    from erniequant.evaluate import perplexity, speed
    from erniequant_data import heldout_text, tiny_model_dir

    right = True
    for bits in options.bits:
        with tempfile.TemporaryDirectory() as folder:
            packed_folder = Path(folder) / "packed"
            erniequant.quantize(
                tiny_model_dir(), packed_folder, bits=bits, no_calib=True, effort="fast", max_tp=1
            )
            found, texts = {}, {}
            for device in ("cpu", options.device):
                loaded, tokenizer = erniequant.load(packed_folder, device=device)
                found[device] = perplexity(
                    loaded, tokenizer, heldout_text(), tokens=PERPLEXITY_TOKENS, context=CONTEXT
                ).perplexity
                texts[device] = erniequant.generate(
                    loaded, tokenizer, PROMPT, max_tokens=32, chat_template="none"
                ).text
            speeds = speed(loaded, prompt_tokens=256, new_tokens=32)
        difference = abs(found[options.device] / found["cpu"] - 1)
        right = right and difference <= PERPLEXITY_TOLERANCE
        record(bits=bits, perplexity=found, texts=texts, speed=speeds.to_dict())
        print(
            f"{bits} bits: perplexity {found}, apart by {100 * difference:.2f} %; "
            f"{speeds.prefill_tokens_per_second:.0f} tokens/s prefill, "
            f"{speeds.decode_tokens_per_second:.0f} decode; {texts}",
            flush=True,
        )
    return right


def encoding_rate(code: ConvolutionalCode, seed: int) -> float:
    """Weights a second of one thread."""
    return measure_code(code, ENCODED_SEQUENCES, seed).rate


def encoder(options: argparse.Namespace) -> bool:
    """Weights encoded a second, on one core and on all, by code."""
    for bits in options.bits:
        code = code_for_bits(bits, register_length(bits, "standard"))

        rate = partial(encoding_rate, code)
        one = rate(0)
        with ThreadPoolExecutor(len(cores())) as pool:
            together = sum(pool.map(rate, range(len(cores()))))
        name = f"{code.name} L{code.register_length}"
        record(code=name, one_core=one, cores=len(cores()), all_cores=together)
        print(f"{name}: {one:,.0f} weights/s on one core, {together:,.0f} on all", flush=True)
    return True


PROGRAMS = {
    "compile": compile_all, "products": products, "graphs": graphs, "model": model,
    "encoder": encoder, "search": search,
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run one."""

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("program", choices=PROGRAMS)
    parser.add_argument("--shapes", type=lambda text: text.split(","), default=["21b"])
    parser.add_argument("--bits", type=numbers, default=[2, 4], help="16: the rivals, to compile")
    parser.add_argument("--tokens", type=numbers, default=[1, 16, 64, 2048])
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(arguments)
    return 0 if PROGRAMS[options.program](options) else 1


if __name__ == "__main__":
    sys.exit(main())
