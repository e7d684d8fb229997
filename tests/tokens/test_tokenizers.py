import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from offline_lmrl.errors import InputError
from offline_lmrl.tokens.rendering import Renderer
from offline_lmrl.tokens.tokenizers import load_tokenizer, train_tokenizer
from tests.tiny import TOKENIZERS

TEXTS = ["Your position is 5, 12.\nmove up\n", "book=1 hat=2 ball=0", "<eos> typed by someone <eos>"] * 3
TOKENIZER = train_tokenizer(TEXTS, 300)


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_every_text_comes_back(text):
    ids = TOKENIZER.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert TOKENIZER.decode(ids) == text


@pytest.mark.parametrize("text", ["5, 12", "\n", "\r\n\n", " move up\n", "  ", "007", "don't ...", "<eos>", "日本é"])
def test_numbers_line_breaks_and_spaces_come_back(text):
    ids = TOKENIZER.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert TOKENIZER.decode(ids) == text
    assert not set(ids) & {0, 1, 2}


def test_special_tokens_are_three_and_distinct():
    assert (TOKENIZER.pad_token_id, TOKENIZER.bos_token_id, TOKENIZER.eos_token_id) == (0, 1, 2)
    assert TOKENIZER.convert_ids_to_tokens([0, 1, 2]) == ["<pad>", "<bos>", "<eos>"]


def test_vocabulary_is_learnt_up_to_its_size():
    assert 256 < len(TOKENIZER) <= 300
    assert len(TOKENIZER.encode(" position", add_special_tokens=False)) < len(" position")


def test_equal_texts_give_equal_tokenizers():
    again = train_tokenizer(iter(TEXTS), 300)
    assert again.backend_tokenizer.to_str() == TOKENIZER.backend_tokenizer.to_str()


def test_saved_tokenizer_is_the_same(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = " move up\n5, 12 <eos>é  "
    assert loaded.encode(text, add_special_tokens=False) == TOKENIZER.encode(text, add_special_tokens=False)
    assert (loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id) == (0, 1, 2)
    assert loaded.chat_template == TOKENIZER.chat_template


def test_vocabulary_too_small_for_the_bytes_is_an_error():
    with pytest.raises(InputError, match="vocab_size: found 200, expected at least"):
        train_tokenizer(TEXTS, 200)


def test_a_folder_without_a_whole_tokenizer_is_one_line(tmp_path):
    with pytest.raises(InputError, match="none: found no such folder, expected the folder or hub name of a tokenizer"):
        load_tokenizer(tmp_path / "none")
    TOKENIZER.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    for text in (file.read_text()[:500], "{}"):
        file.write_text(text)
        with pytest.raises(InputError, match=f"{tmp_path}: found a folder whose tokenizer cannot be read ") as caught:
            load_tokenizer(tmp_path)
        assert "\n" not in str(caught.value)
    for file in tmp_path.iterdir():
        file.unlink()
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(InputError, match=f"{tmp_path}: found no tokenizer files, expected those"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", ["role tokens", "bars", "plain unigram"])
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3_5_text", "deepseek_v3", "llama", "mistral"])
def test_a_tokenizer_comes_back_as_the_class_it_was_saved_as_whatever_the_model_is(tmp_path, kind, model_type):
    tokenizer = TOKENIZERS[kind]()
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    loaded = load_tokenizer(tmp_path)
    text = "Left ÜP it's\n at 12  b"
    assert type(loaded) is type(tokenizer) and len(loaded) == len(tokenizer)
    assert loaded.encode(text) == tokenizer.encode(text)
    assert Renderer(loaded, "auto").fingerprint == Renderer(tokenizer, "auto").fingerprint
