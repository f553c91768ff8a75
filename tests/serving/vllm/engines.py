"""A program that runs vLLM's engine on some checkpoints, one after the other, and writes what they
said: tests start it, as an engine binds threads and environment of its process.

    python engines.py JOB.json

JOB.json has "runs", each with "name", "folder", "settings" of vllm.LLM, "prompts" (token ids, or
dictionaries that vLLM takes, with paths under "images"), "steps", "count" (bytes of floats, which
takes seconds) and "fails" (its error is the result); results go to "output", by name.
"""

import json
import sys
from pathlib import Path
from typing import Any

from counting import expert_bytes, float_bytes

PLAIN = {"dtype": "float32", "skip_tokenizer_init": True, "max_model_len": 64, "max_num_seqs": 4}


def with_images(prompt: dict[str, Any]) -> dict[str, Any]:
    """The prompt with the images instead of their paths."""
    from PIL import Image

    images = [Image.open(path) for path in prompt.pop("images", ())]
    return {**prompt, "multi_modal_data": {"image": images}} if images else prompt


def run(
    folder: str, settings: dict[str, Any], prompts: list[Any], steps: int, count: bool
) -> dict[str, Any]:
    """Greedy tokens and their likeliest five with log-probabilities, for each prompt."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(folder, **{**PLAIN, **settings})
    counted = (expert_bytes, float_bytes) if count else (expert_bytes,)
    before = [llm.apply_model(function) for function in counted]
    # Tokens by id, so that no tokenizer is needed.
    sampling = SamplingParams(
        temperature=0, max_tokens=steps, ignore_eos=True, logprobs=5, detokenize=False
    )
    given = [with_images(p) if isinstance(p, dict) else {"prompt_token_ids": p} for p in prompts]
    outputs = llm.generate(given, sampling, use_tqdm=False)
    after = [llm.apply_model(function) for function in counted]
    said = [
        {
            "prompt": list(output.prompt_token_ids),
            "tokens": list(output.outputs[0].token_ids),
            "logprobs": [
                {str(token): value.logprob for token, value in step.items()}
                for step in output.outputs[0].logprobs
            ],
        }
        for output in outputs
    ]
    del llm
    cleanup_dist_env_and_memory()
    return {"said": said, "before": before, "after": after}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    results = {}
    for each in job["runs"]:
        try:
            results[each["name"]] = run(
                each["folder"], each["settings"], each["prompts"], each["steps"], each["count"]
            )
        except Exception as error:
            if not each.get("fails"):
                raise
            results[each["name"]] = {"error": f"{type(error).__name__}: {error}"}
        # Those that are done count also if a later one kills the process.
        Path(job["output"]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
