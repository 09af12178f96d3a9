"""Start-up checks of prompts: the first step's, a finite data set's, and the evaluation's."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from mesh.config.keys import problem
from mesh.config.schema import Conf
from mesh.lifecycle.agreement import excerpts, text_of
from mesh.lifecycle.process import Process
from mesh.tasks import USUAL_HELD_OUT, Draw, data_set, draw_prompts
from mesh.tasks.prompts import (
    PURE,
    Faults,
    PromptSource,
    fault_lines,
    faults_of,
    step_prompts,
)
from mesh.types import Prompt

FIRST = "prompts of step 1"
DATA_SET = "prompts of the task (all_prompts)"


def training_problems(
    process: Process, source: PromptSource, num: int, elsewhere: Sequence[str] = ()
) -> list[str]:
    """What is wrong with the `num` prompts of the first step, and with the task's data set where it
    has one; warns of held-out prompts in it. ValueError where the task does not give them, or ranks
    have different ones, or they are others when they are drawn again. elsewhere: texts of them from
    a fresh Python. Collective.

    Where no prompt has room, that is `check_start`'s to report.
    """
    if no_room(source):
        return []
    first = draw_prompts(source.task, Draw(0, num))
    faults = faults_of(source, process, first, FIRST)
    refuse_impure(process, source, first, elsewhere)
    everything = data_set(source.task)
    for warning in source.held_out.warning(everything, DATA_SET):
        process.say(warning)
    in_data_set = faults_of(source, process, everything, DATA_SET)
    if source.overlong == "skip":
        return skip_problems(process, source, num, everything, in_data_set)
    if in_data_set:
        return fault_lines(source, in_data_set, f"{len(everything)} {DATA_SET}")
    return fault_lines(source, faults, f"{num} {FIRST}")


def refuse_impure(
    process: Process, source: PromptSource, first: Sequence[Prompt], elsewhere: Sequence[str]
) -> None:
    """Raise ValueError, on every rank alike, where the prompts of the first step are other ones
    when this process draws them again, or in a fresh Python. Collective.
    """
    once = [text_of(prompt) for prompt in first]
    again = [text_of(prompt) for prompt in draw_prompts(source.task, Draw(0, len(first)))]
    wrong = changed_prompt(once, again, "when they are drawn a second time")
    if elsewhere:
        wrong = wrong or changed_prompt(once, elsewhere, "in a fresh Python")
    if found := next(filter(None, process.gather(wrong)), ""):
        raise ValueError(f"the {FIRST} are not the same {found}; {PURE}")


def changed_prompt(first: Sequence[str], again: Sequence[str], where: str) -> str:
    """The first prompt that differs, in both; empty where all are equal."""
    for place, texts in enumerate(zip_longest(first, again, fillvalue="missing")):
        if texts[0] != texts[1]:
            before, now = excerpts(*texts)
            return f"{where}: prompt {place} is {before}, and then {now}"
    return ""


def skip_problems(
    process: Process, source: PromptSource, num: int, everything: Sequence[Prompt], faults: Faults
) -> list[str]:
    """What keeps overlong=skip from finding other prompts; says how many of a data set it skips."""
    try:
        draw_prompts(source.task, Draw(0, 1, round=1))
    except ValueError as error:
        return [problem("overlong", source.overlong, str(error), "or set overlong=stop")]
    lines = fault_lines(source, faults, f"{len(everything)} {DATA_SET}")
    if faults and len(faults) == len(everything):
        return lines
    step_prompts(source, process, Draw(0, num))
    if faults:
        process.say(f"warning: overlong=skip skips prompts: {'; '.join(lines)}")
    return []


def prompt_problems(
    process: Process, source: PromptSource, prompts: Sequence[Prompt], name: str
) -> list[str]:
    """What is wrong with prompts that nothing replaces. name: as in "held-out prompts". Collective;
    raises as `training_problems`.
    """
    if no_room(source):
        return []
    faults = faults_of(source, process, prompts, name)
    return fault_lines(source, faults, f"{len(prompts)} {name}", skips=False)


def held_out_notes(conf: Conf, num: int) -> list[str]:
    """A line where the task has fewer held-out prompts than usual and no number was asked for. num:
    that were drawn.
    """
    if conf.eval.num_prompts is not None or not 0 < num < USUAL_HELD_OUT:
        return []
    return [f"eval.num_prompts is unset, and the task holds out {num} prompts: all are evaluated"]


def no_room(source: PromptSource) -> bool:
    """True where a response alone fills the context."""
    return source.max_new_tokens >= source.max_length
