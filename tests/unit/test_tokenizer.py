"""The tokenizer gives the ids that transformers gives, and refuses text that it would change."""

from __future__ import annotations

import json
import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, Qwen3Config

from mesh.config.loading import load_conf
from mesh.config.schema import PACKAGE_DATA
from mesh.program.assembly import check, read_tokenizer
from mesh.text.tokenizer import (
    CHARACTERS,
    check_vocabulary,
    load_tokenizer,
    make_character_tokenizer,
    textless_ids,
)
from mesh.types import Completion
from tools.bench.vocabulary import write_tokenizer

ALPHABET = "\n" + "".join(chr(code) for code in range(32, 127))
texts = st.text(st.sampled_from(ALPHABET)).filter(lambda text: "<" not in text)


@pytest.fixture(scope="module")
def characters():
    return load_tokenizer(CHARACTERS)


@pytest.fixture(scope="module")
def reference():
    return AutoTokenizer.from_pretrained(CHARACTERS)


def save(directory, backend, **files):
    backend.save(str(directory / "tokenizer.json"))
    for name, value in files.items():
        (directory / f"{name}.json").write_text(json.dumps(value))
    return directory


def change_json(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def words(*vocabulary):
    model = models.WordLevel(dict(zip(vocabulary, range(len(vocabulary)), strict=True)), "<unk>")
    backend = Backend(model)
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return backend


def test_shipped_files_are_reproduced_byte_for_byte(tmp_path):
    make_character_tokenizer(tmp_path)
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    shipped = {path.name: path.read_bytes() for path in CHARACTERS.iterdir()}
    assert made == shipped
    assert set(made) == {"tokenizer.json", "tokenizer_config.json"}


def test_character_ids(characters):
    assert characters.encode("\n ~a>") == [2, 3, 97, 68, 33]
    assert characters.vocab_size == 98
    assert characters.eos_ids == (1,)
    assert len(ALPHABET) == 96
    assert sorted(characters.encode(ALPHABET)) == list(range(2, 98))


@given(text=texts)
def test_characters_round_trip(characters, text):
    ids = characters.encode(text)
    assert len(ids) == len(text)
    assert characters.decode(ids) == text


@given(text=texts)
def test_transformers_gives_the_same_ids_and_text(characters, reference, text):
    ids = characters.encode(text)
    assert reference.encode(text, add_special_tokens=False) == ids
    assert reference(text)["input_ids"] == ids
    assert reference.decode(ids) == text


def test_transformers_loads_it_beside_a_qwen3_config(tmp_path, characters):
    make_character_tokenizer(tmp_path)
    Qwen3Config(vocab_size=128).save_pretrained(tmp_path)
    reference = AutoTokenizer.from_pretrained(tmp_path)
    assert reference.encode(ALPHABET) == characters.encode(ALPHABET)
    assert (reference.eos_token_id, reference.pad_token_id) == (1, 0)


def completion(tokens, finish_reason):
    return Completion(0, 0, tuple(tokens), (0.0,) * len(tokens), finish_reason)


def test_decode_leaves_out_what_has_no_token(characters):
    assert characters.decode([0, *characters.encode("cba"), 1, 127]) == "<pad>cba<eos>"


def test_a_response_is_all_of_its_tokens_but_the_one_that_ended_it(characters):
    """What is trained on is scored: <pad> in the middle, and what stands at a cut."""
    a, b, pad, eos = *characters.encode("ab"), 0, 1
    assert characters.response(completion([a, pad, b, eos], "stop")) == "a<pad>b"
    assert characters.response(completion([pad, eos], "stop")) == "<pad>"
    assert characters.response(completion([eos], "stop")) == ""
    assert characters.response(completion([a, b], "length")) == "ab"
    assert characters.response(completion([a, pad], "length")) == "a<pad>"
    assert characters.texts(completion([a, pad, b, eos], "stop")) == ("a<pad>b", "ab")
    assert characters.texts(completion([a, b], "length")) == ("ab", "ab")


@pytest.mark.parametrize("end", ["<eos>", "."])
def test_an_end_that_is_not_special_is_no_part_of_the_response(tmp_path, end):
    """An added token that is not marked special, and an ordinary token of the vocabulary."""
    make_character_tokenizer(tmp_path)
    change_json(
        tmp_path / "tokenizer.json", lambda file: file["added_tokens"][1].update(special=False)
    )
    change_json(tmp_path / "tokenizer_config.json", lambda file: file.update(eos_token=end))
    tokenizer = load_tokenizer(tmp_path)
    (stop,) = tokenizer.eos_ids
    assert tokenizer.backend.id_to_token(stop) == end
    ids = [*tokenizer.encode("a.b"), stop]
    assert tokenizer.response(completion(ids, "stop")) == "a.b"
    assert tokenizer.response(completion(ids[:3], "length")) == "a.b"


@pytest.mark.parametrize("character", ["\t", "\r", "é", "日", "\x00", "\N{GRINNING FACE}"])
def test_an_unknown_character_is_named(characters, character):
    with pytest.raises(ValueError, match="model.tokenizer") as caught:
        characters.encode(f"ab {character}c")
    assert f"cannot encode {character!r}" in str(caught.value)


def test_an_unknown_word_is_named(tmp_path):
    tokenizer = load_tokenizer(save(tmp_path, words("<unk>", "one", "two")))
    assert tokenizer.encode("two one") == [2, 1]
    with pytest.raises(ValueError, match="cannot encode 'three'"):
        tokenizer.encode("two three one")


def test_the_unknown_token_spelt_out_is_known(tmp_path):
    backend = words("<unk>", "one", "two")
    backend.add_special_tokens(["<unk>"])
    assert load_tokenizer(save(tmp_path, backend)).encode("one <unk>") == [1, 0]


def test_a_vocabulary_without_unknown_token_names_the_text(tmp_path):
    tokenizer = load_tokenizer(save(tmp_path, words("one", "two")))
    with pytest.raises(ValueError, match="cannot encode 'x'"):
        tokenizer.encode("one x")
    with pytest.raises(ValueError, match="cannot encode 'one tow'"):
        tokenizer.encode("one tow")


def test_a_normal_form_is_not_a_lost_character(tmp_path):
    # Qwen3's tokenizer normalises to NFC and works on bytes: text changes, nothing is dropped
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend = Backend(models.BPE({token: i for i, token in enumerate(sorted(alphabet))}, []))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = load_tokenizer(save(tmp_path, backend))
    assert tokenizer.decode(tokenizer.encode("e\u0301 \t日")) == "\u00e9 \t日"


def test_saved_truncation_and_padding_are_ignored(tmp_path):
    make_character_tokenizer(tmp_path)
    backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    save(tmp_path, backend)
    assert len(load_tokenizer(tmp_path).encode(string.ascii_letters)) == 52


def test_eos_ids_are_the_union_over_the_files(tmp_path):
    files = {
        "tokenizer_config": {"eos_token": {"content": "<eos>"}},
        "generation_config": {"eos_token_id": [3, 1]},
        "config": {"eos_token_id": 2},
    }
    save(tmp_path, words("a", "b", "c", "d", "<eos>"), **files)
    assert load_tokenizer(tmp_path).eos_ids == (3, 1, 2, 4)


def test_the_ends_of_the_model_count_beside_those_of_a_tokenizer_elsewhere(tmp_path, process):
    """Of weights that are read, before the tokenizer's own; random ones have learnt no end."""
    (model := tmp_path / "model").mkdir()
    for file in (PACKAGE_DATA / "qwen3_tiny").iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    change_json(model / "config.json", lambda file: file.update(eos_token_id=[5, 1]))
    (model / "generation_config.json").write_text('{"eos_token_id": 7}')
    make_character_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "config.json").write_text('{"eos_token_id": 9}')
    words = ["conf=qwen3_tiny", f"model.path={model}", f"model.tokenizer={tmp_path}/tokenizer"]
    plan = check(load_conf(words)[1], process)
    assert plan.tokenizer.eos_ids == plan.generator.stop_tokens == (7, 5, 1, 9)
    assert read_tokenizer(load_conf([*words, "model.init=random"])[1]).eos_ids == (9, 1)
    assert read_tokenizer(load_conf(words[:2])[1]).eos_ids == (7, 5, 1)
    (model / "config.json").write_text("[]")
    assert read_tokenizer(load_conf(words)[1]) is None, "check_start reports it"


def test_eos_id_zero_counts(tmp_path):
    save(tmp_path, words("<eos>", "a"), config={"eos_token_id": 0})
    assert load_tokenizer(tmp_path).eos_ids == (0,)


def test_a_missing_tokenizer_names_the_file(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer\.json does not exist: set model\.tokenizer"):
        load_tokenizer(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "content", "remedy"),
    [
        ("tokenizer.json", "{", "is not a tokenizer"),
        ("tokenizer.json", "{}", "is not a tokenizer"),
        ("tokenizer_config.json", "{", "is not JSON"),
        ("generation_config.json", "[]", "is not a JSON object"),
        ("tokenizer_config.json", '{"eos_token": "</s>"}', "'</s>' is not in tokenizer.json"),
        ("tokenizer_config.json", '{"eos_token": {}}', "eos_token {} is not in tokenizer.json"),
        ("tokenizer_config.json", '{"eos_token": [1]}', "eos_token [1] is not in tokenizer.json"),
        ("generation_config.json", "[" * 10_000, "is not JSON"),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, content, remedy):
    make_character_tokenizer(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=re.escape(remedy)) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path / name) in str(caught.value)


def test_check_vocabulary_accepts_a_padded_model(characters):
    assert check_vocabulary(characters, 98) == []
    assert check_vocabulary(characters, 128) == []


def test_check_vocabulary_lists_all_problems(tmp_path, characters):
    (problem,) = check_vocabulary(characters, 97)
    assert "ids go up to 97" in problem
    tokenizer = load_tokenizer(save(tmp_path, words("a", "b", "c")))
    too_large, no_eos = check_vocabulary(tokenizer, 2)
    assert "ids go up to 2, the model's vocabulary up to 1" in too_large
    assert "add eos_token" in no_eos


def test_check_vocabulary_refuses_an_eos_of_another_tokenizer(tmp_path):
    save(tmp_path, words("a", "b"), config={"eos_token_id": 151645})
    (problem,) = check_vocabulary(load_tokenizer(tmp_path), 151936)
    assert "eos ids 151645 have no token in it" in problem


def test_ids_without_a_token_are_the_padding_and_the_holes(tmp_path, characters):
    assert textless_ids(characters, 98) == ()
    assert textless_ids(characters, 128) == ((98, 128),)
    backend = Backend(models.WordLevel({"<unk>": 1, "a": 2, "b": 8}, "<unk>"))
    backend.add_tokens(["added"])
    backend.add_special_tokens(["<special>"])
    tokenizer = load_tokenizer(save(tmp_path, backend))
    assert [tokenizer.backend.token_to_id(x) for x in ("added", "<special>")] == [3, 4]
    assert textless_ids(tokenizer, 16) == ((0, 1), (5, 8), (9, 16))


def test_a_token_that_a_vocabulary_lists_twice_has_two_ids(tmp_path):
    backend = Backend(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("a", -2.0)], 0))
    assert textless_ids(load_tokenizer(save(tmp_path, backend)), 4) == ((3, 4),)


@pytest.mark.parametrize("eos_id", [3, 9, 1 << 40])
def test_an_end_without_a_token_is_refused(tmp_path, eos_id):
    """In a hole, beyond the last id, and beyond all that the library takes."""
    backend = Backend(models.WordLevel({"<unk>": 1, "a": 2, "b": 4}, "<unk>"))
    save(tmp_path, backend, config={"eos_token_id": [4, eos_id]})
    (problem,) = check_vocabulary(load_tokenizer(tmp_path), 16)
    assert f"eos ids {eos_id} have no token in it" in problem


def test_a_tokenizer_without_tokens_is_refused(tmp_path):
    tokenizer = load_tokenizer(save(tmp_path, Backend(models.WordLevel({}, "<unk>"))))
    assert textless_ids(tokenizer, 8) == ((0, 8),)
    (problem,) = check_vocabulary(tokenizer, 8)
    assert "has no end-of-sequence token" in problem


def test_a_benchmark_knows_as_large_a_part_of_its_vocabulary_as_qwen3(tmp_path):
    write_tokenizer(tmp_path, 151_936)
    tokenizer = load_tokenizer(tmp_path)
    assert textless_ids(tokenizer, 151_936) == ((151_669, 151_936),)
    assert tokenizer.encode("a>") == [68, 33] and check_vocabulary(tokenizer, 151_936) == []
