"""Runs one case: damage a copy of a micro checkpoint, call one target on it in process, judge.

A case is a seed and a number, nothing else, so any failure is replayed by naming the two. Anything
but a right success or an ErnieQuantError of one line that names something is a failure.
"""

import contextlib
import json
import random
import re
import shutil
import signal
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from mutate import mutate, mutate_lines
from safetensors.torch import load_file
from truth import Facts, facts, untouched, wrong

import erniequant
from erniequant.calibration.texts import CalibrationConfig, calibration_windows
from erniequant.errors import ErnieQuantError
from erniequant.formats.verbs import inspect, verify

SECONDS = 10
TARGETS = {"load": 6, "inspect": 3, "verify": 4, "export": 4, "dry_run": 4, "calibration": 2}
IDS = torch.tensor([[1, 5, 9, 30, 77, 77, 2]])
# Tokens for the vision experts, and an image of 2 x 4 patches of 4 x 4 pixels.
VISION = torch.tensor([[0, 0, 1, 1, 1, 0, 0]])
PATCHES = torch.linspace(-1, 1, 8 * 48).view(8, 48).to(torch.bfloat16)
GRID = torch.tensor([[1, 2, 4]])


class Hang(BaseException):
    """Raised by the alarm; not an Exception, so that nothing takes it for a reason to refuse."""


@dataclass(frozen=True)
class Verdict:
    """``kind`` is "refused", "right", or what went wrong: "escaped", "hung", "wrong"."""

    seed: int
    case: int
    target: str
    base: str
    mutations: tuple[str, ...]
    kind: str
    text: str

    @property
    def failed(self) -> bool:
        return self.kind not in ("refused", "right")

    def __str__(self) -> str:
        done = "\n".join(f"  - {m!r}" for m in self.mutations)
        return (
            f"{self.kind}: {self.target} on the {self.base} checkpoint after\n{done}\n{self.text}\n"
            f"replay: python tests/fuzz/soak.py --seed {self.seed} --case {self.case}"
        )


@dataclass
class Bases:
    """Pristine checkpoints by name, and what the targets make of them."""

    folders: dict[str, Path]
    lines: Path
    tokenizer: Any
    known: dict[tuple[str, str], Any] = field(default_factory=dict)
    facts: dict[str, Facts] = field(default_factory=dict)

    def of(self, base: str) -> Facts:
        if base not in self.facts:
            self.facts[base] = facts(self.folders[base])
        return self.facts[base]

    def pristine(self, target: str, base: str) -> Any:
        """Result on the undamaged checkpoint, None if it is refused by design."""
        key = (target, base)
        if key not in self.known:
            with tempfile.TemporaryDirectory() as work:
                try:
                    self.known[key] = RUN[target](self.folders[base], Path(work), self)
                except ErnieQuantError:
                    self.known[key] = None
        return self.known[key]


def _load(folder: Path, work: Path, bases: Bases) -> bytes:
    model, tokenizer = erniequant.load(folder, device="cpu")
    if tokenizer is not None:
        with contextlib.suppress(ErnieQuantError):
            tokenizer.eos_token  # noqa: B018
    with torch.no_grad():
        if model.config.model_type != "ernie4_5_vl_moe":
            return model(IDS).logits.float().numpy().tobytes()
        logits = model(input_ids=IDS, moe_mm_token_type_ids=VISION).logits
        features = model.model.get_image_features(PATCHES, GRID).pooler_output
        return b"".join(t.float().numpy().tobytes() for t in (logits, *features))


def _export(folder: Path, work: Path, bases: Bases) -> Any:
    erniequant.export(folder, work / "out", "bf16")
    tensors = {}
    for shard in (work / "out").glob("*.safetensors"):
        tensors |= {n: (t.dtype, t.shape, t.view(torch.uint8).numpy().tobytes())
                    for n, t in load_file(shard).items()}  # fmt: skip
    config = json.loads((work / "out" / "config.json").read_text())
    return SimpleNamespace(tensors=tensors, config=config)


def _dry_run(folder: Path, work: Path, bases: Bases) -> Any:
    report = erniequant.quantize(
        folder, work / "out", bits=2, max_tp=1, effort="fast", dry_run=True, threads=1
    )
    json.dumps(report.to_dict())
    return report


def _inspect(folder: Path, work: Path, bases: Bases) -> Any:
    found = inspect(folder)
    json.dumps(found.to_dict())
    return found


def _verify(folder: Path, work: Path, bases: Bases) -> Any:
    found = verify(folder)
    json.dumps(found.to_dict())
    return found


def _calibration(folder: Path, work: Path, bases: Bases) -> str:
    settings = CalibrationConfig(str(folder), samples=1000, length=8, chat_template="none")
    return calibration_windows(bases.tokenizer, settings).sha256


RUN: dict[str, Callable[[Path, Path, Bases], Any]] = {
    "load": _load, "inspect": _inspect, "verify": _verify, "export": _export,
    "dry_run": _dry_run, "calibration": _calibration,
}  # fmt: skip


def run_case(bases: Bases, seed: int, case: int) -> Verdict:
    """Draw target, checkpoint and 1 to 3 mutations from seed and case, and judge what happens."""
    rng = random.Random(f"{seed} {case}")
    target = rng.choices(list(TARGETS), list(TARGETS.values()))[0]
    quantized = ["packed", "sharded", "packed", "sharded", "packed_dense", "packed_vl"]
    plain = ["plain", "plain", "dense", "vl", "baidu_vl"]
    bases_of = {"dry_run": plain, "verify": quantized, "export": quantized,
                "calibration": ["lines"]}  # fmt: skip
    base = rng.choice(bases_of.get(target, [*quantized, *plain]))
    count = rng.choices((1, 2, 3), (6, 2, 1))[0]
    with tempfile.TemporaryDirectory() as root:
        work = Path(root)
        if target == "calibration":
            path = work / "calib.jsonl"
            shutil.copy(bases.lines, path)
            done = []
            for _ in range(count):
                if path.is_file() and not path.is_symlink():
                    done.append(mutate_lines(path, rng))
            return _judge_lines(bases, seed, case, path, work, tuple(done))
        folder = work / "in"
        shutil.copytree(bases.folders[base], folder)
        mutations = tuple(mutate(folder, rng) for _ in range(count))
        return judge(bases, seed, case, target, base, folder, work, mutations)


def judge(
    bases: Bases, seed: int, case: int, target: str, base: str, folder: Path, work: Path,
    mutations: tuple[str, ...],
) -> Verdict:  # fmt: skip
    """Run the target on a damaged folder."""

    def verdict(kind: str, text: str) -> Verdict:
        return Verdict(seed, case, target, base, mutations, kind, text)

    pristine = bases.pristine(target, base)
    before, after = bases.of(base), facts(folder)
    kind, found = attempt(lambda: RUN[target](folder, work, bases))
    stray = {p.name for p in work.iterdir()} - {"in", "out", "outside"}
    if list(folder.glob("EXECUTED")) or stray:
        return verdict("wrong", f"code of the checkpoint ran, or wrote elsewhere: {stray}")
    if kind == "right":
        if target == "verify" and not found.ok and untouched(target, before, after):
            return verdict("wrong", f"not ok though nothing it reads changed: {found.problems}")
        if pristine is None:
            return verdict("wrong", "success where even the undamaged one is refused")
        why = wrong(target, before, after, found, pristine)
        return verdict("wrong", why) if why else verdict("right", "")
    if kind == "refused" and pristine is not None and untouched(target, before, after):
        return verdict("wrong", f"refused though nothing it reads changed: {found}")
    return verdict(kind, found)


def _judge_lines(
    bases: Bases, seed: int, case: int, path: Path, work: Path, mutations: tuple[str, ...]
) -> Verdict:
    def verdict(kind: str, text: str) -> Verdict:
        return Verdict(seed, case, "calibration", "lines", mutations, kind, text)

    wanted = expected_windows(bases, path)
    kind, found = attempt(lambda: RUN["calibration"](path, work, bases))
    if kind == "right" and found != wanted:
        return verdict("wrong", f"windows {found}, json and the tokenizer give {wanted}")
    if kind == "refused" and wanted is not None:
        return verdict("wrong", f"refused, though every line is good: {found}")
    return verdict(kind, "" if kind == "right" else found)


def expected_windows(bases: Bases, path: Path) -> str | None:
    """Hash of the windows by plain json and the tokenizer; None if a line is no document."""
    from erniequant.data.token_hash import hash_token_ids

    ids: list[int] = []
    try:
        if not path.is_file():
            return None
        for line in path.read_bytes().decode("utf-8").split("\n"):
            text = _text_of(line.removeprefix("\ufeff"))
            if text.strip():
                ids += [*bases.tokenizer(text, add_special_tokens=False)["input_ids"],
                        bases.tokenizer.eos_token_id]  # fmt: skip
    except Exception:  # any failure here means that the file is not what it should be
        return None
    return hash_token_ids(torch.tensor(_windows(ids))) if len(ids) > 1 else None


def _text_of(line: str) -> str:
    """What a line says; empty where it is blank, null, or has nothing but empty texts."""
    if not line.strip():
        return ""
    pairs: Any = json.loads(line, object_pairs_hook=_Pairs)
    if isinstance(pairs, str) or pairs is None:
        return pairs or ""
    if pairs == []:
        return ""
    record = dict(pairs)
    assert len(record) == len(pairs)
    text = record.get("text")
    if record.get("messages") is not None and not (isinstance(text, str) and text.strip()):
        turns = record["messages"]
        assert isinstance(turns, list) and not isinstance(turns, _Pairs)
        messages = [dict(turn) for turn in turns]
        assert all(isinstance(m["role"], str) for m in messages)
        text = "\n".join(
            m["content"] if isinstance(m["content"], str) else "".join(m["content"] or [])
            for m in messages
        )
    assert "text" in record or "messages" in record
    text = text or ""
    text.encode("utf-8")
    return str(text)


class _Pairs(list[Any]):
    """An object as its keys and values, to be told from a list."""


def _windows(ids: list[int]) -> list[int]:
    return ids[: max(len(ids) // 8, 1) * 8]


def attempt(action: Callable[[], Any]) -> tuple[str, Any]:
    """Kind of outcome, with the result or the text of what was raised."""
    try:
        with _alarm(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return "right", action()
    except ErnieQuantError as error:
        text = str(error)
        if not text or len(text) > 3000 or not text.isprintable() or not re.search(r"\w", text):
            return "escaped", f"a refusal that is not one readable line: {text[:500]!r}"
        return "refused", text
    except Hang:
        return "hung", f"no answer within {SECONDS} s\n{traceback.format_exc()[-1500:]}"
    except BaseException as error:  # panics of Rust libraries are no Exceptions
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        return "escaped", traceback.format_exc()[-2500:]


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    def ring(*_: object) -> None:
        raise Hang

    # Small products on two threads spend their time waiting where cores are shared.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        torch.set_num_threads(threads)
