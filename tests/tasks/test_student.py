"""The student's folder: tokenizer round trips, template contract, seeded weights, loading, condensation of its rows."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_reason.data.condensation.condense import Condenser
from lit_reason.data.config import CondenseConfig, RenderConfig
from lit_reason.data.reading.formats import to_conversation
from lit_reason.data.rendering.contract import check_contract
from lit_reason.data.rendering.render import Renderer
from lit_reason.data.token_row import Segment
from lit_reason.rewards.checkers import get_checker
from lit_reason.tasks import chain, search, student

TASKS = {
    "chain": (chain, chain.ChainConfig()),
    "chain, middle used": (chain, chain.ChainConfig(used_share=0.5)),
    "search": (search, search.SearchConfig()),
}


@pytest.fixture(params=TASKS)
def task(request):
    return TASKS[request.param]


@pytest.fixture
def tokenizer(task, tmp_path):
    module, config = task
    return AutoTokenizer.from_pretrained(student.write_student(tmp_path / "student", module.words(config)))


def rows(task, n=150):
    module, config = task
    return [module.record(config, seed, i, held_out=i % 2 == 0) for seed in (0, 1) for i in range(n // 2)]


def test_every_problem_survives_the_tokenizer_byte_for_byte_without_unknown_words(task, tokenizer):
    for row in rows(task):
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.unk_token_id not in ids


def test_every_word_is_one_token_and_a_strange_one_is_unknown(task, tokenizer):
    module, config = task
    for word in [*module.words(config), "<think>", "</think>", "<|end|>"]:
        assert len(tokenizer(word, add_special_tokens=False).input_ids) == 1
    assert len(tokenizer) == 7 + len(set(module.words(config)))
    assert tokenizer(" zebra", add_special_tokens=False).input_ids == [tokenizer.unk_token_id]


def test_think_markers_stay_when_special_tokens_are_left_out(tokenizer):
    ids = tokenizer("<|assistant|><think>so a", add_special_tokens=False).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True).startswith("<think>so")


def test_rows_keep_the_template_contract(task, tokenizer):
    conversations = [to_conversation(row, f"x:{i}") for i, row in enumerate(rows(task, 20))]
    renderer = Renderer(tokenizer, RenderConfig())
    report = check_contract(renderer, conversations)
    assert report.checked == len(conversations) and not report.refused
    assert report.end_token == "<|end|>" and report.pad_token == "<|pad|>"
    for conversation in conversations:
        (row,) = renderer.rows(conversation)
        prompt = renderer.prompt(conversation)
        assert row.ids[: len(prompt)].tolist() == prompt
        assert (row.weight[: len(prompt)] == 0).all() and (row.weight[len(prompt) :] == 1).all()
        assert (row.segment == Segment.END).sum() == 1


def test_epic_at_half_keeps_the_chain_answerable_and_the_search_not():
    settings = CondenseConfig(strategy="epic", min_chars=1, min_tokens=0)
    for name, whole in (("chain", True), ("search", False)):
        module, config = TASKS[name]
        condenser = Condenser(settings, lambda text: len(text.split()))
        found = []
        for i, row in enumerate(rows(TASKS[name], 60)):
            kept = condenser(to_conversation(row, f"x:{i}")).messages[-1]
            thoughts = [t.strip() for t in kept.trace.thoughts]
            full = row["messages"][1]["content"][len("<think>") :].partition("</think>")[0].split("\n\n")
            assert kept.trace.total == len(full)
            needed = [t for t in full if t.startswith(("is", "decode", "so")) or (name == "search" and " no." in t)]
            found.append(set(needed) <= set(thoughts))
            assert len(thoughts) == -(-len(full) // 2)
            assert get_checker(f"lit_reason.tasks.{name}:check")(kept.content, row["answer"]).correct
        assert all(found) if whole else not any(found)


def test_the_folder_loads_and_its_weights_depend_on_the_seed_alone(tmp_path):
    words = chain.words(chain.ChainConfig())
    torch.manual_seed(5)
    before = torch.get_rng_state()
    folders = [student.write_student(tmp_path / n, words, seed=s) for n, s in (("a", 1), ("b", 1), ("c", 2))]
    assert torch.equal(torch.get_rng_state(), before)
    a, b, c = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in folders)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], c[name]) for name in a)
    embedding = a["model.embed_tokens.weight"]
    assert abs(embedding[1:].std().item() - student.StudentConfig().init_std) < 0.01


def test_writing_again_replaces_the_folder_and_leaves_nothing_beside_it(tmp_path):
    small = student.StudentConfig(width=32, heads=2, layers=1, mlp_width=64)
    words = chain.words(chain.ChainConfig())
    student.write_student(tmp_path / "base", words, seed=0)
    (tmp_path / "base" / "stray").write_text("x")
    student.write_student(tmp_path / "base", words, small, seed=0)
    assert [p.name for p in tmp_path.iterdir()] == ["base"]
    assert not (tmp_path / "base" / "stray").exists()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert model.config.hidden_size == 32 and model.config.num_hidden_layers == 1


def test_the_template_refuses_roles_it_does_not_know(tokenizer):
    with pytest.raises(Exception, match="user and assistant"):
        tokenizer.apply_chat_template([{"role": "system", "content": "x"}], tokenize=False)
