"""One engine of vLLM that answers as often as it is told to; `benchmarks.serving.page` runs two.

    python -m benchmarks.serving.run FOLDER

Prints "ready"; then for every line ``STREAMS NEW_TOKENS`` on stdin, the seconds that it took.
"""

import sys
import time

PROMPT_TOKENS = 16


def main() -> None:
    """Answer until stdin ends."""
    from vllm import LLM, SamplingParams

    # Lines of vLLM itself go to stdout as well; the page looks for ours.
    llm = LLM(sys.argv[1], skip_tokenizer_init=True, max_model_len=256, max_num_seqs=16)
    print("ready", flush=True)
    for line in sys.stdin:
        streams, tokens = map(int, line.split())
        sampling = SamplingParams(
            temperature=1, seed=1, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        # Different texts, as equal ones would share experts, and a cache would keep them.
        salt = time.monotonic_ns() % 89
        prompts = [
            {"prompt_token_ids": [2 + (7 * i + 31 * s + salt) % 90 for i in range(PROMPT_TOKENS)]}
            for s in range(streams)
        ]
        started = time.perf_counter()
        llm.generate(prompts, sampling, use_tqdm=False)
        print("seconds", time.perf_counter() - started, flush=True)


if __name__ == "__main__":
    main()
