"""Pretraining as a user starts it: figures, tokenizer, export, budget, and what is refused."""

import contextlib
import io
import json
import math

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from lit_reason.cli import door
from lit_reason.cli.reason_cli import build
from lit_reason.cli.recipes import ROOT
from lit_reason.core.metrics_log import read_metrics
from lit_reason.core.run_folder import run_folder
from lit_reason.models.config import LowRankConfig
from lit_reason.models.lowrank import make_lowrank


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    texts = [f"row {i}: {'so it goes, ' * (i % 7 + 1)}and {i % 5} more" for i in range(120)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def options(corpus, folder, *more):
    """The smoke recipe on a corpus of our own."""
    own = [f"--vars.folder={folder}", f"--data.train_file={corpus}", "--data.text_field=text", "--data.max_length=64"]
    return ["--config", "smoke/pretrain", *own, "--trainer.max_steps=3", *more]


def fit(corpus, folder, *more):
    cli = build("fit", options(corpus, folder, *more))
    cli.run_verb()
    return cli


def refusal(corpus, folder, *more):
    with contextlib.redirect_stderr(io.StringIO()) as err:
        assert door.main(["fit", *options(corpus, folder, *more)]) == 2
    return err.getvalue()


def test_held_out_figures_are_those_of_the_exported_model(corpus, tmp_path):
    more = ["--data.holdout=0.2", "--trainer.callbacks+=HFExport", "--trainer.val_check_interval=3"]
    cli = fit(corpus, tmp_path, "--model.legacy_eval_divisor=true", *more)
    log = read_metrics(run_folder(cli.trainer) / "metrics.csv")
    found = {name: log.points(f"val/{name}")[-1][1] for name in ("perplexity", "bits_per_byte", "loss", "loss_text")}
    export = run_folder(cli.trainer) / "export"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(export).eval(), AutoTokenizer.from_pretrained(export)
    assert model.config.eos_token_id == model.config.bos_token_id == tokenizer.eos_token_id
    nll = tokens = size = 0.0
    held_out = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    names = {cli.datamodule.stores["val"].row(i).row_id for i in range(len(cli.datamodule.stores["val"]))}
    for i, text in enumerate(held_out, 1):
        if f"corpus.jsonl:{i}" not in names:
            continue
        ids = torch.tensor([[*tokenizer(text).input_ids, tokenizer.eos_token_id]])
        pieces = [ids[:, k : k + 64] for k in range(0, ids.shape[1] - 1, 63)]
        with torch.no_grad():
            nll += sum(float(model(input_ids=p, labels=p).loss) * (p.shape[1] - 1) for p in pieces)
        tokens += ids.shape[1] - 1
        size += len(text.encode())
    assert found["perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(nll / math.log(2) / size, rel=1e-4)
    assert found["loss"] == found["loss_text"] == pytest.approx(nll / tokens, rel=1e-4)
    n = len(cli.datamodule.val_dataloader())
    assert n >= 2
    assert math.log(log.points("val/perplexity_legacy")[-1][1]) < nll / tokens * (n / (n + 1) + 0.05)


def test_a_token_budget_sets_steps_and_schedule(corpus, tmp_path):
    length = ["--trainer.max_steps=-1", "--trainer.max_epochs=1"]  # which a budget of several passes overrules
    cli = fit(corpus, tmp_path, "--data.token_budget=6000", "--data.batch_rows=40", *length)
    steps = cli.trainer.global_step
    assert steps == cli.datamodule.steps() > len(cli.datamodule.train_dataloader())
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * 1e-2), (
        "the schedule ends with the run"
    )


def test_a_given_tokenizer_is_used(corpus, tmp_path, smoke_words):
    cli = fit(corpus, tmp_path, f"--model.lm.tokenizer={smoke_words}")
    assert cli.model.tokenizer.eos_token == "</s>"
    assert cli.datamodule.stores["train"].row(0).ids[0] == 1


@pytest.fixture
def smoke_words(tmp_path):
    from models.tiny_models import word_tokenizer

    word_tokenizer().save_pretrained(tmp_path / "words")
    return tmp_path / "words"


def test_a_vocabulary_below_the_tokenizers_is_refused(corpus, tmp_path):
    said = refusal(corpus, tmp_path, "--data.vocab_size=300", "--model.lm.overrides.vocab_size=280")
    assert "the model has a vocabulary of 280 (vocab_size), the tokenizer one of 300" in said


def test_rows_longer_than_the_context_are_refused(corpus, tmp_path):
    assert "data.max_length is 512, but the model is made for 256" in refusal(corpus, tmp_path, "--data.max_length=512")


def test_without_text_data_a_tokenizer_must_be_named(corpus, tmp_path):
    said = refusal(corpus, tmp_path, "--data=TraceData", f"--data.train_file={corpus}")
    assert "lm.tokenizer is missing" in said


FACTORED = ["--model.lm.lowrank.rank=4", "--model.lm.lowrank.alpha=4"]


@pytest.mark.parametrize(
    "own",
    [
        ["--model.optim.optimizer=muon"],
        ["--model.optim.optimizer=fira", "--model.optim.subspace.rank=4", "--model.optim.subspace.refresh_steps=3"],
        [*FACTORED, "--model.optim.optimizer=loro", "--model.optim.subspace.refresh_steps=3"],
    ],
    ids=["muon", "fira", "loro"],
)
def test_other_optimizers_resume_bit_for_bit_without_running_code(corpus, tmp_path, own):
    saver = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps=2"]
    more = [*own, "--trainer.max_steps=5", "--trainer.callbacks.save_top_k=-1"]
    whole = fit(corpus, tmp_path / "a", *saver, *more)
    (saved,) = run_folder(whole.trainer).glob("checkpoints/*step=2.ckpt")
    rest = fit(corpus, tmp_path / "b", *own, "--trainer.max_steps=5", f"--ckpt_path={saved}", "--weights_only=true")
    for (name, a), (_, b) in zip(whole.model.lm.named_parameters(), rest.model.lm.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    first = read_metrics(run_folder(whole.trainer) / "metrics.csv").points("train/loss")
    assert first[-1][1] < first[0][1]


@pytest.mark.parametrize(
    "size, full, factored",  # millions of parameters, as the literature's shapes and ranks give them
    [("60m", 58.1, 42.8), ("130m", 134.1, 94.0), ("350m", 368.0, 185.2), ("1b", 1339.1, 609.3)],
)
def test_recipes_have_the_sizes_of_the_literature(size, full, factored):
    for variant, wanted in (("full", full), ("lowrank-restarts", factored)):
        recipe = yaml.safe_load((ROOT / f"pretrain/llama-{size}-{variant}.yaml").read_text())
        lm = recipe["model"]["init_args"]["lm"]
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(LlamaConfig(**{**lm["config"], "vocab_size": 32000}))
        if variant != "full":
            make_lowrank(model, LowRankConfig(**lm["lowrank"]), from_weights=False)
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(wanted, abs=0.05)
