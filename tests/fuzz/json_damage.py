"""Damage of JSON files: one change of structure or of bytes, drawn from a seeded generator."""

import json
import random
from pathlib import Path
from typing import Any

DEEP = "@@DEEP@@"
TWICE = "@@TWICE@@"

# Sizes that overflow something (31, 63 and 64 bits, memory, digits of Python) and near ones.
NUMBERS: list[Any] = [
    0, -1, 1, 2, 3, 4, 7, 2**16, 2**31, 2**40, 2**63, 2**64, 10**9, 10**12, 10**30, -(2**63),
    0.0, 0.5, 1.5, 8.0, -0.0, 1e300, float("nan"), float("inf"), float("-inf"), True, False,
]  # fmt: skip
TEXTS: list[Any] = [
    "", "x", "8", "../../outside/model.safetensors", "/etc/passwd", "..", ".", "a/b", "a\\b",
    "two\nlines", "\x1b[31mred", "nul\x00", "\ud800", "²", "１", "x" * 300, "long" * 25_000,
    "evil/kernel", "int8", "float16", "bfloat16", "relu", "llama", "erniequant",
]  # fmt: skip
OTHERS: list[Any] = [
    None, [], {}, [1, 2], [[]], {"": 0}, ["x"], {"a": {"b": []}}, [8, 8], [0], DEEP,
]  # fmt: skip

# Keys that transformers gives a meaning of their own, and values meant to do harm there.
PLANTED: list[tuple[str, Any]] = [
    ("auto_map", {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}),
    ("auto_map", {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}),
    ("auto_map", ["evil.Evil", None]),
    ("auto_map", "evil.Evil"),
    ("num_labels", 10**12),
    ("num_labels", -1),
    ("id2label", {"x": 1}),
    ("transformers_weights", "../outside/model.safetensors"),
    ("transformers_weights", "pytorch_model.bin"),
    ("attn_implementation", "evil/kernel"),
    ("_attn_implementation", "evil/kernel"),
    ("attn_implementation", "nothing"),
    ("experts_implementation", "evil/kernel"),
    ("text_config", {"hidden_size": 32}),
    ("text_config", 3),
    ("vision_config", {}),
    ("vision_config", None),
    ("sub_configs", {"a": 1}),
    ("layer_types", ["full_attention"]),
    ("head_dim", 2**40),
    ("head_dim", 0),
    ("dtype", "float64"),
    ("dtype", "nothing"),
    ("dtype", ["float32"]),
    ("torch_dtype", "int8"),
    ("architectures", ["LlamaForCausalLM"]),
    ("architectures", 3),
    ("is_encoder_decoder", True),
    ("return_dict", False),
    ("output_hidden_states", True),
    ("tokenizer_class", "Evil"),
    ("tokenizer_file", "../outside/tokenizer.json"),
    ("vocab_file", "/etc/passwd"),
    ("init_inputs", ["x", "y"]),
    ("chat_template", "{{ 1/0 }}"),
    ("chat_template", "{{ ''.__class__.__mro__ }}"),
    ("added_tokens_decoder", {"99999999999999999999": {"content": "x"}}),
    ("added_tokens_decoder", {"x": {"content": "x"}}),
    ("added_tokens_decoder", {"5": 3}),
    ("additional_special_tokens", 3),
    ("extra_special_tokens", [3]),
    ("eos_token", {"content": 3}),
    ("eos_token", 3),
    ("model_max_length", "x"),
    ("quantization_config", {"quant_method": "gptq", "bits": 4}),
    ("quantization_config", None),
    ("quantization_config", {"quant_method": "erniequant"}),
    ("rope_scaling", {"type": "linear", "factor": 0}),
    ("rope_parameters", {"rope_type": "nothing"}),
    ("rope_parameters", None),
    ("use_bias", True),
    ("tie_word_embeddings", False),
    ("pad_token_id", 10**6),
    ("gguf_file", "x.gguf"),
    ("config", {}),
    ("self", 1),
    ("", 1),
    ("name_or_path", "../outside"),
    ("_commit_hash", 3),
    ("generation_config", {"x": 1}),
    ("max_new_tokens", -5),
    ("do_sample", "yes"),
    ("custom_generate", "evil"),
    ("sha256", {"../outside/model.safetensors": "0" * 64}),
    ("sha256", {"model.safetensors": 3}),
    ("sha256", {}),
    ("sha256", []),
    ("format", {}),
]


def damage_json(path: Path, rng: random.Random) -> str:
    """Change one thing in a JSON file; returns what."""
    raw = path.read_bytes()
    kind = rng.choices(("structure", "plant", "bytes"), (7, 2, 2))[0]
    contents = _parsed(raw)
    if kind == "bytes" or not isinstance(contents, dict):
        return _damage_bytes(path, raw, rng)
    if kind == "plant":
        key, value = rng.choice(PLANTED)
        target = rng.choice(_mappings(contents)) if rng.random() < 0.1 else contents
        target[key] = value
        what = f"{path.name}: {key!r} = {value!r}"
    else:
        what = f"{path.name}: {_restructure(contents, rng)}"
    _write(path, contents, rng)
    return what[:300]


def _parsed(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return None


def _mappings(node: Any) -> list[dict[str, Any]]:
    found = [node] if isinstance(node, dict) else []
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    for child in children:
        found += _mappings(child)
    return found


def _restructure(contents: dict[str, Any], rng: random.Random) -> str:
    node: Any = contents
    where = ""
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return f"nothing at {where}"
        # What the format says of its codes is nested deep; half of the time that way.
        nested = [key for key in keys if isinstance(node[key], (dict, list)) and node[key]]
        key = rng.choice(nested if nested and rng.random() < 0.5 else keys)
        where += f"/{key}"
        child = node[key]
        if not (isinstance(child, (dict, list)) and child) or rng.random() < 0.3:
            break
        node = child
    how = rng.choice(("delete", "number", "number", "text", "other", "near", "rename", "twice"))
    old = node[key]
    if how == "delete":
        del node[key]
        return f"delete {where}"
    if how == "rename" and isinstance(node, dict):
        new = rng.choice([key + "_", key.upper(), "x\ny", key[:-1], "\ud800", "9" * 5000, "../x"])
        node[new] = node.pop(key)
        return f"rename {where} to {new!r:.40}"
    if how == "twice" and isinstance(node, dict):
        node[TWICE + key] = rng.choice([old, *NUMBERS, *OTHERS])
        return f"{where} twice"
    if how == "near" and isinstance(old, (int, float)):
        factor, added = rng.choice([(2, 0), (1, 1), (1, -1), (-1, 0), (1.0, 0)])
        node[key] = old * factor + added
    elif how == "near" and isinstance(old, str) and old:
        at = rng.randrange(len(old))
        node[key] = old[:at] + rng.choice("x0/.\n") + old[at + 1 :]
    else:
        pool = {"number": NUMBERS, "text": TEXTS}.get(how, OTHERS)
        node[key] = rng.choice(pool)
    return f"{where} {old!r:.60} -> {node[key]!r:.60}"


def _write(path: Path, contents: dict[str, Any], rng: random.Random) -> None:
    text = json.dumps(contents, indent=rng.choice([None, 2]))
    depth = rng.choice([100, 900, 100_000])
    text = text.replace(f'"{DEEP}"', "[" * depth + "]" * depth).replace(TWICE, "")
    path.unlink()
    path.write_text(text)


def _damage_bytes(path: Path, raw: bytes, rng: random.Random) -> str:
    data = bytearray(raw)
    how = rng.choice(("truncate", "flip", "flip", "insert", "utf16", "bom", "empty", "foreign"))
    at = rng.randrange(len(data)) if data else 0
    if how == "truncate":
        del data[at:]
    elif how == "flip" and data:
        data[at] ^= 1 << rng.randrange(8)
    elif how == "insert":
        data[at:at] = rng.choice([b"\xff\xfe", b"\x00", b"{", b"]", b"\n", b"NaN", b"\xed\xa0\x80"])
    elif how == "utf16":
        data = bytearray(raw.decode("utf-8", "replace").encode("utf-16"))
    elif how == "bom":
        data = bytearray(b"\xef\xbb\xbf" + raw)
    elif how == "empty":
        data = bytearray()
    else:
        data = bytearray(rng.choice([b"null", b"3", b"[]", b'"text"', b"{}", b"[" * 200_000]))
    path.unlink()
    path.write_bytes(data)
    return f"{path.name}: {how} at {at}"
