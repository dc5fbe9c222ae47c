"""A row of every known format, and what it reads as."""

from lit_reason.data.reading.formats import to_conversation


def turns(row, **options):
    """Role, content and whether it is trained, of each message."""
    return [(m.role, m.content, m.trained) for m in to_conversation(row, "r:1", **options).messages]


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
SCHEMA = {"name": "add", "description": "adds", "parameters": {"type": "object"}}

# One row a format: (row, detected format, messages, answer, metadata fields).
ROWS = {
    "messages": (
        {
            "messages": [
                {"role": "developer", "content": "Be kind."},
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello"},
            ],
            "source": "x",
        },
        "messages",
        [("system", "Be kind.", False), ("user", "Hi", False), ("assistant", "Hello", True)],
        None,
        {"source"},
    ),
    "conversations of role and content": (
        {"conversations": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
        "messages",
        [("user", "Hi", False), ("assistant", "Hello", True)],
        None,
        set(),
    ),
    "text parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "c"}]},
            ],
            "answer": "7",
        },
        "messages",
        [("user", "ab", False), ("assistant", "c", True)],
        "7",
        set(),
    ),
    "sharegpt": (
        {
            "system": "Be kind.",
            "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
            "id": 3,
        },
        "sharegpt",
        [("system", "Be kind.", False), ("user", "Hi", False), ("assistant", "Hello", True)],
        None,
        {"id"},
    ),
    "alpaca": (
        {"instruction": "Add.", "input": "1 2", "output": "3", "history": [["q", "a"]], "system": ""},
        "alpaca",
        [("user", "q", False), ("assistant", "a", True), ("user", "Add.\n1 2", False), ("assistant", "3", True)],
        None,
        set(),
    ),
    "prompt and completion": (
        {"prompt": "2+2=", "completion": " 4", "answer": 4, "completion_2": "x"},
        "prompt_completion",
        [("user", "2+2=", False), ("assistant", " 4", True)],
        "4",
        {"completion_2"},
    ),
    "prompt and completion of turns": (
        {
            "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
            "completion": [{"role": "assistant", "content": "a"}],
        },
        "prompt_completion",
        [("system", "s", False), ("user", "u", False), ("assistant", "a", True)],
        None,
        set(),
    ),
    "input and output": (
        {"id": "1", "input": "begin", "output": "end", "task": "T"},
        "prompt_completion",
        [("user", "begin", False), ("assistant", "end", True)],
        None,
        {"id", "task"},
    ),
    "gsm8k": (
        {"question": "How many?", "answer": "40+32 = <<40+32=72>>72\n#### 1,072 "},
        "question_answer",
        [("user", "How many?", False), ("assistant", "40+32 = <<40+32=72>>72\n#### 1,072 ", True)],
        "1,072",
        set(),
    ),
    "math": (
        {"problem": "p", "solution": "so \\boxed{3}", "answer": "3", "level": 2},
        "question_answer",
        [("user", "p", False), ("assistant", "so \\boxed{3}", True)],
        "3",
        {"level"},
    ),
    "question with a model's reasoning": (
        {"question": "q", "model_reasoning": "hm", "model_answer": "It is 3.", "reference_answer": "3"},
        "question_answer",
        [("user", "q", False), ("assistant", "It is 3.", True)],
        "3",
        set(),
    ),
    "openr1": (
        {
            "problem": "p",
            "generations": ["wrong", "cut", "<think>t</think>right"],
            "correctness_math_verify": [False, True, True],
            "is_reasoning_complete": [True, False, True],
            "solution": "human",
            "answer": "5",
        },
        "openr1",
        [("user", "p", False), ("assistant", "<think>t</think>right", True)],
        "5",
        {"correctness_math_verify", "is_reasoning_complete", "solution"},
    ),
    "openr1 with messages": (
        {
            "problem": "p",
            "generations": ["g"],
            "messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "m"}],
            "answer": "5",
        },
        "messages",
        [("user", "p", False), ("assistant", "m", True)],
        "5",
        {"problem", "generations"},
    ),
    "preference of one turn": (
        {
            "conversations": [
                {"from": "human", "value": "a"},
                {"from": "gpt", "value": "b"},
                {"from": "human", "value": "c"},
            ],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        "preference",
        [("user", "a", False), ("assistant", "b", False), ("user", "c", False), ("assistant", "good", True)],
        None,
        {"rejected"},
    ),
    "preference of texts": (
        {"prompt": "p", "chosen": "good", "rejected": "bad"},
        "preference",
        [("user", "p", False), ("assistant", "good", True)],
        None,
        {"rejected"},
    ),
    "preference of a question": (
        {"question": "p", "chosen": "good", "rejected": "bad"},
        "preference",
        [("user", "p", False), ("assistant", "good", True)],
        None,
        {"rejected"},
    ),
    "preference of conversations": (
        {
            "prompt": "p",
            "chosen": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "good"}],
            "rejected": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "bad"}],
        },
        "preference",
        [("user", "p", False), ("assistant", "good", True)],
        None,
        {"prompt", "rejected"},
    ),
    "preference after an instruction": (
        {"instruction": "i", "input": "", "chosen": [{"role": "assistant", "content": "good"}], "rejected": []},
        "preference",
        [("user", "i", False), ("assistant", "good", True)],
        None,
        {"rejected"},
    ),
    "text": ({"text": "A document.", "url": "u"}, "text", [("text", "A document.", True)], None, {"url"}),
}
