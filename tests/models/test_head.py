"""The head computes the model's own logits and its loss, and refuses what it does not understand."""

import copy

import pytest
import torch
from tiny_models import FAMILIES, VOCAB, documents, pack, tiny
from torch.nn import functional as F

from lit_reason.errors import UserError
from lit_reason.models.head import check_head


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_is_cross_entropy_of_the_models_own_logits(family):
    lm, (doc,) = tiny(family), documents(20)
    weights = torch.linspace(-1, 2, 19)
    with torch.no_grad():
        logits = lm.hf(input_ids=torch.tensor([doc])).logits[0]
        hidden = lm.hidden(*pack(doc))
        out = lm.head(hidden[:-1], torch.tensor(doc[1:]), weights)
    nll = F.cross_entropy(logits[:-1], torch.tensor(doc[1:]), reduction="none")
    torch.testing.assert_close(lm.head(hidden), logits)
    torch.testing.assert_close(out.logp_S, -nll, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.loss_sum, (nll * weights).sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere"])
def test_temperature_divides_the_final_logits(family):
    lm, (doc,) = tiny(family), documents(6)
    targets = torch.tensor(doc)
    with torch.no_grad():
        hidden = lm.hidden(*pack(doc))
        want = torch.log_softmax(lm.head(hidden) / 0.3, -1).gather(1, targets[:, None])[:, 0]
        torch.testing.assert_close(lm.head(hidden, targets, temperature=0.3).logp_S, want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(lm.head(hidden, temperature=0.3), lm.head(hidden) / 0.3)


def test_default_weights_are_one():
    lm, (doc,) = tiny(), documents(6)
    out = lm.head(lm.hidden(*pack(doc)), torch.tensor(doc))
    torch.testing.assert_close(out.loss_sum, -out.logp_S.sum())


def test_hooks_on_the_output_layer_fire_for_losses_and_logits():
    lm, (doc,) = tiny(), documents(6)
    seen = []
    lm.base.lm_head.register_forward_pre_hook(lambda module, args: seen.append("before"))
    lm.base.lm_head.register_forward_hook(lambda module, args, out: seen.append("after"))
    hidden = lm.hidden(*pack(doc))
    lm.head(hidden, torch.tensor(doc))
    lm.head(hidden)
    lm.hf(input_ids=torch.tensor([doc]))
    assert seen == ["before", "after"] * 3


def test_state_dict_and_tying_are_those_of_the_plain_model():
    lm = tiny("llama")
    plain = type(lm.hf)(lm.hf.config)
    assert list(lm.hf.state_dict()) == list(plain.state_dict())
    assert {name.split(".")[0] for name in lm.state_dict()} == {"hf"}
    assert not list(lm.head.parameters())
    assert lm.head.weight is lm.hf.get_input_embeddings().weight
    before = lm.head.weight.detach().clone()
    lm.head(lm.hidden(*pack([3, 4, 5])), torch.tensor([4, 5, 2])).loss_sum.backward()
    assert lm.head.weight.grad.abs().sum() > 0
    assert lm.head.weight.grad is lm.hf.get_input_embeddings().weight.grad
    torch.testing.assert_close(lm.head.weight.detach(), before)


def test_copies_are_independent():
    lm, (doc,) = tiny(), documents(6)
    twin = copy.deepcopy(lm)
    with torch.no_grad():
        twin.base.lm_head.weight.zero_()
    targets = torch.tensor(doc)
    with torch.no_grad():
        hidden = lm.hidden(*pack(doc))
        assert not torch.allclose(lm.head(hidden, targets).logp_S, torch.tensor(-float(torch.tensor(VOCAB).log())))
        torch.testing.assert_close(
            twin.head(hidden, targets).logp_S, torch.full((6,), -float(torch.tensor(float(VOCAB)).log()))
        )


def test_unknown_logit_arithmetic_is_refused():
    lm = tiny("cohere")
    lm.head.scale = 1.0
    with pytest.raises(UserError, match="CohereForCausalLM changes hidden states or logits"):
        check_head(lm.base, lm.head)
    lm = tiny("gemma2", changes={"final_logit_softcapping": 30.0})
    lm.head.softcap = None
    with pytest.raises(UserError, match="Gemma2ForCausalLM changes"):
        check_head(lm.base, lm.head)


def test_the_check_leaves_no_hook_behind():
    lm, (doc,) = tiny(), documents(6)
    before = lm.hidden(*pack(doc))
    check_head(lm.base, lm.head)
    assert not lm.base.base_model._forward_hooks
    torch.testing.assert_close(lm.hidden(*pack(doc)), before)
