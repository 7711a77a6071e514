"""A text with its title, and a corpus: documents and where they came from."""

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Document:
    title: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents and their provenance; `origin` is "carried", "folder" or "hub"."""

    name: str
    origin: str
    documents: tuple[Document, ...]

    @property
    def sha256(self) -> str:
        """The hash of all titles and texts, in hexadecimal."""
        content = "".join(f"{d.title}\0{d.text}\0" for d in self.documents)
        return hashlib.sha256(content.encode()).hexdigest()

    def record(self) -> dict[str, object]:
        """What a manifest says of this corpus."""
        return {
            "name": self.name,
            "origin": self.origin,
            "documents": len(self.documents),
            "characters": sum(len(d.text) for d in self.documents),
            "sha256": self.sha256,
        }
