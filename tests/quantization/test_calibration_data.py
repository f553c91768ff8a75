"""Calibration data as users have it, through the whole of `quantize`, for every kind of model."""

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import erniequant
from erniequant.calibration.texts import CalibrationWindows
from erniequant.errors import ErnieQuantError
from erniequant.progress import NullProgress
from erniequant.quantization.report import QuantizationReport
from testing.micro_model import add_tokenizer
from tests.micro import CALIBRATION, StopAfter
from tests.micro_vl import write_image

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = [f"the text of number {number}, which is one of many" for number in range(30)]
Quantize = Callable[..., QuantizationReport]


@pytest.fixture(scope="module", params=["text", "vl", "dense"])
def source(
    request: pytest.FixtureRequest,
    micro_source: Path,
    micro_vl: Path,
    micro_dense: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    if request.param == "text":
        return micro_source
    if request.param == "vl":
        return micro_vl
    folder = tmp_path_factory.mktemp("dense") / "source"
    shutil.copytree(micro_dense, folder)
    return add_tokenizer(folder)


class Messages(NullProgress):
    def __init__(self) -> None:
        self.found: list[str] = []

    def message(self, text: str) -> None:
        self.found.append(text)


@pytest.fixture
def quantize(source: Path, tmp_path: Path) -> Quantize:
    """Quantises the source for a look at what it was calibrated on: nothing but a plan, or all."""

    def run(calib: Any, **changes: Any) -> QuantizationReport:
        options = {**CALIBRATION, "bits": 2, "device": "cpu", "threads": 1, **changes}
        return erniequant.quantize(source, tmp_path / "q", calib=calib, **options)

    return run


class Read(Exception):
    """The data was read, and that is all we want to know."""


Windows = Callable[..., CalibrationWindows]


@pytest.fixture
def windows_of(quantize: Quantize, monkeypatch: pytest.MonkeyPatch) -> Windows:
    """What a run would be calibrated on."""

    def read(calib: Any, **changes: Any) -> CalibrationWindows:
        found: list[CalibrationWindows] = []

        def stop(checkpoint: Any, plan: Any, config: Any, windows: Any, device: Any) -> Any:
            found.append(windows)
            raise Read

        monkeypatch.setattr("erniequant.quantization.pipeline.run_identity", stop)
        with pytest.raises(Read):
            quantize(calib, **changes)
        return found[0]

    return read


@pytest.fixture
def sha256_of(windows_of: Windows) -> Callable[..., str]:
    return lambda calib, **changes: windows_of(calib, **changes).sha256


def lines(records: list[Any]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def test_the_same_texts_from_everywhere(
    sha256_of: Callable[[Any], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets import Dataset
    from torch.utils.data import DataLoader

    records = [{"text": text} for text in TEXTS]
    with_rubbish = [{"text": ""}, *records[:9], None, {"text": " \n"}, *records[9:], {"text": None}]
    (tmp_path / "a.jsonl").write_text(lines(records))
    (tmp_path / "marked.JSONL").write_bytes(
        lines(records).replace("\n", "\r\n").encode("utf-8-sig")
    )
    (tmp_path / "rubbish.jsonl").write_text(lines(with_rubbish) + "\n\n")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines(records).encode()))
    (tmp_path / "a.json").write_text(json.dumps(records))
    (tmp_path / "a.csv").write_text("id,text\n" + "".join(f'1,"{text}"\n' for text in TEXTS))
    Dataset.from_list(records).to_parquet(str(tmp_path / "a.parquet"))
    expected = sha256_of(str(tmp_path / "a.jsonl"))
    for name in ("marked.JSONL", "rubbish.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.parquet"):
        assert sha256_of(str(tmp_path / name)) == expected, name
    monkeypatch.setenv("HOME", str(tmp_path))
    rows = Dataset.from_list(records)
    loader: Any = DataLoader(TEXTS, batch_size=4)  # type: ignore[arg-type]
    for calib in (
        "~/a.jsonl", Path("~/a.jsonl"), [Path("~/a.jsonl")], TEXTS, tuple(TEXTS), iter(TEXTS),
        records, with_rubbish, (r for r in records), rows, rows.to_iterable_dataset(), loader,
        DataLoader(records, batch_size=7),  # type: ignore[arg-type]
    ):  # fmt: skip
        assert sha256_of(calib) == expected, calib


def test_the_same_chats_from_everywhere(sha256_of: Callable[..., str], tmp_path: Path) -> None:
    chats = [[{"role": "user", "content": t}, {"role": "bot", "content": t[::-1]}] for t in TEXTS]
    in_parts = [
        [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in chat] for chat in chats
    ]
    share = [[{"from": m["role"], "value": m["content"]} for m in chat] for chat in chats]
    for name, made in (("a", chats), ("parts", in_parts)):
        (tmp_path / f"{name}.jsonl").write_text(lines([{"messages": chat} for chat in made]))
    (tmp_path / "share.json").write_text(json.dumps([{"conversations": chat} for chat in share]))
    none = {"chat_template": "none"}
    expected = sha256_of(str(tmp_path / "a.jsonl"), **none)
    for calib in (
        str(tmp_path / "parts.jsonl"), str(tmp_path / "share.json"), chats, in_parts,
        iter(chats), [{"messages": chat} for chat in chats],
    ):  # fmt: skip
        assert sha256_of(calib, **none) == expected


def test_a_large_text_as_a_small_one(
    sha256_of: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from erniequant.data import tokens

    path = tmp_path / "a.txt"
    path.write_text("".join(f"{text}\n" for text in TEXTS) * 10)
    expected = sha256_of(path)
    monkeypatch.setattr(tokens, "PIECE", 500)
    assert sha256_of(path) == expected


def test_empty_rows_are_counted(windows_of: Windows, quantize: Quantize, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(lines([{"text": ""}, *({"text": t} for t in TEXTS[:3]), {"messages": []}]))
    watch = Messages()
    assert windows_of(str(path), progress=watch).empty == 2
    assert f"skipped 2 empty rows of {path}" in watch.found
    path.write_text(lines([{"text": ""}, {"text": None}]))
    with pytest.raises(ErnieQuantError, match="holds no text"):
        quantize(str(path))


def test_token_ids_and_batches(sha256_of: Callable[[Any], str]) -> None:
    from torch.utils.data import DataLoader, TensorDataset

    ids = torch.randint(2, 90, (6, 17), generator=torch.Generator().manual_seed(1))
    expected = sha256_of([{"input_ids": ids}])
    padded = torch.cat([ids, torch.zeros(6, 2, dtype=torch.int64)], dim=1)
    mask = torch.ones_like(padded)
    mask[:, -2:] = 0
    loader: Any = DataLoader(TensorDataset(ids), batch_size=4)
    for calib in (
        ids, list(ids), ids.numpy(), ids.tolist(), [ids[:2], ids[2:]], iter(ids), loader,
        {"input_ids": ids}, [{"input_ids": padded, "attention_mask": mask}],
        [{"input_ids": row.tolist()} for row in ids],
    ):  # fmt: skip
        assert sha256_of(calib) == expected, calib


def test_an_iterator_that_never_ends(windows_of: Windows) -> None:
    def forever(member: Any) -> Any:
        while True:
            yield member

    # As many sequences as samples.
    assert windows_of(forever(torch.arange(2, 22))).tokens == 12 * 20
    assert windows_of(forever(TEXTS[0])).tokens == 12 * 64


def test_a_dry_run_takes_nothing_out_of_an_iterator(quantize: Quantize) -> None:
    for members in (TEXTS, [torch.arange(2, 22)] * 12):
        waiting = iter(members)
        report = quantize(waiting, dry_run=True)
        assert report.dry_run and len(list(waiting)) == len(members)


@pytest.mark.parametrize(
    ("calib", "message"),
    [
        (None, "calib is None; leave it out.*no_calib=True"),
        (3, "calib is an int; give"),
        (["a", 3], r"calib\[1\] is an int"),
        ([], "calib is empty"),
        ([torch.tensor([3, 4]), torch.tensor([5, 4000])], r"calib\[1\] has token id 4000, but the"),
        ([torch.tensor([3, -100])], r"calib\[0\] has token id -100, but the model has ids from 0"),
        ({"input_ids": [[3, 4000]]}, r"calib\[0\] has token id 4000"),
        (torch.ones(2, 3), r"calib\[0\] has numbers of type torch.float32"),
        ([torch.zeros(0, dtype=torch.int64)], "hold no tokens"),
        ("words and no name", "'words and no name' is not one of builtin, FILE.txt, .jsonl"),
        ("x" * 9999, "is not one of builtin"),
        ("a.docx", "'a.docx' is not one of builtin"),
        ("~/no/such/file.txt", "cannot read .*no/such/file.txt"),
        ([Path("no-such.txt")], "cannot read no-such.txt"),
        ([[{"role": "user", "content": 5}]], r"calib\[0\] has a message whose content"),
    ],
)
def test_wrong_things_name_themselves(quantize: Quantize, calib: Any, message: str) -> None:
    with pytest.raises(ErnieQuantError, match=message):
        quantize(calib)


def test_nothing_is_looked_at_without_calibration(quantize: Quantize) -> None:
    assert quantize(None, no_calib=True, dry_run=True).dry_run


def test_a_folder_is_explained(quantize: Quantize, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    with pytest.raises(ErnieQuantError, match="is a folder; name a file in it, or give hf:"):
        quantize(tmp_path / "texts")


def test_a_run_goes_on_with_the_same_text_from_elsewhere(
    quantize: Quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("\n".join(TEXTS))
    shutil.copy(tmp_path / "a.txt", tmp_path / "b.text")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        quantize(str(tmp_path / "a.txt"), progress=StopAfter(1))
    for again in ("a.txt", "~/b.text", ["\n".join(TEXTS)]):
        with pytest.raises(KeyboardInterrupt):
            quantize(again, progress=StopAfter(0), resume=True)
    (tmp_path / "a.txt").write_text("\n".join(reversed(TEXTS)))
    with pytest.raises(ErnieQuantError, match="differs.*the calibration text was .*, now"):
        quantize("a.txt")
    assert quantize(tmp_path / "b.text").sessions == 5


def test_images_beside_a_chat(micro_vl: Path, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        write_image(tmp_path / name, 16, 16)
    turns = [{"from": "human", "value": "see <image> it"}, {"from": "gpt", "value": "x"}]
    record = {"conversations": turns, "image": "a.png"}
    path = tmp_path / "a.json"
    path.write_text(json.dumps([record, {"messages": [{"role": "user", "content": "hi"}]}] * 9))
    report = erniequant.quantize(
        micro_vl, tmp_path / "q", bits=2, calib=path, device="cpu", **CALIBRATION
    )
    assert report.calibration is not None and report.calibration.images == 9
