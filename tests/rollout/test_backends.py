"""All back ends against one contract, and what a server may do wrong."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from completion_stub import CompletionStub
from peft import LoraConfig, get_peft_model
from rigged_model import WORDS, chain_llama, ids_of, random_llama, word_tokenizer

from lit_reason.errors import UserError
from lit_reason.models.config import ModelConfig
from lit_reason.models.language_model import LanguageModel
from lit_reason.rollout import server
from lit_reason.rollout.backends import backend_for
from lit_reason.rollout.config import BackendConfig, SamplingConfig

EOS = WORDS.index("<eos>")
PROMPTS = [ids_of(p) for p in ("a b c d", "q", "r so try 1 2 3")]
KINDS = ("own", "continuous", "server")


@pytest.fixture
def stubs(monkeypatch):
    """Starts servers; all are closed in the end, and nothing goes through a proxy."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(server, "_PAUSES_S", (0.0, 0.0))
    open_ones = []

    def start(model):
        open_ones.append(CompletionStub(model))
        return open_ones[-1]

    yield start
    for stub in open_ones:
        stub.close()


def backend(kind, stubs, hf, stop_ids=(EOS,), *, served=None, settings=None, **sampling):
    """A back end of this kind over the model; a server has a copy of it, or `served`."""
    chosen = {"temperature": 1.0, "top_p": 1.0, **sampling}
    if kind != "server":
        stub, config = None, BackendConfig(kind)
    else:
        stub = stubs(copy.deepcopy(hf) if served is None else served)
        fields = {"url": stub.url, "model": stub.name, "sync": "none", **(settings or {})}
        config = BackendConfig("server", **fields)
    lm = LanguageModel(hf, ModelConfig())
    run = backend_for(config, lm, word_tokenizer(), SamplingConfig(**chosen), stop_ids)
    run.begin_round(0)
    return run, stub


def alone(hf, ids, temperature=1.0):
    """Log-probability of each token after the first, by a plain pass over this sequence."""
    with torch.no_grad():
        logits = hf.eval()(torch.tensor([ids])).logits[0].float() / temperature
    return logits[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_log_probabilities_are_those_of_the_model(kind, stubs):
    run, _ = backend(kind, stubs, random_llama().float())
    run.open(PROMPTS)
    run.fork(2)
    for turn in range(3):
        before = [run.ids(i) for i in range(6)]
        done = run.step([2, 5, 3, 4, 1, 0])
        assert done[5].ids == [] and done[5].stop == "length"
        for i, (start, one) in enumerate(zip(before, done, strict=True)):
            assert run.ids(i) == start + one.ids
            expected = alone(run.lm.hf, run.ids(i))[len(start) - 1 :]
            torch.testing.assert_close(torch.tensor(one.logprobs), expected, rtol=0, atol=1e-4)
            run.append(i, ids_of("wait 1") * (turn + 1))
    assert run.ids(0) != run.ids(1)
    whole = [run.ids(i) for i in range(6)]
    run.keep([4, 0])
    assert [run.ids(0), run.ids(1)] == [whole[4], whole[0]]


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_weights_write_the_same_greedily(kind, stubs):
    run, _ = backend(kind, stubs, random_llama().float(), temperature=0.0)
    own, _ = backend("own", stubs, random_llama().float(), temperature=0.0)
    for one in (run, own):
        one.open(PROMPTS)
    for _ in range(2):
        mine, theirs = run.step([6] * 3), own.step([6] * 3)
        assert [t.ids for t in mine] == [t.ids for t in theirs]
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_turns_end_at_end_tokens_and_stop_strings_alone(kind, stubs):
    run, _ = backend(kind, stubs, chain_llama("q try wait </think> so", "a b c <eos>").float(), temperature=0.0)
    run.open([ids_of("q"), ids_of("a"), ids_of("r q try")])
    stopped, ended, cut = run.step([9, 9, 1], ["ait </th"])
    assert (stopped.ids, stopped.text, stopped.stop) == (ids_of("try wait </think>"), "try wait </th", "ait </th")
    assert (ended.ids, ended.text, ended.stop) == (ids_of("b c <eos>"), "b c", "end")
    assert (cut.ids, cut.stop) == (ids_of("wait"), "length")
    assert len(stopped.logprobs) == 3 and run.ids(0) == ids_of("q try wait </think>")


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_prompt_is_refused(kind, stubs):
    with pytest.raises(UserError, match="prompt 1 is empty"):
        backend(kind, stubs, random_llama().float())[0].open([[1], []])


@pytest.mark.parametrize("kind", ["continuous", "server"])
def test_seeds_repeat_a_turn_and_differ_otherwise(kind, stubs):
    def turns(**sampling):
        run, _ = backend(kind, stubs, random_llama().float(), stop_ids=(99,), **sampling)
        run.open([PROMPTS[0]] * 2)
        return [t.ids for t in run.step([8, 8])]

    first = turns()
    assert turns() == first and turns(seed=1) != first
    assert first[0] != first[1]


# ---- continuous batching ----


def test_continuous_batching_leaves_the_trainer_as_it_was(stubs):
    run, _ = backend("continuous", stubs, random_llama().float())
    run.lm.train()
    attention, state = run.lm.base.config._attn_implementation, torch.get_rng_state()
    run.open(PROMPTS)
    run.step([3, 3, 3])
    assert run.lm.hf.training and run.lm.base.config._attn_implementation == attention
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("sampling", [{"top_p": 0.5}, {"top_k": 3}, {"temperature": 0.7}])
def test_continuous_batching_gives_those_of_the_untruncated_distribution(stubs, sampling):
    run, _ = backend("continuous", stubs, random_llama().float(), **sampling)
    assert run.scorer == ("sampler" if "temperature" in sampling else "trainer")
    run.open(PROMPTS)
    for i, turn in enumerate(run.step([6, 6, 6])):
        expected = alone(run.lm.hf, run.ids(i), sampling.get("temperature", 1.0))[len(PROMPTS[i]) - 1 :]
        torch.testing.assert_close(torch.tensor(turn.logprobs), expected, rtol=0, atol=1e-4)


def test_continuous_batching_refuses_what_it_would_leave_out(stubs):
    with pytest.raises(UserError, match="min_p"):
        backend("continuous", stubs, random_llama().float(), min_p=0.1)


@pytest.mark.parametrize(
    ("dtype", "temperature", "place"),
    [("float32", 1.0, "turn 0, token 2"), ("float32", 0.0, "turn 0, token 2"), ("bfloat16", 0.0, "turn 0")],
)
def test_continuous_batching_names_the_place_and_cause_of_broken_output(stubs, dtype, temperature, place):
    hf = chain_llama("q a b c d").to(getattr(torch, dtype))
    run, _ = backend("continuous", stubs, hf, temperature=temperature)
    with torch.no_grad():
        hf.model.embed_tokens.weight[WORDS.index("b")] = torch.nan
    run.open([ids_of("q")], ["x"])
    with pytest.raises(UserError, match=f"prompt 'x', rollout 0, {place}: .*NaN.* first of them model.embed_tokens"):
        run.step([4])


def test_continuous_batching_that_fails_otherwise_says_what_it_was_told(stubs, monkeypatch):
    results = [SimpleNamespace(request_id="1", error="no room", generated_tokens=[4], logprobs=[-1.0])]
    manager = SimpleNamespace(
        add_request=lambda *_, **__: None,
        get_result=lambda timeout: results.pop() if results else None,
        is_running=lambda: False,
    )
    run, _ = backend("continuous", stubs, random_llama().float())
    monkeypatch.setattr(run, "_manager", lambda requests: nullcontext(manager))
    run.open(PROMPTS, ["x", "y", "z"])
    with pytest.raises(UserError, match="continuous: prompt 'y', rollout 0, turn 0: no room"):
        run.step([3] * 3)
    with pytest.raises(UserError, match="continuous: the generation stopped before all turns ended"):
        run.step([3] * 3)


# ---- a server ----


def test_a_request_says_everything_and_no_text(stubs):
    run, stub = backend("server", stubs, random_llama().float(), top_k=5, min_p=0.1)
    run.open(PROMPTS[:1])
    run.step([2], ["so"])
    run.append(0, [7, 8])
    run.step([3], ["so"])
    first, second = stub.asked
    assert first["prompt"] == PROMPTS[0] and second["prompt"][-2:] == [7, 8]
    assert second["prompt"] == run.ids(0)[: len(second["prompt"])]
    asked = {"max_tokens": 3, "temperature": 1.0, "top_p": 1.0, "top_k": 5, "min_p": 0.1, "stop": ["so"]}
    assert {k: second[k] for k in asked} == asked and second["stop_token_ids"] == [EOS]
    assert first["seed"] != second["seed"] and second["return_token_ids"] and second["include_stop_str_in_output"]


def choice(change):
    return lambda answer: change(answer["choices"][0])


SPOILT = {
    "no token ids": choice(lambda c: c.pop("token_ids")),
    "no log-probabilities": choice(lambda c: c.pop("logprobs")),
    "missing, infinite": choice(lambda c: c["logprobs"]["token_logprobs"].__setitem__(0, None)),
    "missing, infinite or above": choice(lambda c: c["logprobs"]["token_logprobs"].__setitem__(0, 0.5)),
    "3 token ids, 2 log-probabilities": choice(lambda c: c["logprobs"]["token_logprobs"].pop()),
    "of other tokens": choice(lambda c: c["logprobs"]["tokens"].__setitem__(0, "token_id:3")),
    "not the one it was sent": choice(lambda c: c["prompt_token_ids"].__setitem__(0, 9)),
    "read 5 prompt tokens, and was sent 4": lambda a: a["usage"].__setitem__("prompt_tokens", 5),
    "a limit of 3": choice(lambda c: (c["token_ids"].append(4), c["logprobs"]["token_logprobs"].append(-1.0))),
    "without a known end": choice(
        lambda c: (c["token_ids"].pop(), c["logprobs"]["token_logprobs"].pop(), c["logprobs"]["tokens"].pop())
    ),
    "not enough values to unpack": lambda a: a.__setitem__("choices", []),
}


@pytest.mark.parametrize(("says", "spoil"), SPOILT.items(), ids=SPOILT)
def test_an_answer_that_cannot_be_believed_is_refused(stubs, says, spoil):
    run, stub = backend("server", stubs, random_llama().float(), stop_ids=(99,))
    stub.spoil = spoil
    run.open(PROMPTS[:1])
    with pytest.raises(UserError, match=says):
        run.step([3])


def test_a_fault_that_passes_is_tried_again_and_one_that_stays_is_told(stubs):
    run, stub = backend("server", stubs, random_llama().float(), stop_ids=(99,))
    run.open(PROMPTS[:1])
    stub.status = [503, 500]
    assert len(run.step([3])[0].ids) == 3 and len({a["seed"] for a in stub.asked}) == 1
    stub.status = [503, 500, 502]
    with pytest.raises(UserError, match="completions failed 3 times, last with 502 .*out of order"):
        run.step([3])
    stub.status = [400, 200]
    with pytest.raises(UserError, match="completions refuses: 400"):
        run.step([3])
    assert stub.status == [200]  # what is wrong with the request stays wrong


def test_a_server_that_is_silent_or_gone_has_failed(stubs):
    run, stub = backend("server", stubs, random_llama().float(), settings={"timeout_s": 0.2})
    run.open(PROMPTS[:1])
    stub.silence = 0.5
    with pytest.raises(UserError, match="failed 3 times, last with TimeoutError"):
        run.step([3])
    stub.close()
    with pytest.raises(UserError, match="failed 3 times, last with URLError.*refused"):
        run.step([3])


def test_other_weights_are_noticed_at_once(stubs):
    run, _ = backend("server", stubs, random_llama().float(), served=random_llama(1).float())
    run.open(PROMPTS)
    with pytest.raises(UserError, match="nats a token from those of the trainer's weights"):
        run.step([6] * 3)


def test_weights_that_stay_behind_are_refused_or_named(stubs):
    run, _ = backend("server", stubs, random_llama().float())
    with pytest.raises(UserError, match="weights of version 0, the trainer has made 3 updates since"):
        run.begin_round(3)
    run, _ = backend("server", stubs, random_llama().float(), served=random_llama(1).float(), settings={"most_lag": 3})
    assert run.begin_round(3) == 0  # what the ledger will say
    run.open(PROMPTS)
    run.step([4] * 3)  # other weights are expected
    with pytest.raises(UserError, match="made 4 updates"):
        run.begin_round(4)


def adapted(seed=0):
    torch.manual_seed(seed)
    return get_peft_model(random_llama().float(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))


def test_an_adapter_is_loaded_under_its_version_and_hash(stubs, tmp_path):
    settings = {"sync": "adapter", "folder": str(tmp_path)}
    hf = adapted()
    run, stub = backend("server", stubs, hf, served=adapted(1), settings=settings, stop_ids=(99,))
    (first,) = stub.adapters
    with torch.no_grad():
        for name, weight in hf.named_parameters():
            if "lora_B" in name:
                weight += 0.5
    assert run.begin_round(7) == 7
    (second,) = stub.adapters  # the first was let go
    assert first.startswith("policy-0-") and second.startswith("policy-7-") and first[9:] != second[9:]
    assert [p.name for p in tmp_path.iterdir()] == [second]
    run.open(PROMPTS)
    for i, turn in enumerate(run.step([5] * 3)):  # compared with the trainer's weights on the way
        expected = alone(hf, run.ids(i))[len(PROMPTS[i]) - 1 :]
        torch.testing.assert_close(torch.tensor(turn.logprobs), expected, rtol=0, atol=1e-4)
    assert {a["model"] for a in stub.asked} == {second}
    run.begin_round(7)  # the same weights again need no loading
    stub.adapters.clear()  # a server that was started anew knows nothing
    with pytest.raises(UserError, match=f"refuses: 404.*{second} does not exist"):
        run.step([5] * 3)


@pytest.mark.parametrize(
    ("settings", "sampling", "says"),
    [
        ({"sync": "adapter", "folder": "x"}, {}, "the model has none"),
        ({}, {"temperature": 0.7}, "processed_logprobs"),
        ({"logprobs": "processed"}, {"top_p": 0.9}, "truncated distribution"),
    ],
)
def test_what_a_server_cannot_do_is_refused(stubs, settings, sampling, says):
    with pytest.raises(UserError, match=says):
        backend("server", stubs, random_llama().float(), settings=settings, **sampling)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"url": "http://x"}, "needs url and model"),
        ({"url": "http://x", "model": "m"}, "needs folder"),
        ({"url": "http://x", "model": "m", "sync": "none", "requests": 0}, "requests is 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(fields, says):
    with pytest.raises(UserError, match=says):
        BackendConfig("server", **fields)
