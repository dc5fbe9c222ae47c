"""The page's part on unlearning."""

from lit_reason.core.metrics_log import parse_metrics
from lit_reason.core.unlearning_page import unlearning_section


def test_both_sets_and_the_parts_of_the_score_are_drawn():
    log = parse_metrics(
        "step,train/forget_loss,train/retain_loss,val/forget_loss,val/aggregate,val/utility,val/forget_task1_knowledge,"
        "val/forget_task1_regurgitation,val/retain_task1_knowledge\n"
        "0,1.0,1.0,,,,,,\n1,2.0,0.9,,,,,,\n1,,,2.5,0.4,0.5,1.0,0.5,1.0\n2,3.0,0.8,,,,,,\n2,,,3.5,0.6,0.5,0.2,0.4,0.9\n"
    )
    section = unlearning_section(log)
    assert [figure.title for figure in section.figures] == ["Loss by set", "Remembered", "Parts of the final score"]
    drawn = "".join(str(figure) for figure in section.figures)
    assert "forget, training" in drawn and "task aggregate" in drawn and not section.tables
    remembered = section.figures[1].legend
    assert [(key.label, key.value) for key in remembered] == [("forget set", "30%"), ("retain set", "90%")]


def test_what_probes_brought_back_is_a_table():
    columns = [f"probe/relearn_{c}" for c in ("loss_before", "loss_after", "memory_before", "memory_after")]
    log = parse_metrics(f"step,train/forget_loss,{','.join(columns)}\n0,1.0,,,,\n1,,5.0,2.0,0.1,0.7\n")
    (table,) = unlearning_section(log).tables
    assert table.rows == [["trained on other rows to forget", "5.000", "2.000", "0.100", "0.700"]]


def test_other_runs_have_no_such_part():
    assert not unlearning_section(parse_metrics("step,train/loss\n0,1.0\n1,0.5\n")).figures
