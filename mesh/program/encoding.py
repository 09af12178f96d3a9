"""How a configuration makes prompts into tokens, what ends answers, and what is wrong with that."""

from __future__ import annotations

from datetime import date

from mesh.config.keys import problem
from mesh.config.schema import Conf
from mesh.tasks import Task
from mesh.tasks.stops import stop_strings
from mesh.text.encoding import PromptEncoder
from mesh.text.tokenizer import Tokenizer, UnknownText


def prompt_encoder(conf: Conf, tokenizer: Tokenizer) -> PromptEncoder:
    """How prompts become tokens."""
    return PromptEncoder(tokenizer, date.today())


def turn_ends(conf: Conf, task: Task) -> tuple[str, ...]:
    """The texts that end a turn: those of generator.stop, and the task's own."""
    return tuple(dict.fromkeys((*conf.generator.stop, *stop_strings(task))))


def stop_problems(conf: Conf, tokenizer: Tokenizer, task: Task) -> list[str]:
    """Stop strings that end every answer at once, or that no answer has."""
    name, value = "generator.stop", conf.generator.stop
    if not all(value):
        wrong = "the empty text would end every response at its first token"
        return [problem(name, value, wrong, "leave it out")]
    for text in turn_ends(conf, task):
        try:
            tokenizer.encode(text)
        except UnknownText as error:
            wrong = f"no response could end with it: {error.wrong}"
            if text in value:
                remedy = "leave it out, or set model.tokenizer to another"
                return [problem(name, value, wrong, remedy)]
            wrong = f"its stop_strings has {text!r}, and {wrong}"
            return [problem("task", conf.task, wrong, "set model.tokenizer to another")]
    return []
