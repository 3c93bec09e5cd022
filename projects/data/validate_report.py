"""What a validation found: the kinds of findings, their table, their JSON."""

from collections import Counter
from dataclasses import dataclass, field

from tabulate import tabulate

# kind -> what the repaired copy does about it
PROBLEMS = {
    "malformed-entry": "dropped",
    "duplicate-category-id": "later ones dropped",
    "duplicate-image-id": "later ones dropped",
    "missing-image": "dropped with its annotations",
    "unreadable-image": "dropped with its annotations",
    "image-size": "dropped with its annotations",
    "duplicate-annotation-id": "given a new id",
    "unknown-image": "dropped",
    "unknown-category": "dropped",
    "degenerate-box": "taken from the mask, or dropped",
    "box-outside": "clipped, or taken from the mask, or dropped",
    "bad-polygon": "polygon dropped",
    "polygon-outside": "clipped, or dropped",
    "empty-mask": "dropped",
    "rle-size": "dropped",
    "bad-rle": "dropped",
    "missing-mask": "dropped",
    "no-area": "taken from the mask, or the box",
    "image-id-no-number": "left to you",
    "loader-fails": "left to you",
    "missing-map": "left to you",
    "bad-map": "left to you",
    "unknown-map-id": "left to you",
}
NOTES = {
    "no-mask": "a note: a data set of boxes, no annotation has a mask",
    "no-objects": "a note: images without objects are legal",
}
EXAMPLES = 3


@dataclass
class Report:
    """The findings in a data set, and its repaired copy."""

    name: str
    source: str | None  # the annotation file that was read, if it was one
    images: int
    annotations: int
    findings: dict[str, list[str]] = field(default_factory=dict)  # kind -> a text each, which begins with the id
    changes: Counter = field(default_factory=Counter)  # what the repaired copy does -> how often
    repaired: dict = field(default_factory=dict)  # in COCO's format

    def add(self, kind: str, text: str) -> None:
        self.findings.setdefault(kind, []).append(text)

    @property
    def problems(self) -> int:
        """Number of findings that are more than a note."""
        return sum(len(texts) for kind, texts in self.findings.items() if kind in PROBLEMS)

    def table(self) -> str:
        """A line of totals, and a row per kind with its count and first examples."""
        rows = []
        for kind, remedy in (PROBLEMS | NOTES).items():
            texts = self.findings.get(kind, [])
            for k, text in enumerate(texts[:EXAMPLES]):
                rows.append([kind, len(texts), text, remedy] if k == 0 else ["", "", text, ""])
        totals = f"{self.name}: {self.images} images, {self.annotations} annotations, {self.problems} problems."
        if not rows:
            return totals
        return totals + "\n" + tabulate(rows, ["kind", "count", "first examples", "repair"], "simple")

    def as_dict(self) -> dict:
        """All findings as plain types; not the repaired copy."""
        return {
            "name": self.name,
            "source": self.source,
            "images": self.images,
            "annotations": self.annotations,
            "problems": self.problems,
            "findings": {kind: {"count": len(texts), "texts": texts} for kind, texts in self.findings.items()},
            "repairs": dict(self.changes),
        }
