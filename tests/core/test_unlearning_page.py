"""The page's part on unlearning."""

from lit_reason.core.metrics_log import parse_metrics
from lit_reason.core.unlearning_page import unlearning_section


def test_both_sets_and_the_parts_of_the_score_are_drawn():
    log = parse_metrics(
        "step,train/forget_loss,train/retain_loss,val/forget_loss,val/aggregate,val/utility\n"
        "0,1.0,1.0,,,\n1,2.0,0.9,,,\n1,,,2.5,0.4,0.5\n2,3.0,0.8,,,\n2,,,3.5,0.6,0.5\n"
    )
    figures = unlearning_section(log).figures
    assert [figure.title for figure in figures] == ["Loss by set", "Parts of the final score"]
    drawn = "".join(str(figure) for figure in figures)
    assert "forget, training" in drawn and "task aggregate" in drawn


def test_other_runs_have_no_such_part():
    assert not unlearning_section(parse_metrics("step,train/loss\n0,1.0\n1,0.5\n")).figures
