"""What the trainer sets up on its own."""

from __future__ import annotations

import pytest
from lightning.pytorch.callbacks import Callback, RichProgressBar, TQDMProgressBar

from lit_reason.core.trainer import ReasonTrainer


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({}, TQDMProgressBar),
        ({"callbacks": [Callback()]}, TQDMProgressBar),
        ({"callbacks": RichProgressBar()}, RichProgressBar),
        ({"callbacks": [RichProgressBar()]}, RichProgressBar),
        ({"enable_progress_bar": False}, type(None)),
    ],
)
def test_the_progress_bar_is_plain_unless_another_is_asked_for(tmp_path, settings, kind):
    trainer = ReasonTrainer(accelerator="cpu", max_steps=1, logger=False, default_root_dir=tmp_path, **settings)
    assert type(trainer.progress_bar_callback) is kind
