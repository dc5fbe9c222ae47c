"""`lit-reason plan`: memory of a run before it starts."""

import re

import pytest
from tiny_run import arguments, write_model

from lit_reason.cli.door import main
from lit_reason.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = tmp_path_factory.mktemp("plan")
    write_model(base / "model")
    return base


def planned(folder, tmp_path, capsys, **settings) -> str:
    command = arguments(folder, tmp_path, data__train_file=None, **settings)
    assert main(["plan", *command]) == 0
    return capsys.readouterr().out


def figure(text: str, name: str) -> float:
    return float(re.search(rf"^  {re.escape(name)} +([\d.]+)", text, re.MULTILINE).group(1))


WIDE = {"model__lm__overrides": '{"vocab_size": 20000, "hidden_size": 256, "intermediate_size": 512}'}


def test_a_recipe_is_planned_without_its_data_and_from_a_checkpoint_without_its_weights(folder, tmp_path, capsys):
    text = planned(folder, tmp_path, capsys, **WIDE)
    assert "LlamaForCausalLM: 11.1 M parameters, 11.1 M trained, float32; 8 rows of 128 tokens" in text
    assert figure(text, "weights") == figure(text, "gradients") == pytest.approx(0.044, abs=0.001)
    assert figure(text, "optimizer (adamw)") == pytest.approx(0.089, abs=0.001)
    assert figure(text, "peak of a step") > 0.18


def test_low_rank_and_devices_change_the_plan(folder, tmp_path, capsys):
    settings = {**WIDE, "model__lm__lowrank__rank": 16, "trainer__devices": 4}
    sharded = planned(folder, tmp_path, capsys, trainer__strategy="fsdp2", **settings)
    copied = planned(folder, tmp_path, capsys, trainer__strategy="ddp", **settings)
    assert "this model by method, rank 16" in sharded and "10.4 M parameters" in sharded
    peak, whole = figure(sharded, "peak of a step"), sum(figure(sharded, n) for n in ("weights", "gradients"))
    whole += figure(sharded, "optimizer (adamw)")
    each = [float(re.search(r"about ([\d.]+) GB", text).group(1)) for text in (sharded, copied)]
    assert each[0] == pytest.approx(peak - 0.75 * whole, abs=0.002)
    assert each[1] == pytest.approx(peak + figure(copied, "gradients"), abs=0.002)


def test_half_precision_weights_take_half(folder, tmp_path, capsys):
    text = planned(folder, tmp_path, capsys, trainer__precision="bf16-true", **WIDE)
    assert "bfloat16" in text and figure(text, "weights") == pytest.approx(0.022, abs=0.001)


def test_what_cannot_be_planned_is_said(folder, tmp_path, capsys):
    assert main(["plan", "--help"]) == 0 and "Usage: lit-reason plan RECIPE" in capsys.readouterr().out
    assert main(["plan"]) == 2
    assert main(["plan", "no/such-recipe"]) == 2
    command = arguments(folder, tmp_path, data__train_file=None, model__lm__adapter__quantize="nf4")
    assert main(["plan", *command]) == 2
    assert "quantised models are not counted" in capsys.readouterr().err
    from lit_reason.cli.plan import micro_batch

    with pytest.raises(UserError, match="str has no max_length"):
        micro_batch("")
