"""Four-choice questions: has the model kept what everybody knows? With a small set of our own, which needs no network.

A question is answered by the choice with the highest mean log-probability a token behind it. That suits models too
small to answer with a letter, and is not how MMLU is scored: `metrics.mmlu` does that.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lit_reason.data.reading.records import read_every_record
from lit_reason.errors import UserError

COMMON = "common"
CHOICES = 4

# A question a pair; wrong choices are other answers of the same line. General knowledge, written for this project.
_FACTS: tuple[tuple[str, dict[str, str]], ...] = (
    (
        "What is the capital of {}?",
        dict(
            France="Paris", Germany="Berlin", Italy="Rome", Spain="Madrid", Japan="Tokyo", China="Beijing",
            Russia="Moscow", Egypt="Cairo", Greece="Athens", Austria="Vienna", Poland="Warsaw", Portugal="Lisbon",
        ),
    ),
    (
        "What language is mostly spoken in {}?",
        dict(Brazil="Portuguese", Mexico="Spanish", Austria="German", Egypt="Arabic", Australia="English"),
    ),
    (
        "What is the opposite of {}?",
        dict(
            hot="cold", big="small", up="down", light="dark", fast="slow", happy="sad", open="closed", early="late",
        ),
    ),
    (
        "What do you call a young {}?",
        dict(dog="puppy", cat="kitten", cow="calf", sheep="lamb", horse="foal", goose="gosling"),
    ),
    (
        "What is the colour of {}?",
        {"grass": "green", "the clear sky": "blue", "snow": "white", "coal": "black", "blood": "red"},
    ),
    (
        "What is {}?",
        {
            "two plus two": "four", "three plus four": "seven", "ten minus one": "nine", "five times two": "ten",
            "six minus five": "one", "four plus four": "eight",
        },
    ),
    (
        "Which organ {}?",
        {"pumps blood": "the heart", "lets us see": "the eye", "takes in air": "the lung", "thinks": "the brain"},
    ),
    (
        "Which of these is a kind of {}?",
        dict(fruit="apple", bird="eagle", metal="iron", fish="salmon", tree="oak", tool="hammer", drink="coffee"),
    ),
    (
        "Who {}?",
        {
            "wrote Romeo and Juliet": "William Shakespeare", "painted the Mona Lisa": "Leonardo da Vinci",
            "described evolution by natural selection": "Charles Darwin",
            "published the theory of relativity": "Albert Einstein",
        },
    ),
    (
        "Where do you {}?",
        {
            "borrow books": "in a library", "watch films": "in a cinema", "see doctors": "in a hospital",
            "catch trains": "at a station", "learn as a child": "at a school",
        },
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Question:
    """A question with its choices.

    Attributes:
        name: of the row.
        text: the question.
        choices: at least two answers.
        right: number of the right one.
        bare: the text is the whole prompt, and choices follow it as they are.
    """

    name: str
    text: str
    choices: tuple[str, ...]
    right: int
    bare: bool = False

    @property
    def prompt(self) -> str:
        """What stands before a choice."""
        return self.text if self.bare else f"Question: {self.text}\nAnswer:"

    @property
    def endings(self) -> tuple[str, ...]:
        """The choices as they follow the prompt."""
        return self.choices if self.bare else tuple(f" {choice}" for choice in self.choices)


def common_questions() -> list[Question]:
    """The set that comes with the project: always the same questions, choices and order."""
    found: list[Question] = []
    for template, facts in _FACTS:
        answers = sorted(set(facts.values()))
        for subject, right in facts.items():
            text = template.format(subject)
            rng = random.Random(text)
            choices = [right, *rng.sample([a for a in answers if a != right], CHOICES - 1)]
            rng.shuffle(choices)
            found.append(Question(f"common:{len(found)}", text, tuple(choices), choices.index(right)))
    return found


def read_questions(path: str | Sequence[str]) -> list[Question]:
    """Questions from files with `question`, `choices` and `answer` (a number from 0, a letter, or the choice itself).

    A `prompt` in place of a `question` is given to the model as it is.

    Args:
        path: `common` for the set that comes with the project, or files of the user's own.

    Raises:
        UserError: a row lacks a field, or its answer is none of its choices.
    """
    if path == COMMON:
        return common_questions()
    try:
        return [_question(record, name) for name, record in read_every_record(path)]
    except UserError as error:
        raise UserError(f"data.utility: {error}") from error


def _question(record: dict[str, Any], name: str) -> Question:
    choices, answer, bare = record.get("choices"), record.get("answer"), "prompt" in record
    text = record["prompt"] if bare else record.get("question")
    if not isinstance(text, str) or not isinstance(choices, list) or len(choices) < 2:
        raise UserError(f"{name} needs a question and a list of at least two choices")
    options = [str(choice) for choice in choices]
    right: Any = options.index(answer) if answer in options else answer
    if isinstance(right, str) and len(right) == 1 and right.isalpha():
        right = ord(right.upper()) - ord("A")
    if isinstance(right, bool) or not isinstance(right, int) or not 0 <= right < len(options):
        raise UserError(f"{name}: the answer is 0 to {len(options) - 1}, a letter, or one of the choices")
    return Question(name, text, tuple(options), right, bare)
