"""A model folder, a file of reasoning traces and the arguments of a run, small enough for a test."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lit_reason.cli.reason_cli import ReasonCLI, build

WORDS = "<pad> <unk> <end> <user> <assistant> <think> </think> + = is so wait the answer . \n\n".split(" ")
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m.role + '> ' + m.content + (' <end> ' if m.role == 'assistant' else ' ') }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)


def write_model(folder: Path, seed: int = 0, *, vocabulary: int = 64, dropout: float = 0.0) -> Path:
    """A random two-layer Llama with a tokenizer of whole words."""
    words = WORDS + [str(i) for i in range(20)]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(" "), "removed"), pre_tokenizers.Split("\n\n", "isolated")]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<end>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", "<assistant>"]})
    tokenizer.chat_template = TEMPLATE
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        attention_dropout=dropout,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def trace_record(rng: random.Random) -> dict:
    """A sum of two digits with four to eight thoughts."""
    a, b = rng.randrange(10), rng.randrange(10)
    middle = [f"wait the {rng.randrange(10)} ." for _ in range(rng.randrange(2, 7))]
    thoughts = [f"the {a} + {b} .", *middle, f"so {a} + {b} = {a + b} ."]
    trace = "\n\n".join(thoughts)
    content = f"<think> {trace} </think> {a + b}"
    messages = [{"role": "user", "content": f"{a} + {b}"}, {"role": "assistant", "content": content}]
    return {"messages": messages, "answer": str(a + b)}


def write_traces(path: Path, rows: int = 40, seed: int = 0) -> Path:
    """Rows in the messages format."""
    rng = random.Random(seed)
    path.write_text("".join(json.dumps(trace_record(rng)) + "\n" for _ in range(rows)))
    return path


def arguments(folder: Path, run: Path, **settings: object) -> list[str]:
    """Command-line arguments of a short SFT run.

    Args:
        folder: holds `model` and `traces.jsonl`.
        run: where the run's files go.
        **settings: further options; `__` stands for a dot, and None leaves a default out.
    """
    options = {
        "model": "SFTRegime",
        "model.lm.path": folder / "model",
        "model.optim.lr": 3e-3,
        "model.optim.schedule": "constant",
        "data": "TraceData",
        "data.train_file": folder / "traces.jsonl",
        "data.condense.min_tokens": 0,
        "data.condense.min_chars": 1,
        "data.batch_rows": 8,
        "data.max_length": 128,
        "trainer.accelerator": "cpu",
        "trainer.max_steps": 4,
        "trainer.log_every_n_steps": 1,
        "trainer.logger": "CSVLogger",
        "trainer.logger.save_dir": run,
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
        "trainer.num_sanity_val_steps": 0,
    } | {name.replace("__", "."): value for name, value in settings.items()}
    return [f"--{name}={value}" for name, value in options.items() if value is not None]


def fit(folder: Path, run: Path, callbacks: list | None = None, ckpt_path: Path | None = None, **settings) -> ReasonCLI:
    """Train in this process through the command line's own classes.

    Returns:
        The built command line: `.model`, `.datamodule` and `.trainer` after training.
    """
    cli = build("fit", arguments(folder, run, **settings))
    cli.trainer.callbacks.extend(callbacks or [])
    cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=ckpt_path)
    return cli
