"""Secrets in configurations and command lines: found, and nothing else is touched."""

from __future__ import annotations

import pytest

from mesh.config.secrets import NOT_SHOWN, is_secret, shareable, without_secrets

HEX = "0123456789abcdef" * 2 + "01234567"  # as W&B's older keys, and as a commit
TOKENS = [
    "hf_" + "aB3" * 12, "sk-" + "aB3-_" * 8, "ghp_" + "aB3" * 12, "github_pat_" + "aB3_" * 10,
    "glpat-" + "aB3-" * 6, "AKIA" + "AB12" * 4, "AIza" + "aB3-_" * 7, "xoxb-123456789012-aB3",
    "wandb_v1_" + "aB3" * 12,
]  # fmt: skip


@pytest.mark.parametrize("token", TOKENS)
def test_a_token_is_known_by_its_form_wherever_it_stands(token):
    assert without_secrets(f"python a.py scores=[{token}] steps=3") == (
        "python a.py scores=[(not shown)] steps=3"
    )
    assert shareable({"a": {"b": [f"x {token}", 3]}, "c": token}) == {
        "a": {"b": ["x (not shown)", 3]},
        "c": "(not shown)",
    }


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"task_args.api_key={HEX} steps=3", "task_args.api_key=(not shown) steps=3"),
        (f"env WANDB_API_KEY={HEX} python", "env WANDB_API_KEY=(not shown) python"),
        ("'task_args={api_key: abc, n: 3}'", "'task_args={api_key: (not shown), n: 3}'"),
        ("""{"Token": "a b", "n": 3}""", """{"Token": (not shown), "n": 3}"""),
        ("a.py --api-key abc steps=3", "a.py --api-key (not shown) steps=3"),
        ("a.py --password 'a b' steps=3", "a.py --password (not shown) steps=3"),
        ("path=https://me:abc@host/a", "path=https://***@host/a"),
    ],
)
def test_a_secret_is_known_by_its_name(text, shown):
    assert without_secrets(text) == shown == without_secrets(shown)


@pytest.mark.parametrize(
    "text",
    [
        f"torchrun --nproc-per-node=2 recipes/grpo.py conf=a model.path=/a/snapshots/{HEX}",
        "log.tokens=true generator.max_new_tokens=4 trainer.microbatch_tokens=64",
        "the per-token loss of a one-token answer, and a low-key start",
        "model.tokenizer=/a/b prompt.key_names=[a] run_dir=runs/a@b url=https://host:80/a@b",
    ],
)
def test_other_words_of_a_command_stay(text):
    assert without_secrets(text) == text


def test_a_configuration_without_its_secrets():
    conf = {"steps": 3, "task_args": {"api_key": "abc", "key": None, "digits": 2}, "a": ("b", 1.5)}
    assert shareable(conf) == {
        "steps": 3,
        "task_args": {"api_key": "(not shown)", "key": None, "digits": 2},
        "a": ["b", 1.5],
    }
    assert is_secret("task_args.API_KEY") and not is_secret("model.tokenizer")


def test_a_long_word_costs_its_length():
    """A square of it would take minutes."""
    text = "a" * 100_000
    assert without_secrets(text) == text and without_secrets(f"--{text} x") == f"--{text} x"
    assert without_secrets(f"{text}_token=abc") == f"{text}_token={NOT_SHOWN}"
