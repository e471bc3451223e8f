"""What became of rows: how many sequences and tokens they gave, and what was cut, split or left out."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import numpy as np


@dataclass
class Counts:
    """What became of rows.

    Attributes:
        rows: rows given.
        split: sequences made beyond one per row, where a template cannot show all turns in one (`chat`).
        divided: sequences made beyond one per row, because texts were longer than the limit.
        used: sequences kept.
        dropped: sequences left out because no token to learn was left.
        unanswered: those of them that had none before they were cut either.
        truncated: sequences longer than the limit, those dropped included.
        tokens: tokens of the sequences kept.
        lost: tokens that were cut off or belonged to a sequence left out.
        supervised: tokens kept that are learned.
        lengths: tokens of each sequence before it was cut, in order, int64.
    """

    rows: int = 0
    split: int = 0
    divided: int = 0
    used: int = 0
    dropped: int = 0
    unanswered: int = 0
    truncated: int = 0
    tokens: int = 0
    lost: int = 0
    supervised: int = 0
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def share(self) -> float:
        """Share of the tokens that are learned, 0 to 1."""
        return self.supervised / self.tokens if self.tokens else 0.0

    @property
    def lost_share(self) -> float:
        """Share of all tokens that were cut off or left out, 0 to 1."""
        return self.lost / (self.tokens + self.lost) if self.lost else 0.0

    @property
    def why_dropped(self) -> str:
        """How many sequences were left out for which reason, and what helps; empty if none was."""
        cut = self.dropped - self.unanswered
        reasons = [f"{cut:,} with a prompt that fills train.max_length"] if cut else []
        reasons += [f"{self.unanswered:,} without an answer to learn"] if self.unanswered else []
        remedy = "raise train.max_length" if cut else "check that the rows have assistant turns"
        return f"{', '.join(reasons)}; {remedy}" if reasons else ""

    @classmethod
    def of(cls, rows: int, beyond: tuple[int, int], sequences: dict[str, np.ndarray], limit: int) -> Counts:
        """Counts what became of rows.

        Args:
            rows: their number.
            beyond: `split` and `divided`.
            sequences: columns of `sequences._features` that say what became of them, each an array.
            limit: most tokens of a sequence.
        """
        lengths, learned = sequences["length"].astype(np.int64), sequences["learned"]
        kept, left = learned > 0, np.minimum(lengths, limit)
        return cls(
            rows,
            *beyond,
            used=int(kept.sum()),
            dropped=int((~kept).sum()),
            unanswered=int((~sequences["answered"]).sum()),
            truncated=int((lengths > limit).sum()),
            tokens=int(left[kept].sum()),
            lost=int(lengths.sum() - left[kept].sum()),
            supervised=int(learned.sum()),
            lengths=lengths,
        )

    def __add__(self, other: Counts) -> Counts:
        sums = {name: count + getattr(other, name) for name, count in self.to_dict().items()}
        return Counts(**sums, lengths=np.concatenate([self.lengths, other.lengths]))

    def to_dict(self) -> dict[str, int]:
        """The numbers, without the lengths."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "lengths"}
