"""What a checkpoint folder holds, read without erniequant, and when a success on it is right.

A target may always refuse, unless nothing that it reads has changed. A success must be right:

inspect: the safetensors library lists the same tensors with the same shapes and dtypes in the files
    that the folder names, and the codes reported are those of config.json.
verify: "ok" only if all tensors and what quantization_config says are the pristine ones. It cannot
    know when the report, its only witness, was changed in the same case.
export: writes the pristine weights, bit for bit; same exception.
load: gives the pristine logits, bit for bit, unless what changed is what a header cannot show
    (bytes of a payload, or one float type for another of the same size) or a number of
    config.json that no tensor determines (`FREE`): that is another model, rightly loaded.
quantize --dry-run: the pristine plan; top_k may change with config.json, a tensor's float type with
    the header, and tensors that transformers does not require may come and go.
calibration: the windows that plain json and the tokenizer give.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

# Numbers of config.json that weights do not determine. Heads: two of them may change together.
FREE = {
    "rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta", "hidden_act", "moe_k",
    "num_experts_per_tok", "moe_norm_min", "dtype", "torch_dtype", "max_position_embeddings",
    "num_attention_heads", "num_key_value_heads", "head_dim", "attn_implementation",
    "_attn_implementation", "experts_implementation", "architectures", "model_type",
    "partial_rotary_factor", "num_heads", "freq_allocation",
}  # fmt: skip
OPTIONAL = ("mtp", "e_score_correction_bias", "lm_head.weight")
FLOATS = {"BF16", "F16", "F32", "F64"}
WEIGHTS_FILES = ("config.json", "model.safetensors.index.json", "quantization_report.json",
                 "adapter_config.json")  # fmt: skip


@dataclass(frozen=True)
class Facts:
    """One folder; `tensors` is None if the safetensors library cannot read it.

    ``tensors`` gives dtype, shape and digest by name, ``files`` the digest of everything else
    that is a regular file.
    """

    tensors: dict[str, tuple[str, tuple[int, ...], str]] | None
    config: dict[str, Any]
    report: Any
    files: dict[str, str]

    def headers(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {name: found[:2] for name, found in (self.tensors or {}).items()}


def facts(folder: Path) -> Facts:
    """Read a folder with json and safetensors alone."""
    files = {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.is_file()
    }
    return Facts(
        _tensors(folder), _object(folder / "config.json"),
        _object(folder / "quantization_report.json"), files,
    )  # fmt: skip


def _object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError):
        return {"damaged": True}
    return found if isinstance(found, dict) else {"damaged": True}


def _tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...], str]] | None:
    index = folder / "model.safetensors.index.json"
    shards = ["model.safetensors"]
    if index.exists() or index.is_symlink():
        listed = _object(index).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(n, str) for n in listed.values()):
            return None
        shards = sorted(set(listed.values()))
    found = {}
    try:
        for shard in shards:
            if not (folder / shard).is_file():  # a pipe would be opened, and waited for
                return None
            with safe_open(folder / shard, framework="np") as file:
                raw = (folder / shard).read_bytes()
                length = int.from_bytes(raw[:8], "little")
                header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
                for name in file.keys():  # noqa: SIM118
                    entry = header[name]
                    begin, end = entry["data_offsets"]
                    digest = hashlib.sha256(data[begin:end]).hexdigest()
                    found[name] = (entry["dtype"], tuple(entry["shape"]), digest)
    except Exception:  # the truth here is only that it cannot be read
        return None
    return found


def wrong(target: str, before: Facts, after: Facts, result: Any, pristine: Any) -> str | None:
    """Why a success is wrong, None if it is right; `result` and `pristine` are the target's."""
    if target == "calibration":
        return None if result == pristine else "other windows than json and the tokenizer give"
    if after.tensors is None:
        return "success on a folder that the safetensors library cannot read"
    return {
        "inspect": _inspect, "verify": _verify, "export": _export, "load": _load,
        "dry_run": _dry_run,
    }[target](before, after, result, pristine)  # fmt: skip


def untouched(target: str, before: Facts, after: Facts) -> bool:
    """Whether nothing changed that the target reads: then it must succeed."""
    # Tokenizers are loaded, and where files are copied, these are looked at.
    if target in ("load", "dry_run", "verify", "export"):
        return before.files == after.files
    relevant = {
        name
        for name in before.files | after.files
        if name.endswith((".safetensors", ".bin")) or name in WEIGHTS_FILES
    }
    return all(before.files.get(n) == after.files.get(n) for n in relevant)


def _meaning(config: dict[str, Any]) -> Any:
    settings = config.get("quantization_config")
    if not isinstance(settings, dict):
        return settings
    return {name: settings.get(name) for name in ("quant_method", "format_version", "layers")}


def _inspect(before: Facts, after: Facts, result: Any, pristine: Any) -> str | None:
    listed = {t.name: (t.dtype, t.shape) for t in result.tensors}
    if listed != after.headers():
        return "inspect lists other tensors than the safetensors library"
    if _meaning(after.config) == _meaning(before.config):
        same = (result.codes, result.quantized_layers) == (
            pristine.codes,
            pristine.quantized_layers,
        )
        return None if same else "other codes, though quantization_config is as before"
    return None


def _witnessed(before: Facts, after: Facts) -> bool:
    return before.report == after.report


def _verify(before: Facts, after: Facts, result: Any, pristine: Any) -> str | None:
    if not result.ok or not _witnessed(before, after):
        return None
    if after.tensors != before.tensors:
        return "ok with other tensors"
    if _meaning(after.config) != _meaning(before.config):
        return "ok with another quantization_config"
    return None


def _export(before: Facts, after: Facts, result: Any, pristine: Any) -> str | None:
    if _witnessed(before, after) and result.tensors != pristine.tensors:
        return "exported other weights"
    plain = {k: v for k, v in result.config.items() if k != "dtype"}
    wanted = _without_code({k: v for k, v in after.config.items() if k not in
              ("dtype", "torch_dtype", "quantization_config")})  # fmt: skip
    stock = before.config.get("architectures")
    if "architectures" in wanted and plain.get("architectures") == stock:
        # In place of classes that transformers does not know.
        wanted["architectures"] = stock
    return None if json.dumps(plain) == json.dumps(wanted) else "exported another config.json"


def _without_code(value: Any) -> Any:
    """Without what names code, or says in null or {} that nothing is quantised."""
    if isinstance(value, dict):
        gone = ("auto_map", "custom_pipelines")
        nothing = ("quantization_config", "compression_config")
        return {k: _without_code(v) for k, v in value.items()
                if k not in gone and not (k in nothing and v in (None, {}))}  # fmt: skip
    return [_without_code(v) for v in value] if isinstance(value, list) else value


def _shown(headers: dict[str, tuple[str, tuple[int, ...]]]) -> dict[str, Any]:
    """Headers as far as a change of them must be noticed."""
    return {
        name: ("float" if dtype in FLOATS else dtype, shape)
        for name, (dtype, shape) in headers.items()
        if not any(word in name for word in OPTIONAL)
    }


def _load(before: Facts, after: Facts, result: Any, pristine: Any) -> str | None:
    if result == pristine:
        return None
    if _shown(before.headers()) != _shown(after.headers()):
        return "loaded with other headers and gives other logits"
    changed = _changed(before.config, after.config)
    # NaN differs from itself, but then it was put there.
    if changed & FREE or before.tensors != after.tensors:
        return None
    return f"other logits, though only {sorted(changed)} of config.json changed"


def _changed(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    """Entries that differ, of the configs of decoder and vision tower too."""
    missing = object()
    found = set()
    for key in before.keys() | after.keys():
        old, new = before.get(key, missing), after.get(key, missing)
        if (
            key in ("text_config", "vision_config")
            and isinstance(old, dict)
            and isinstance(new, dict)
        ):
            found |= _changed(old, new)
        elif old != new:
            found.add(key)
    return found


def _dry_run(before: Facts, after: Facts, result: Any, pristine: Any) -> str | None:
    if _shown(before.headers()) != _shown(after.headers()):
        return "a plan for other headers"
    if set(result.plan.quantized) | set(result.plan.copied) != set(after.tensors or ()):
        return "a plan that does not cover the tensors"
    if (result.plan.quantized, result.plan.settings) != (
        pristine.plan.quantized,
        pristine.plan.settings,
    ):
        return "another plan"
    sizes = [{**vars(r.plan.model), "top_k": 0} for r in (result, pristine)]
    return None if sizes[0] == sizes[1] else "a plan for other sizes"
