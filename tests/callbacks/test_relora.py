"""ReLoRA: the function stays at a merge, the update adds up to high rank, and a resume goes on with merged weights."""

import json

import pytest
import torch
from models.tiny_models import pack, tiny
from transformers import AutoModelForCausalLM

from lit_reason.callbacks.relora import ReLoRA, merge
from lit_reason.cli.reason_cli import build
from lit_reason.core.run_folder import run_folder
from lit_reason.errors import UserError
from lit_reason.models.config import AdapterConfig


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": f"row {i} of {i % 5} and more of it"}) + "\n" for i in range(120)))
    return path


SMOKE = ["--config", "smoke/pretrain", "--data.text_field=text"]


def fit(corpus, folder, *more):
    recipe = [
        *(*SMOKE, f"--vars.folder={folder}", f"--data.train_file={corpus}"),
        *("--model.lm.adapter.rank=2", "--model.lm.adapter.train_rest=true"),
        *("--model.optim.period_steps=3", "--model.optim.recovery_steps=2", "--model.optim.schedule=jagged_cosine"),
        *("--trainer.max_steps=12", "--trainer.callbacks+=ReLoRA"),
    ]
    cli = build("fit", [*recipe, *more])
    cli.run_verb()
    return cli


def layers(lm):
    return [m for m in lm.modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")]


def test_a_merge_leaves_the_function_as_it_is_and_begins_anew():
    lm = tiny(adapter=AdapterConfig(rank=2))
    for layer in layers(lm):
        torch.nn.init.normal_(layer.lora_B["default"].weight)
    batch = pack([5, 9, 7, 11], [3, 4, 8])
    with torch.no_grad():
        before = lm.hidden(*batch)
        old = [layer.lora_A["default"].weight.clone() for layer in layers(lm)]
        for layer in layers(lm):
            merge(layer, torch.Generator().manual_seed(0))
        torch.testing.assert_close(lm.hidden(*batch), before, rtol=1e-4, atol=1e-5)
    for layer, a in zip(layers(lm), old, strict=True):
        new = layer.lora_A["default"].weight
        assert not layer.lora_B["default"].weight.any() and not torch.equal(new, a)
        assert 0.5 < new.abs().max() * new.shape[1] ** 0.5 <= 1


def test_updates_add_up_to_more_than_the_adapters_rank_and_resume_bit_for_bit(corpus, tmp_path):
    saver = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps=5"]
    saver += ["--trainer.callbacks.save_top_k=-1", "--trainer.callbacks+=HFExport"]
    whole = fit(corpus, tmp_path / "a", *saver)
    (saved,) = run_folder(whole.trainer).glob("checkpoints/*step=5.ckpt")
    rest = fit(corpus, tmp_path / "b", f"--ckpt_path={saved}")
    for (name, a), (_, b) in zip(whole.model.lm.named_parameters(), rest.model.lm.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    from lit_reason.models.language_model import LanguageModel

    start = LanguageModel.load(whole.model.lm_config)
    for then, now in zip(layers(start), layers(whole.model.lm), strict=True):
        assert (
            torch.linalg.matrix_rank(now.base_layer.weight - then.base_layer.weight, rtol=1e-4) == 4
        )  # 2 merges of 2, at steps 3 and 6
    assert not torch.equal(start.head.weight, whole.model.lm.head.weight), "train_rest trains the output layer"
    export = AutoModelForCausalLM.from_pretrained(run_folder(whole.trainer) / "export").eval()
    ids = torch.tensor([[3, 8, 5, 260]])
    with torch.no_grad():
        ours = whole.model.lm.hf.eval()(input_ids=ids).logits
        torch.testing.assert_close(export(input_ids=ids).logits, ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("by", ["random", "magnitude"])
def test_pruning_keeps_its_share(by):
    moments = {name: torch.arange(1.0, 1001).view(50, 20) for name in ("exp_avg", "exp_avg_sq")}
    ReLoRA(keep=0.1, by=by)._prune({**moments, "step": torch.tensor(5.0)}, torch.Generator().manual_seed(0))
    left = moments["exp_avg"][moments["exp_avg"] != 0]
    assert 70 < len(left) < 130
    assert (left.min() == 901) == (by == "magnitude")


def test_what_cannot_work_is_refused(corpus, tmp_path):
    with pytest.raises(UserError, match="keep is 2"):
        ReLoRA(keep=2)
    plain = ["--model.optim.period_steps=3", "--trainer.max_steps=4", "--trainer.callbacks+=ReLoRA"]
    with pytest.raises(UserError, match="no adapter to merge"):
        build("fit", [*SMOKE, f"--vars.folder={tmp_path}", f"--data.train_file={corpus}", *plain]).run_verb()
    with pytest.raises(UserError, match="schedule: jagged_cosine"):
        fit(corpus, tmp_path, "--model.optim.schedule=cosine")
