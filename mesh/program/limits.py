"""The limits that end a conversation, their problems, and those of a penalty on its length."""

from __future__ import annotations

from mesh.config.asking import ConversationConf
from mesh.config.keys import problem, unset
from mesh.config.schema import Conf
from mesh.roles.conversation import Limits
from mesh.tasks import Task
from mesh.tasks.replying import METHOD, converses


def limits_of(conf: Conf) -> Limits:
    """The limits that end a conversation."""
    keys = conf.conversation
    return Limits(keys.max_turns, keys.max_tokens, conf.model.max_length)


def limit_problems(conf: Conf, task: Task) -> list[str]:
    """Limits that allow no whole turn, or that nothing obeys."""
    keys, default, found = conf.conversation, ConversationConf(), []
    if not converses(task):
        for name in ("max_turns", "max_tokens"):
            value = getattr(keys, name)
            if value != getattr(default, name):
                wrong = f"the task has no method {METHOD}, so that it is no conversation"
                remedy = "leave it out; generator.max_new_tokens bounds a response"
                found.append(problem(f"conversation.{name}", value, wrong, remedy))
        return found
    turn, most = conf.generator.max_new_tokens, keys.max_tokens
    if 0 < most < turn:
        wrong = f"a turn may have generator.max_new_tokens={turn} tokens"
        remedy = f"use at least {turn}, or 0 for as many as the context holds"
        found.append(problem("conversation.max_tokens", most, wrong, remedy))
    if most > conf.model.max_length:
        wrong = (
            f"the context ends a conversation before, at model.max_length={conf.model.max_length}"
        )
        remedy = "use less, or 0 for as many as the context holds"
        found.append(problem("conversation.max_tokens", most, wrong, remedy))
    return found


def penalty_problems(conf: Conf, task: Task) -> list[str]:
    """A length penalty that begins beyond the longest response, or that would take one turn of a
    conversation for all of it.
    """
    tokens, limit = conf.length_penalty_tokens, conf.length_penalty_limit
    if conf.length_penalty == 0 or tokens is None:
        return []
    turn = conf.generator.max_new_tokens
    if converses(task):
        if limit is not None:
            return []
        wrong = f"a response has the tokens of all its turns, of which one may have {turn}"
        return [unset("length_penalty_limit", wrong, "set the length that is to lose the most")]
    if limit is None or limit - tokens < turn:
        return []
    wrong = (
        f"with length_penalty_tokens={tokens} it begins beyond {limit - tokens} tokens, and no "
        f"response has more than generator.max_new_tokens={turn}"
    )
    return [problem("length_penalty_limit", limit, wrong, f"use less than {turn + tokens}")]
