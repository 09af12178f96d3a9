"""How a configuration makes prompts into tokens, what ends answers, and what is wrong with that."""

from __future__ import annotations

from datetime import date

from mesh.config.keys import problem
from mesh.config.schema import Conf
from mesh.tasks import Task
from mesh.tasks.stops import stop_strings_of
from mesh.text.encoding import PromptEncoder
from mesh.text.stopping import StopStrings
from mesh.text.tokenizer import Tokenizer, UnknownText


def prompt_encoder(conf: Conf, tokenizer: Tokenizer) -> PromptEncoder:
    """How prompts become tokens."""
    return PromptEncoder(tokenizer, date.today())


def stop_texts(conf: Conf, task: Task | None = None) -> tuple[str, ...]:
    """The texts that end a response: generator.stop, and what the task adds."""
    added = () if task is None else stop_strings_of(task)
    return tuple(dict.fromkeys([*conf.generator.stop, *added]))


def stop_strings(conf: Conf, tokenizer: Tokenizer, task: Task | None = None) -> StopStrings | None:
    """The texts that end a response, as tokens complete them; None: there are none."""
    stop = stop_texts(conf, task)
    return StopStrings(stop, tokenizer) if stop else None


def stop_problems(conf: Conf, tokenizer: Tokenizer, task: Task) -> list[str]:
    """Stop strings that end every answer at once, or that no answer has."""
    name, value = "generator.stop", conf.generator.stop
    if not all(value):
        wrong = "the empty text would end every response at its first token"
        return [problem(name, value, wrong, "leave it out")]
    for text in stop_texts(conf, task):
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
