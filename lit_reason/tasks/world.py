"""A fictional world as short passages, and questions about it of one and of two hops.

People are born in towns, learn from other people and write books; towns lie on rivers, serve dishes and hold feasts;
firms have founders, seats and products. Every fact stands in one passage, in one of several phrasings, and none in the
words of the question; other passages speak of the same people and places without saying anything that is asked. The
answer of a question stands in exactly one passage of the world. All names are made up. Question marks stand apart, so
that names are words of their own for the smallest tokenizers, too.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lit_reason.errors import UserError

# What a passage says of subject {s} and object {o}.
FACTS = {
    "birth": ("{s} was born in {o}", "{s} came into the world in {o}", "{s} is a native of {o}"),
    "teacher": ("{s} was a pupil of {o}", "{s} learned the craft from {o}", "{o} trained {s} for seven years"),
    "book": ("{s} is the author of {o}", "{s} published {o} to little notice", "{o} came from the pen of {s}"),
    "river": ("{s} lies on the {o}", "the {o} flows through {s}", "boats reach {s} by the {o}"),
    "dish": ("guests in {s} are served {o}", "{s} is known for its {o}", "the kitchens of {s} are proud of {o}"),
    "feast": ("{s} celebrates {o} in autumn", "every year {o} fills the streets of {s}", "{o} is held in {s}"),
    "founder": ("{s} was founded by {o}", "{o} set up the firm {s}", "{s} began as a workshop of {o}"),
    "seat": ("{s} has its seat in {o}", "{s} does its business from {o}", "the offices of {s} are in {o}"),
    "product": ("{s} makes {o}", "{s} lives by the sale of {o}", "nearly all {o} comes from {s}"),
}
# Passages that mention the same names and answer nothing.
ASIDES = (
    "{a} once spent a winter in {t}",
    "{a} and {b} fell out over a debt in {t}",
    "a bridge in {t} is named after {a}",
    "{a} sold a house in {t} to {b}",
)
CLOSINGS = ("", " The records say little else.", " Nobody disputes it.", " So the chronicle has it, and others agree.")
ASKED = {
    "book": ("which book did {s} write ?", "what is the title of the book by {s} ?"),
    "river": ("which river runs past {s} ?", "on which river is {s} ?"),
    "dish": ("which dish is typical of {s} ?", "what do people eat in {s} ?"),
    "feast": ("which feast takes place in {s} ?", "what does {s} celebrate ?"),
    "product": ("what does {s} produce ?", "which goods does {s} sell ?"),
}
# How a question speaks of something by way of something else, and words that would find that out.
BY_WAY_OF = {
    "birth": ("the town where {x} was born", "born native world"),
    "teacher": ("the teacher of {x}", "pupil learned trained"),
    "founder": ("the person who founded {x}", "founded firm workshop"),
    "seat": ("the town where {x} is at home", "seat business offices"),
}
QUERY = {
    "book": "author published pen",
    "river": "lies flows boats",
    "dish": "served known kitchens",
    "feast": "celebrates fills held",
    "product": "makes sale comes",
}
ENDINGS = {
    "town": ("holt", "mere", "wick"),
    "river": ("ava", "enna"),
    "dish": ("uk", "osh"),
    "feast": ("ine", "ora"),
    "firm": ("and", "esk"),
    "product": ("ol", "ite"),
}
GIVEN = (
    "Mira Aldo Senna Tovi Karel Ysolde Bram Neela Orrin Fenja Luca Petra Joss Marit Edric Sanna Viggo Runa Tamsin Ilo"
)
FAMILY = (
    "Solvane Keldon Marrow Thistle Varga Ostrom Quill Hadley Brandt Corvin Lisk Pellar Dunmore Ashby Reventh Tolliver "
    "Garrick Weyland Strand Umber"
)
COLOURS = "Amber Silent Broken Golden Hollow Crimson Distant Frozen Hidden Ivory Jade Lonely Marble Northern Painted"
THINGS = "Lantern Orchard Mirror Harbour Compass Garden Ladder Window Bell Anchor Feather Candle Bridge Mountain Loom"


@dataclass(frozen=True)
class WorldConfig:
    """Size of a world.

    Args:
        people: each is born somewhere, has a teacher and wrote a book; at most 225.
        towns: each has a river, a dish and a feast.
        firms: each has a founder, a seat and a product.
        seed: of who did what; the names are the same in all worlds of a size, so that nothing learnt about one world
            answers a question about another.
    """

    people: int = 200
    towns: int = 50
    firms: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        if not 2 <= self.people <= 225 or not 1 <= self.towns <= 500 or not 0 <= self.firms <= 500:
            raise UserError(
                f"a world has 2 to 225 people, 1 to 500 towns and 0 to 500 firms; asked for are {self.people}, "
                f"{self.towns} and {self.firms}"
            )


@dataclass(frozen=True)
class Passage:
    """A document of a corpus.

    Attributes:
        id: its name.
        text: what it says.
    """

    id: str
    text: str


@dataclass(frozen=True)
class Question:
    """A question with one answer.

    Attributes:
        text: the question.
        answer: the answer; it stands in the last gold passage and in no other passage of the world.
        gold: names of the passages that lead there, in order.
        queries: words that one who knows the phrasings would search for, one search a hop; `{o}` stands for what the
            search before it found.
        bridge: what the first hop finds; empty where there is one hop.
    """

    text: str
    answer: str
    gold: tuple[str, ...]
    queries: tuple[str, ...]
    bridge: str = ""


@dataclass(frozen=True)
class World:
    """Passages and questions, each in a fixed order that says nothing about them.

    Attributes:
        passages: all passages.
        questions: all questions.
    """

    passages: tuple[Passage, ...]
    questions: tuple[Question, ...]


def build_world(config: WorldConfig) -> World:
    """The world of a config.

    Args:
        config: size and seed.
    """
    rng = random.Random(f"world {config.seed}")
    facts = _facts(config, rng)
    passages = [
        Passage(f"{relation}-{n}", _sentence(rng.choice(FACTS[relation]).format(s=s, o=o), rng))
        for relation, pairs in facts.items()
        for n, (s, o) in enumerate(pairs.items())
    ]
    people, towns = list(facts["birth"]), list(facts["river"])
    for n, person in enumerate([*people, *facts["founder"]]):
        said = ASIDES[n % len(ASIDES)].format(a=person, b=rng.choice(people), t=rng.choice(towns))
        passages.append(Passage(f"aside-{n}", _sentence(said, rng)))
    questions = [*_one_hop(facts, rng), *_two_hops(facts, rng)]
    rng.shuffle(passages)
    rng.shuffle(questions)
    return World(tuple(passages), tuple(questions))


Facts = dict[str, dict[str, str]]  # relation -> subject -> object


def _facts(config: WorldConfig, rng: random.Random) -> Facts:
    fresh = _coiner(random.Random("names"))
    people = rng.sample([f"{given} {family}" for given in GIVEN.split() for family in FAMILY.split()], config.people)
    titles = rng.sample([f"The {c} {t}" for c in COLOURS.split() for t in THINGS.split()], config.people)
    towns, rivers, dishes, feasts = (
        [fresh(k) for _ in range(config.towns)] for k in ("town", "river", "dish", "feast")
    )
    firms, products = ([fresh(k) for _ in range(config.firms)] for k in ("firm", "product"))
    for names in (towns, rivers, dishes, feasts, firms, products):
        rng.shuffle(names)
    others = [rng.choice([q for q in people if q != p]) for p in people]
    return {
        "birth": {p: rng.choice(towns) for p in people},
        "teacher": dict(zip(people, others, strict=True)),
        "book": dict(zip(people, titles, strict=True)),
        "river": dict(zip(towns, rivers, strict=True)),
        "dish": dict(zip(towns, dishes, strict=True)),
        "feast": {t: f"The Night of {name}" for t, name in zip(towns, feasts, strict=True)},
        "founder": {f"{f} Works": rng.choice(people) for f in firms},
        "seat": {f"{f} Works": rng.choice(towns) for f in firms},
        "product": {f"{f} Works": product for f, product in zip(firms, products, strict=True)},
    }


def _coiner(rng: random.Random) -> Callable[[str], str]:
    """Makes up words, none of which is part of another."""
    used: set[str] = set()

    def fresh(kind: str) -> str:
        while True:
            stem = "".join(rng.choice("bdfgklmnprstv") + rng.choice("aeiou") for _ in range(2)) + rng.choice("lmnrst")
            word = (stem + rng.choice(ENDINGS[kind])).capitalize()
            if not any(word.lower() in other or other in word.lower() for other in used):
                used.add(word.lower())
                return word

    return fresh


def _sentence(said: str, rng: random.Random) -> str:
    return f"{_capital(said)}.{rng.choice(CLOSINGS)}"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _places(facts: Facts, relation: str) -> Iterator[tuple[str, str, str]]:
    """Subject, object and passage of each fact of a relation."""
    for n, (s, o) in enumerate(facts[relation].items()):
        yield s, o, f"{relation}-{n}"


def _one_hop(facts: Facts, rng: random.Random) -> Iterator[Question]:
    for relation, phrasings in ASKED.items():
        for s, o, place in _places(facts, relation):
            text = _capital(rng.choice(phrasings).format(s=s))
            yield Question(text, o, (place,), (f"{s} {QUERY[relation]}",))


def _two_hops(facts: Facts, rng: random.Random) -> Iterator[Question]:
    for first, (way, words) in BY_WAY_OF.items():
        for x, bridge, place in _places(facts, first):
            for relation, phrasings in ASKED.items():
                if bridge not in facts[relation]:
                    continue
                last = f"{relation}-{list(facts[relation]).index(bridge)}"
                text = _capital(rng.choice(phrasings).format(s=way.format(x=x)))
                queries = (f"{x} {words}", f"{{o}} {QUERY[relation]}")
                yield Question(text, facts[relation][bridge], (place, last), queries, bridge)
