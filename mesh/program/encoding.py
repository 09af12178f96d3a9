"""How a configuration makes prompts into tokens, what ends answers, and what is wrong with that."""

from __future__ import annotations

from datetime import date

from mesh.config.keys import problem
from mesh.config.schema import Conf
from mesh.text.encoding import PromptEncoder
from mesh.text.stopping import StopStrings
from mesh.text.tokenizer import Tokenizer, UnknownText


def prompt_encoder(conf: Conf, tokenizer: Tokenizer) -> PromptEncoder:
    """How prompts become tokens."""
    return PromptEncoder(tokenizer, date.today())


def stop_strings(conf: Conf, tokenizer: Tokenizer) -> StopStrings | None:
    """The texts that end a response; None: there are none."""
    stop = conf.generator.stop
    return StopStrings(tuple(stop), tokenizer) if stop else None


def stop_problems(conf: Conf, tokenizer: Tokenizer) -> list[str]:
    """Stop strings that end every answer at once, or that no answer has."""
    name, value = "generator.stop", conf.generator.stop
    if not all(value):
        wrong = "the empty text would end every response at its first token"
        return [problem(name, value, wrong, "leave it out")]
    for text in value:
        try:
            tokenizer.encode(text)
        except UnknownText as error:
            wrong = f"no response could end with it: {error.wrong}"
            return [problem(name, value, wrong, "leave it out, or set model.tokenizer to another")]
    return []
