"""The scorer beside a calculation of its own, on rows of LUME's files that the user has.

    python -m benchmarks.unlearning_scorer forget.jsonl retain.jsonl --rows 200 --out benchmarks/results/FILE.json

What a model "wrote" is made from the rows: the answer, a part of it, another row's, or nothing. No text is recorded.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from pathlib import Path

from lit_reason.data.unlearning.rows import Role, UnlearnRow, read_rows
from lit_reason.metrics.lume import UnlearningScores
from lit_reason.metrics.unlearning import ExactAnswer, RegurgitationROUGE


def recall_by_hand(written: str, reference: str) -> float:
    """ROUGE-L recall from its definition: lower case, letters and digits, words longer than three letters stemmed."""
    from nltk.stem.porter import PorterStemmer

    def words(text: str) -> list[str]:
        kept = "".join(c if c.isascii() and c.isalnum() else " " for c in text.lower()).split()
        return [PorterStemmer().stem(word) if len(word) > 3 else word for word in kept]

    a, b = words(written), words(reference)
    longest = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            longest[i + 1][j + 1] = longest[i][j] + 1 if x == y else max(longest[i][j + 1], longest[i + 1][j])
    return longest[-1][-1] / len(b) if b else 0.0


def written_for(rows: list[UnlearnRow], i: int, rng: random.Random) -> str:
    """What a model might have said."""
    words, other = rows[i].answer.split(), rows[(i + 7) % len(rows)].answer
    return rng.choice([rows[i].answer, f" {rows[i].answer}\n", " ".join(words[: len(words) // 2]), other, ""])


def main() -> None:
    """Compare, and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("forget")
    parser.add_argument("retain")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--out", type=Path, required=True)
    given, rng = parser.parse_args(), random.Random(0)
    every = [*read_rows(given.forget, Role.FORGET, "forget"), *read_rows(given.retain, Role.RETAIN, "retain")]
    rows = rng.sample(every, given.rows)
    groups = sorted({row.group for row in rows})
    rouge, exact = RegurgitationROUGE(groups), ExactAnswer(groups)
    by_hand: dict[str, list[float]] = defaultdict(list)
    for i, row in enumerate(rows):
        said = written_for(rows, i, rng)
        metric = rouge if row.kind == "regurgitation" else exact
        metric.update([row.row_id], [row.group], [said], [row.answer])
        same = float(said.strip().casefold() == row.answer.strip().casefold())
        by_hand[row.group].append(recall_by_hand(said, row.answer) if row.kind == "regurgitation" else same)
    ours = {**rouge.compute(), **exact.compute()}
    theirs = {name: sum(values) / len(values) for name, values in by_hand.items()}
    turned = [1 - value if name.startswith("forget") else value for name, value in theirs.items()]
    found = {
        "date": "2026-11-25",
        "machine": "2 cores, no GPU",
        "command": "python -m benchmarks.unlearning_scorer forget.jsonl retain.jsonl --rows 200",
        "rows": len(rows),
        "scores": dict(sorted(ours.items())),
        "largest_difference": max(abs(ours[name] - theirs[name]) for name in ours),
        "aggregate": UnlearningScores(ours).aggregate,
        "aggregate_by_hand": len(turned) / sum(1 / value for value in turned) if min(turned) > 0 else 0.0,
    }
    given.out.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
