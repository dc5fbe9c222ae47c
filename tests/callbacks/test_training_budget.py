"""Runs of a given number of trained tokens, or of a share of what the recipe says."""

import numpy as np
import pytest
from lightning.pytorch import Callback
from tiny_run import fit, write_model, write_traces

from lit_reason.callbacks.throughput import Throughput
from lit_reason.callbacks.training_budget import TrainingBudget
from lit_reason.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("budget")
    write_model(made / "model")
    write_traces(made / "traces.jsonl", rows=40)
    return made


def trained(folder, run, budget, **settings):
    counter = Throughput()
    cli = fit(folder, run, [counter, budget], **settings)
    return counter.totals, cli


EPOCH = {"trainer__max_steps": None, "trainer__max_epochs": 1}


@pytest.mark.parametrize("strategy", ["full", "epic"])
@pytest.mark.parametrize("budget", [700, 2600])  # within the first of five steps an epoch, and over several epochs
def test_a_number_of_trained_tokens_is_met_to_within_half_a_step(folder, tmp_path, strategy, budget):
    totals, cli = trained(folder, tmp_path, TrainingBudget(budget), data__condense__strategy=strategy, **EPOCH)
    counts = np.sort(cli.datamodule.stores["train"].trained_counts)
    largest = counts[-8:].sum()  # trained tokens of the largest step there can be
    assert abs(totals.trained_tokens - budget) <= largest / 2
    assert totals.steps == cli.trainer.max_steps == cli.trainer.estimated_stepping_batches


def test_the_nearer_of_two_steps_is_the_last(folder, tmp_path):
    _, cli = trained(folder, tmp_path, TrainingBudget(share=0.2), **EPOCH)
    loader = cli.datamodule.train_dataloader()
    counts = loader.store.trained_counts
    first, second = (int(counts[list(rows)].sum()) for rows in loader.sampler.plan(0)[:2])
    assert loader.steps_for(first) == 1
    assert loader.steps_for(first + second / 2 - 1) == 1
    assert loader.steps_for(first + second / 2 + 1) == 2
    assert loader.steps_for(1) == 1


def test_accumulated_micro_batches_are_counted_as_one_step(folder, tmp_path):
    settings = {**EPOCH, "trainer__accumulate_grad_batches": 2}
    totals, cli = trained(folder, tmp_path, TrainingBudget(700), **settings)
    plan, counts = cli.datamodule.train_dataloader().sampler.plan(0), cli.datamodule.stores["train"].trained_counts
    sizes = [int(counts[[*a, *b]].sum()) for a, b in zip(plan[::2], plan[1::2], strict=False)]
    assert totals.trained_tokens == sum(sizes[: totals.steps])
    assert abs(totals.trained_tokens - 700) <= max(sizes) / 2


def test_counts_are_those_that_training_counts(folder, tmp_path):
    totals, cli = trained(folder, tmp_path, TrainingBudget(), **EPOCH)
    assert totals.trained_tokens == cli.datamodule.stores["train"].trained_counts.sum()
    assert totals.steps == 5  # no budget: one epoch, as the recipe says


@pytest.mark.parametrize(("settings", "steps"), [(EPOCH, 2), ({"trainer__max_steps": 4}, 2)])
def test_a_share_of_the_recipe(folder, tmp_path, settings, steps):
    rates = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, *_):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    counter, schedule = (
        Throughput(),
        {"model__optim__schedule": "linear", "model__optim__warmup": 0, "model__optim__final_lr": 0},
    )
    fit(folder, tmp_path, [counter, TrainingBudget(share=0.5), Watch()], **schedule, **settings)
    assert counter.totals.steps == steps
    assert rates == pytest.approx([3e-3, 0], abs=1e-9)  # the schedule was made for two steps, not for four or five


def test_what_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match="trained_tokens is 0"):
        TrainingBudget(0)
    with pytest.raises(UserError, match="share is 1.5"):
        TrainingBudget(share=1.5)
    endless = {"trainer__max_steps": None, "trainer__max_epochs": -1}
    with pytest.raises(UserError, match="max_epochs or trainer.max_steps"):
        trained(folder, tmp_path, TrainingBudget(share=0.5), **endless)
