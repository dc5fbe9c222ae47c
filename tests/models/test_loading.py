"""Models and tokenizers from folders, GGUF files and configs, and the messages when they are not there."""

import importlib.util
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_gguf import write_gguf
from tiny_models import documents, fields, pack, save_tiny, tiny, word_tokenizer

from lit_reason.errors import UserError
from lit_reason.models.config import ModelConfig
from lit_reason.models.language_model import LanguageModel
from lit_reason.models.loading import load_model, load_tokenizer, resolve_dtype


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("models") / "tiny-llama"
    save_tiny(place)
    return place


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return file, write_gguf(file)


def logits(lm, doc):
    with torch.no_grad():
        return lm.eval().head(lm.hidden(*pack(doc)))


def test_folder_gives_the_saved_model(folder):
    (doc,) = documents(8)
    lm = LanguageModel.load(ModelConfig(path=str(folder)))
    torch.testing.assert_close(logits(lm, doc), logits(tiny(), doc))
    assert lm.base.dtype == resolve_dtype("auto")


def test_dtype_is_honoured(folder):
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        assert {p.dtype for p in load_model(ModelConfig(path=str(folder), dtype=name)).parameters()} == {dtype}
        made = load_model(ModelConfig(config=fields("llama"), dtype=name))
        assert {p.dtype for p in made.parameters()} == {dtype}
    assert torch.get_default_dtype() == torch.float32


def test_overrides_change_config_and_result(folder):
    (doc,) = documents(8)
    changed = LanguageModel.load(ModelConfig(path=str(folder), overrides={"rope_theta": 10.0, "rms_norm_eps": 0.1}))
    assert changed.base.config.rope_parameters["rope_theta"] == 10.0
    assert changed.base.config.rms_norm_eps == 0.1
    assert (logits(changed, doc) - logits(tiny(), doc)).abs().max() > 1e-2
    fewer = load_model(ModelConfig(config=fields("qwen3"), overrides={"num_hidden_layers": 1}))
    assert len(fewer.model.layers) == 1
    with pytest.raises(UserError, match="overrides: llama has no field 'rope_thta'.*did you mean 'rope_theta'"):
        load_model(ModelConfig(path=str(folder), overrides={"rope_thta": 1.0}))


def test_gguf_gives_the_written_model(gguf_file):
    file, written = gguf_file
    lm = LanguageModel.load(ModelConfig(path=str(file)))
    torch.testing.assert_close(
        logits(lm, [3, 40, 7, 99, 12]), logits(written, [3, 40, 7, 99, 12]), rtol=1e-4, atol=1e-4
    )
    assert (lm.eos_ids, lm.max_length) == ((1,), 64)


def test_gguf_tokenizer(gguf_file):
    tokenizer = load_tokenizer(ModelConfig(path=str(gguf_file[0])))
    text = tokenizer.apply_chat_template([{"role": "user", "content": "the t"}], tokenize=False)
    assert text == "<|im_start|>the t<|im_end|>"
    pieces = tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False).input_ids)
    assert pieces == ["<|im_start|>", "t", "he", "Ġt", "<|im_end|>"]


def test_tokenizer_beside_the_model_or_elsewhere(folder, tmp_path):
    word_tokenizer().save_pretrained(tmp_path / "tok")
    for config in (
        ModelConfig(path=str(folder)),
        ModelConfig(path="nowhere/at-all", tokenizer=str(tmp_path / "tok")),
        ModelConfig(config={"model_type": "llama"}, tokenizer=str(folder)),
    ):
        assert load_tokenizer(config)("w3 w9").input_ids == [3, 9]


def test_chat_template_file_replaces_the_own_one(folder, tmp_path):
    file = tmp_path / "short.jinja"
    file.write_text("{{ messages[0]['content'] | upper }}", encoding="utf-8")
    tokenizer = load_tokenizer(ModelConfig(path=str(folder), chat_template=str(file)))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hé"}], tokenize=False) == "HÉ"
    with pytest.raises(UserError, match=r"chat_template: .*shrt.jinja does not exist.*did you mean 'short.jinja'"):
        load_tokenizer(ModelConfig(path=str(folder), chat_template=str(tmp_path / "shrt.jinja")))


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_missing_folder_names_the_nearest(load, folder):
    wrong = folder.parent / "tiny-lama"
    with pytest.raises(UserError, match=rf"model path: {wrong} does not exist.*did you mean 'tiny-llama'"):
        load(ModelConfig(path=str(wrong)))
    with pytest.raises(UserError, match=r"no 'deep' in /"):
        load(ModelConfig(path="/deep/er/still"))


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_hub_id_without_network(load, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm").mkdir()
    message = "'smolm' is no local folder and could not be had.*HF_HUB_OFFLINE.*did you mean the folder 'smollm'"
    with pytest.raises(UserError, match=message):
        load(ModelConfig(path="smolm"))
    with pytest.raises(UserError, match="'no-such/model' is no local folder"):
        load(ModelConfig(path="no-such/model"))


def test_folders_that_are_no_models(folder, tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"config.json is missing \(found notes.txt\)"):
        load_model(ModelConfig(path=str(tmp_path)))
    with pytest.raises(UserError, match=r"no tokenizer in .* \(found notes.txt\); set `tokenizer`"):
        load_tokenizer(ModelConfig(path=str(tmp_path)))
    with pytest.raises(UserError, match="notes.txt is a file"):
        load_model(ModelConfig(path=str(tmp_path / "notes.txt")))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="holds an adapter; set path to its base model"):
        load_model(ModelConfig(path=str(tmp_path)))
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 32')
    with pytest.raises(UserError, match="model path: cannot read"):
        load_model(ModelConfig(path=str(tmp_path)))
    with pytest.raises(UserError, match="set `tokenizer`"):
        load_tokenizer(ModelConfig(config={"model_type": "llama"}))


def test_damaged_weights_are_refused(folder, gguf_file, tmp_path):
    broken = shutil.copytree(folder, tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="model path: cannot read .*broken: "):
        load_model(ModelConfig(path=str(broken)))
    (tmp_path / "cut.gguf").write_bytes(gguf_file[0].read_bytes()[:15])
    with pytest.raises(UserError, match="cannot read .*cut.gguf: "):
        load_model(ModelConfig(path=str(tmp_path / "cut.gguf")))


def test_no_weight_starts_at_random_without_a_word(folder, tmp_path):
    gap = shutil.copytree(folder, tmp_path / "gap")
    tensors = load_file(gap / "model.safetensors")
    lost = next(name for name in tensors if "mlp" in name)
    del tensors[lost]
    save_file(tensors, gap / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"gap are missing: {lost}$"):
        load_model(ModelConfig(path=str(gap)))
    other = {"intermediate_size": load_model(ModelConfig(path=str(folder))).config.intermediate_size + 2}
    with pytest.raises(UserError, match=r"of another shape than config.json and .* say: .*mlp.* and \d+ more"):
        load_model(ModelConfig(path=str(folder), overrides=other))


def test_gguf_without_its_package(gguf_file, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "gguf" else find(name, *a))
    with pytest.raises(UserError, match=r"needs the gguf package: pip install 'lit-reason\[gguf\]'"):
        load_model(ModelConfig(path=str(gguf_file[0])))


def test_path_and_config_exclude_each_other(folder):
    for config in (ModelConfig(), ModelConfig(path=str(folder), config={"model_type": "llama"})):
        with pytest.raises(UserError, match="exactly one of `path`"):
            load_model(config)


def test_config_errors_name_the_field():
    with pytest.raises(UserError, match="model_type is 'lama'.*did you mean 'llama'"):
        load_model(ModelConfig(config={"model_type": "lama"}))
    with pytest.raises(UserError, match="model_type is None"):
        load_model(ModelConfig(config={"vocab_size": 5}))
    with pytest.raises(UserError, match="llama has no field 'hiden_size'.*did you mean 'hidden_size'"):
        load_model(ModelConfig(config={"model_type": "llama", "hiden_size": 5}))
    with pytest.raises(UserError, match="model config: .*layer_types"):
        load_model(ModelConfig(config=fields("qwen3", layer_types=["full_attention"])))


def test_remote_code_stays_off(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"model_type": "mystery", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}'
    )
    (tmp_path / "code.py").write_text("raise SystemExit('this ran')")
    with pytest.raises(UserError, match="brings its own Python code; set trust_remote_code: true only if"):
        load_model(ModelConfig(path=str(tmp_path)))


def test_a_recipe_config_is_not_changed():
    made = fields("llama")
    before = dict(made)
    load_model(ModelConfig(config=made, overrides={"num_hidden_layers": 1}))
    assert made == before


def test_optional_packages_are_not_imported():
    """Reading the models package must work where bitsandbytes, gguf, datasets and jsonargparse are missing."""
    code = (
        "import sys\n"
        "for name in ('bitsandbytes', 'datasets', 'jsonargparse', 'gguf', 'peft'): sys.modules[name] = None\n"
        "import lit_reason.models.language_model, lit_reason.models.export, lit_reason.kernels.head_loss\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
