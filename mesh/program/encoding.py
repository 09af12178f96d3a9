"""Prompts as tokens by a configuration, the ends of answers, and the problems with both."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

from mesh.config.changes import changed
from mesh.config.keys import problem
from mesh.config.schema import Conf, resolve_path
from mesh.config.text import value_as
from mesh.lifecycle.process import Process
from mesh.tasks import Task, TokenizerFiles
from mesh.tasks.stops import stop_strings
from mesh.text.encoding import PromptEncoder, PromptForm
from mesh.text.few_shot import Shot, read_shots
from mesh.text.files import read_settings
from mesh.text.template import GIVEN, read_template
from mesh.text.tokenizer import CHARACTERS, Tokenizer, UnknownText


def prompt_encoder(conf: Conf, tokenizer: Tokenizer) -> PromptEncoder:
    """The encoder of a run's prompts. ValueError where the examples cannot be read, or the date."""
    keys = conf.prompt
    return PromptEncoder(tokenizer, PromptForm(
        chat=keys.chat,
        system=keys.system,
        arguments=value_as(keys.template_args, Any),
        prefill=keys.prefill,
        prefix=keys.prefix,
        shots=() if keys.few_shot is None else few_shot(keys.few_shot),
        begins=keys.bos,
        day=date.today() if keys.date is None else day_of(keys.date),
    ))  # fmt: skip


def few_shot(name: str) -> tuple[Shot, ...]:
    """The examples of prompt.few_shot; ValueError naming the line that is none."""
    try:
        return read_shots(resolve_path(name))
    except ValueError as error:
        raise ValueError(f"prompt.few_shot={name}: {error}") from error


def day_of(text: str) -> date:
    """The day of prompt.date."""
    try:
        return date.fromisoformat(text)
    except ValueError as error:
        wrong = f"is no day ({error})"
        raise ValueError(problem("prompt.date", text, wrong, "write it as 2026-01-31")) from error


def dated(conf: Conf, process: Process) -> Conf:
    """The configuration with the day of the run's start, where it has none and the chat template
    reads it: a resumed run, and an evaluation with its config.yaml, read the same. Collective.
    """
    reads = reads_date(tokenizer_directory(conf))
    today = process.from_rank0(date.today().isoformat() if reads else None)
    if conf.prompt.date is not None or today is None:
        return conf
    return changed(conf, {"prompt.date": today})


def reads_date(directory: Path) -> bool:
    """True if the chat template of a tokenizer's directory may write the date; of a damaged one,
    which is refused elsewhere, False.
    """
    try:
        settings = read_settings(directory / "tokenizer_config.json")
        template = read_template(directory, settings)
    except (ValueError, OSError):
        return False
    return template is not None and template.reads_date


def form_problems(conf: Conf, encoder: PromptEncoder) -> list[str]:
    """Keys of the prompts that the tokenizer, or its template, cannot obey."""
    keys, tokenizer, found = conf.prompt, encoder.tokenizer, []
    directory = tokenizer.directory
    if keys.chat and tokenizer.template is None:
        wrong = tokenizer.template_problem or f"the tokenizer in {directory} has no chat template"
        remedy = "add chat_template.jinja to it, or leave it out"
        found.append(problem("prompt.chat", keys.chat, wrong, remedy))
    if keys.bos and not encoder.beginning:
        wrong = f"{directory}/tokenizer_config.json names no bos_token"
        found.append(problem("prompt.bos", keys.bos, wrong, "leave it out"))
    for name in sorted(set(encoder.form.arguments) & set(GIVEN)):
        value, wrong = encoder.form.arguments[name], "every template is given that by the program"
        found.append(problem(f"prompt.template_args.{name}", value, wrong, "leave it out"))
    return found


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


def tokenizer_directory(conf: Conf) -> Path:
    """The tokenizer's directory: model.tokenizer, else model.path, else the shipped one."""
    named = conf.model.tokenizer or conf.model.path
    return CHARACTERS if named is None else resolve_path(named)


def tokenizer_files(conf: Conf) -> TokenizerFiles:
    """The directories of which the tokenizer is read. Weights that are trained on have learnt the
    end tokens that their own directory names, wherever the tokenizer lies.
    """
    path = conf.model.path if conf.model.init == "checkpoint" else None
    model = None if path is None else resolve_path(path)
    return TokenizerFiles(tokenizer_directory(conf), model)
