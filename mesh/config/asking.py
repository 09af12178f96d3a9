"""The sections of the configuration about what is asked, what is said in answer, and its score:
`prompt.*`, `difficulty.*`, `conversation.*`, `reward.*`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from mesh.config.declare import key


@dataclass(frozen=True)
class PromptConf:
    chat: bool = key(
        False, "a prompt that is a text is sent as a user's message, through the chat template"
    )
    system: str | None = key(None, "system message of every chat that has none of its own")
    template_args: dict[str, Any] = key(
        {}, "what else the chat template reads, e.g. prompt.template_args.enable_thinking=false"
    )
    prefill: str = key("", "text that begins every answer: the model continues it, without loss")
    prefix: str = key(
        "", "directly in front of every prompt that is a text, behind the examples of few_shot"
    )
    few_shot: str | None = key(
        None, "JSON Lines file of examples before every prompt: question and answer, or messages"
    )
    bos: bool | None = key(
        None,
        "the beginning-of-sequence token: true: in front of every prompt, false: of no plain text; "
        "unset: as the tokenizer's own rule and the chat template have it",
    )
    date: str | None = key(
        None, "the day that a chat template writes, as 2026-01-31; unset: that of the run's start"
    )


@dataclass(frozen=True)
class DifficultyConf:
    min: float | None = key(
        None, "a question with a lower running pass rate is not drawn; unset: no bound", ge=0, le=1
    )
    max: float | None = key(
        None, "a question with a higher running pass rate is not drawn; unset: no bound", ge=0, le=1
    )
    forget: int = key(
        0,
        "a question that was not drawn for so many steps is drawn again, as one never seen; "
        "0: its pass rate stays",
        ge=0,
    )


@dataclass(frozen=True)
class ConversationConf:
    max_turns: int = key(8, "most turns of the model, where the task has a reply", ge=1)
    max_tokens: int = key(
        0,
        "most tokens of a conversation after its prompt, sampled and replied; 0: as many as "
        "model.max_length holds [tokens]",
        ge=0,
    )


@dataclass(frozen=True)
class RewardConf:
    workers: int | None = key(
        None,
        "scoring processes per engine; 0: none; unset: 1 for code of others (MODULE:CLASS, "
        "reasoning_gym, a judge of your own, regex, math), else 0",
        ge=0,
    )
    timeout_seconds: float = key(60.0, "time limit of one score or reply [s]", gt=0, le=1e6)
    on_failure: Literal["stop", "zero"] = key(
        "stop",
        "a score or reply that hangs, raises, crashes or is of no use: end the run, or count 0.0 "
        "(in its group's mean and deviation too)",
    )
