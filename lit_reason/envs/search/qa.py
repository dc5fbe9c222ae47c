"""Question answering by search: BM25 over a corpus of one's own, or over a fictional world with questions of two hops.

Two ways of speaking. `tool` is that of arXiv 2505.11821's first version: a JSON call of the tool `search`. `tags` is
that of its second: `<search>words</search>`, answered in `<information>`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from lit_reason.envs.environment import Message
from lit_reason.envs.search.index import Index, read_passages
from lit_reason.envs.tool_dialogue import Action, ToolDialogue, ToolRewards, written_call
from lit_reason.errors import UserError
from lit_reason.rewards.tool_use import accepted, plain
from lit_reason.tasks.world import Question, WorldConfig, build_world

_PART = re.compile(r"<(search|answer)>(.*?)</\1>", re.DOTALL)


class SearchQA(ToolDialogue):
    """A question is answered after looking for passages.

    A search is useful when it brings a gold passage that was not there before; where a task names none, when an
    accepted answer stands in the result for the first time.

    Args:
        corpus: file of passages, records with `text` and perhaps `id` and `title`; default: the fictional world.
        world: the fictional world; without a corpus of your own it makes up the questions, too.
        hops: which questions of the world are asked: of `one` hop, of `two`, or `both`.
        passages: most passages a search brings.
        passage_words: a longer passage is cut behind so many words.
        syntax: `tool` a JSON call, `tags` a pair of tags.
        instructions: what stands before the question: `plain` says what may be written, `reasoning` asks for
            `<reasoning>...</reasoning>` before it, `none` is nothing.
        rewards: what is paid for what.
        max_calls: a further search is refused as an error.
    """

    def __init__(
        self,
        corpus: str | None = None,
        world: WorldConfig = WorldConfig(),  # noqa: B008 (frozen)
        hops: Literal["one", "two", "both"] = "both",
        passages: int = 3,
        passage_words: int = 150,
        syntax: Literal["tool", "tags"] = "tool",
        instructions: Literal["plain", "reasoning", "none"] = "plain",
        rewards: ToolRewards | None = None,
        max_calls: int = 4,
    ) -> None:
        for name, value in (("passages", passages), ("passage_words", passage_words)):
            if value < 1:
                raise UserError(f"SearchQA: {name} is {value}; it must be at least 1")
        self.most, self.most_words, self.tags = passages, passage_words, syntax == "tags"
        self.index = _index(corpus, world)
        self.questions = () if corpus else _questions(world, hops)
        self.told = instructions
        super().__init__([self._tool()], rewards, max_calls)
        if self.tags:
            self.stops = ("</search>", "</answer>")

    def _tool(self) -> Any:
        def search(query: str) -> str:
            """Search the corpus and read the best passages.

            Args:
                query: words to look for.
            """
            self.found = self.index.search(query, self.most)
            if not self.found:
                return "nothing found"
            cut = (" ".join(p.text.split()[: self.most_words]) for p in self.found)
            return "\n\n".join(f"[{n}] {text}" for n, text in enumerate(cut, 1))

        return search

    def task(self, index: int, seed: int) -> dict[str, Any]:
        """A question of the world; `seed` has no part in it, the world has its own.

        Raises:
            UserError: the corpus is the user's own, or the world has no further question.
        """
        if not self.questions:
            return super().task(index, seed)
        if index >= len(self.questions):
            raise UserError(
                f"the world has {len(self.questions)} questions, and data.count and data.val_count together ask for "
                "more: ask for fewer, or make env.world larger"
            )
        q = self.questions[index]
        gold = {"gold": list(q.gold), "hops": len(q.gold), "queries": list(q.queries), "bridge": q.bridge}
        return {"question": q.text, "answer": q.answer, **gold}

    def check(self, task: Mapping[str, Any]) -> None:
        """Refuse a question without text, without an answer, or with gold passages that are not in the corpus."""
        if not isinstance(task.get("question"), str) or not task["question"].strip():
            raise UserError("a question needs a field 'question' that is not empty")
        try:
            accepted(task)
        except ValueError as error:
            raise UserError(str(error)) from error
        gold = task.get("gold", [])
        if not isinstance(gold, list):
            raise UserError(f"'gold' is {gold!r}; it must be a list of ids of passages")
        self.index.check_ids([str(name) for name in gold])

    def reset(self, task: Mapping[str, Any], seed: int, rollout: int = 0) -> list[Message]:
        """Ask the question."""
        self.begin()
        self.found = []
        self.answers, self.missing = accepted(task), {str(name) for name in task.get("gold", ())}
        self.by_text = not self.missing
        question = {"role": "user", "content": task["question"]}
        return [question] if self.told == "none" else [self.instructions(), question]

    def expert(self, task: Mapping[str, Any]) -> Iterator[str]:
        """A search for each hop, in words that passages use, then the answer.

        Raises:
            UserError: the question is not one of the fictional world.
        """
        if "queries" not in task:
            raise UserError(
                "SearchQA has an expert for questions of its fictional world alone, not for those of a file"
            )
        for query in task["queries"]:
            words = query.format(o=task["bridge"])
            yield f"<search> {words} </search>" if self.tags else written_call("search", query=words)
        yield f"<answer> {task['answer']} </answer>" if self.tags else f"<answer>{task['answer']}</answer>"

    def instructions(self) -> Message:
        """The system message: how to search and how to answer."""
        content = super().instructions()["content"]
        if self.tags:
            content = (
                "Answer the question. To search, write <search>words to look for</search>; the best passages come back "
                f"in <information></information>. You may search {self.max_calls} times. When you know the answer, "
                "write <answer>...</answer>."
            )
        if self.told == "reasoning":
            content += "\nBefore each call or answer think, inside <reasoning> ... </reasoning>."
        return {"role": "system", "content": content}

    def parse(self, text: str) -> Action:
        """Read a call or a pair of tags; exactly one makes an action."""
        if not self.tags:
            return super().parse(text)
        parts = _PART.findall(text)
        if len(parts) != 1:
            found = "no" if not parts else str(len(parts))
            return Action("neither", f"a turn has one <search> or one <answer>; this one has {found}")
        kind, body = parts[0]
        if kind == "answer":
            return Action("answer", body.strip())
        return Action("tool", name="search", arguments={"query": body.strip()})

    def shown(self, result: str) -> str:
        """The passages as the model reads them."""
        return f"<information> {result} </information>" if self.tags else super().shown(result)

    def useful(self, action: Action, result: str) -> bool:
        """Whether a gold passage, or an accepted answer, came for the first time."""
        if self.by_text:
            hit = any(answer.lower() in result.lower() for answer in self.answers)
            self.by_text = not hit
            return hit
        new = self.missing & {p.id for p in self.found}
        self.missing -= new
        return bool(new)

    def correct(self, answer: str) -> bool:
        """Whether the answer is an accepted one but for case, punctuation, articles and blanks."""
        return plain(answer) in {plain(a) for a in self.answers}


@functools.lru_cache(maxsize=4)
def _index(corpus: str | None, world: WorldConfig) -> Index:
    """One index for all environments of a run."""
    return Index(read_passages(corpus) if corpus else build_world(world).passages)


@functools.lru_cache(maxsize=4)
def _questions(world: WorldConfig, hops: str) -> tuple[Question, ...]:
    wanted = {"one": (1,), "two": (2,), "both": (1, 2)}[hops]
    return tuple(q for q in build_world(world).questions if len(q.gold) in wanted)
