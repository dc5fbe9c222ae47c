"""What the steering study steers to: four topics of short quotations, and the style of the model's own answers."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from lit_reason.rollout.config import SamplingConfig
from lit_reason.rollout.sampler import sample

TOPICS = ["food", "law", "science", "sports"]  # looked through; the package has categories that are not for everyone
STYLES = {"concise": "Answer in one short sentence.", "verbose": "Answer in detail, in several paragraphs."}
PER_CLASS = 55  # texts a class that directions are found in; the judge learns from up to 120 others
ANSWER_TOKENS = 40  # of the answers that show a style
TUNING = """He told me that | We should remember that | A long time ago | The first thing I noticed was
| My friend says that | It turns out that | On Monday morning | What I really want is"""
OPENINGS = """I think that | Once upon a time | The most important thing is | Yesterday, someone told me that
| In my opinion, | Last week we | She opened the door and | There is a reason why | People often say that
| When I was young, | Nobody knows | The best way to | It was a dark night and | If you ask me,
| The new neighbour | After all these years,
| At the end of the day | Let me tell you about | One day, a man | Today I learned that"""
TUNING_REQUESTS = """What is a good habit? | Why do people travel? | Tell me about the sea. | What makes a good teacher?
| Why is sleep important? | Describe a small village. | What did you learn lately? | How do I make new friends?"""
REQUESTS = """Tell me something interesting. | What makes people happy? | Describe a perfect day. | Why do people argue?
| Give me some advice. | What should I do this weekend? | Tell me about your childhood. | What is a good present?
| How can I save money? | What do you think about cities? | Why do children ask so much? | Describe your best friend.
| What is worth waiting for? | How do I begin a letter? | What do neighbours talk about? | Tell me about a journey.
| What makes a house a home? | Why do we forget things? | What is a good story about? | How can I relax?"""
SUBJECTS = """music, rain, money, a library, a river, honesty, a bridge, winter, the moon, a newspaper, luck, a forest,
memory, paper, a museum, friendship, glass, a volcano, silence, a clock, poetry, a desert, electricity, a market, wit,
an island, patience, a train, the internet, a garden, gold, a theatre, gravity, a mirror, courage, a school, salt water,
a dictionary, thunder, a candle, a map, fear, a passport, wool, an earthquake, a mountain, politeness, a telescope,
sand, a painting, trust, a lighthouse, oxygen, a festival, curiosity, a bicycle, ice, a harbour, a diary, a dream"""
FRAMES = ("What is {}?", "Why is {} of use to people?")


@dataclass(frozen=True)
class Task:
    """Classes to steer to, texts that show them, and what is continued.

    Attributes:
        name: of the task.
        texts: by class. Texts of the same number belong together where `paired`.
        paired: the classes' texts answer the same questions.
        tuning: prompts in tokens on which strengths are chosen.
        prompts: those of the test.
        tokens: most tokens of a continuation.
        span: features are token states 1 to `span` of each text; None takes all.
        contrast: two prompts a class, for ActAdd.
    """

    name: str
    texts: dict[str, list[str]]
    paired: bool
    tuning: list[list[int]]
    prompts: list[list[int]]
    tokens: int
    span: int | None
    contrast: dict[str, list[str]]

    @property
    def classes(self) -> list[str]:
        """Their names."""
        return list(self.texts)

    def split(self, seed: int) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
        """Labelled texts for the directions, and others for the judge; text i of each class makes a pair.

        Args:
            seed: of the draw.
        """
        mine, judge = [], []
        for k, name in enumerate(self.classes):
            order = np.random.default_rng([seed, 0 if self.paired else k]).permutation(len(self.texts[name]))
            named = [(self.texts[name][i], k) for i in order]
            mine, judge = mine + named[:PER_CLASS], judge + named[PER_CLASS : PER_CLASS + 120]
        return mine, judge


def listed(texts: str) -> list[str]:
    """The parts between bars."""
    return [text.strip() for text in texts.split("|")]


def topics(tokenizer: Any, folder: Path | None, out: Path) -> Task:
    """Topics of the `fortunes` package, and openings without a topic.

    Args:
        tokenizer: of the model.
        folder: of the unpacked package; None fetches it.
        out: gets the package.
    """
    tuning, prompts = ([tokenizer(text).input_ids for text in listed(texts)] for texts in (TUNING, OPENINGS))
    contrast = {"food": ["I talk about food and cooking all the time", "I talk about many things all the time"]}
    return Task("topics", fortunes(folder, out), False, tuning, prompts, 20, None, contrast)


def fortunes(folder: Path | None, out: Path) -> dict[str, list[str]]:
    """Entries of 40 to 500 characters by topic, their line ends made blanks, in the order of the files."""
    if folder is None:
        subprocess.run(["apt-get", "download", "fortunes"], cwd=out, check=True, capture_output=True)
        (package,) = out.glob("fortunes_*.deb")
        subprocess.run(["dpkg-deb", "-x", package.name, "fortunes"], cwd=out, check=True)
        folder = out / "fortunes/usr/share/games/fortunes"
    found = {}
    for topic in TOPICS:
        entries = re.split(r"^%\n", (folder / topic).read_text(encoding="utf-8", errors="replace"), flags=re.MULTILINE)
        texts = [" ".join(entry.split()) for entry in entries]
        found[topic] = list(dict.fromkeys(text for text in texts if 40 <= len(text) <= 500))
    return found


def styles(lm: Any, tokenizer: Any, out: Path) -> Task:
    """The model's own answers, asked to be short or long, and requests that ask for neither.

    Args:
        lm: the model.
        tokenizer: its tokenizer.
        out: keeps the answers, which are sampled once.
    """

    def asked(texts: Sequence[str]) -> list[list[int]]:
        turns = [[{"role": "user", "content": text}] for text in texts]
        ids = [tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True) for turn in turns]
        return [list(row["input_ids"]) for row in ids]

    kept = out / "answers.json"
    if not kept.exists():
        kept.write_text(json.dumps(answers(lm, tokenizer, asked), indent=1))
    tuning, prompts = asked(listed(TUNING_REQUESTS)), asked(listed(REQUESTS))
    contrast = {"concise": ["Be short: one sentence", "Be long: many paragraphs"]}
    return Task("style", json.loads(kept.read_text()), True, tuning, prompts, 30, 20, contrast)


def answers(lm: Any, tokenizer: Any, asked: Callable[[Sequence[str]], list[list[int]]]) -> dict[str, list[str]]:
    """By style, an answer to each question, cut after its last whole sentence; an empty one takes its question along.

    Args:
        lm: the model.
        tokenizer: its tokenizer.
        asked: brings requests in the model's chat form.
    """
    subjects = [" ".join(subject.split()) for subject in SUBJECTS.split(",")]
    questions = [frame.format(subject) for frame, subject in product(FRAMES, subjects)]
    how = SamplingConfig(max_new_tokens=ANSWER_TOKENS, temperature=0.7, top_p=0.95, batch_size=60, seed=7)
    found = {}
    for style, wish in STYLES.items():
        prompts = asked([f"{question} {wish}" for question in questions])
        done = sample(lm, tokenizer, prompts, how, stop_ids=(tokenizer.eos_token_id,), progress=False)
        found[style] = [" ".join(re.sub(r"[^.!?]*$", "", answer.text).split()) for answer in done]
    whole = [i for i in range(len(questions)) if all(found[style][i] for style in STYLES)]
    return {style: [found[style][i] for i in whole] for style in STYLES}
