"""Generated tasks on disk."""

import json

import pytest

from lit_reason.errors import UserError
from lit_reason.tasks import chain, generated, search


@pytest.mark.parametrize(("kind", "module"), [("chain", chain), ("search", search)])
def test_the_files_hold_the_problems_of_the_task(tmp_path, kind, module):
    config = generated.task_config(kind, {})
    generated.write_data(tmp_path, kind, config, rows=3, held_out=2, seed=5)

    def read(name):
        return [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]

    assert read("train") == [module.record(config, 5, n, held_out=False) for n in range(3)]
    assert read("heldout") == [module.record(config, 5, n, held_out=True) for n in range(2)]
    for whole, bare in zip(read("train"), read("answers"), strict=True):
        assert bare["messages"][0] == whole["messages"][0] and bare["answer"] == whole["answer"]
        assert bare["messages"][1]["content"] == f"<think></think> {whole['answer']}"


def test_problems_are_written_again_only_when_others_are_asked_for(tmp_path):
    def stamp():
        return (tmp_path / "train.jsonl").stat().st_mtime_ns

    generated.prepare(tmp_path, "chain", {}, rows=2, held_out=1)
    first = stamp()
    generated.prepare(tmp_path, "chain", {}, rows=2, held_out=1)
    assert stamp() == first
    (tmp_path / "problems.json").unlink()  # killed before the last file was whole
    generated.prepare(tmp_path, "chain", {}, rows=2, held_out=1)
    second = stamp()
    assert second != first
    generated.prepare(tmp_path, "chain", {"links": 2}, rows=2, held_out=1)
    assert stamp() != second and " fourth" not in (tmp_path / "train.jsonl").read_text()


def test_what_is_refused():
    with pytest.raises(UserError, match="did you mean 'chain'"):
        generated.task_config("chian", {})
    with pytest.raises(UserError, match="no setting 'link' .*'links'"):
        generated.task_config("chain", {"link": 2})
