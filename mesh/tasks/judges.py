"""Judges: functions that say whether a response gives the answer, by the form it is given in.

    judge(answer, response, **settings) -> Score

`answer` is what a data set has. The reward is 1 or 0, and so is `correct`; where the form is asked
of the response, the part `format` is 1 if it was found. `answer` is what was found, in one way of
writing, so that responses can vote (majority@k). A task of your own calls them as functions,
`task=dataset` by name (docs/judges.md has a table of what each takes).

A judge that reads answers of a form has a second function, which says what is wrong with one.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, get_type_hints

from mesh.config.spelling import meant
from mesh.config.text import Text, mismatch, value_as
from mesh.config.user_code import import_named
from mesh.tasks import symbolic
from mesh.tasks.numerals import first_number, last_number, number_of, numbers_in, plain
from mesh.tasks.response import Score

Judging = Callable[..., Any]
"""A judge's function: of the answer, the response, and settings by name."""

MARK = "####"


def exact(answer: str, response: str, *, ignore_case: bool = False) -> Score:
    """The whole response, without the spaces around it."""
    found, wanted = response.strip(), answer.strip()
    equal = found.casefold() == wanted.casefold() if ignore_case else found == wanted
    return _score(equal, answer=found.casefold() if ignore_case else found)


def number(answer: str, response: str) -> Score:
    """The last number of the response."""
    return _of_numbers(last_number(_behind_mark(answer)), last_number(response))


def gsm8k(answer: str, response: str) -> Score:
    """The first number behind the last `####`, in the line that follows it."""
    return _of_numbers(_marked(answer), _marked(response) if MARK in response else None)


def boxed(answer: str, response: str) -> Score:
    """The content of the last \\boxed{}: an equal number, or the same LaTeX but for spacing."""
    found = in_box(response)
    if found is None:
        return _score(False, False)
    wanted = in_box(answer)
    return _score(same(answer if wanted is None else wanted, found), True, _written(found))


def choice(answer: str, response: str) -> Score:
    """The letter that is chosen: `B`, `(b)`, `B. Paris`, `The answer is B`, `\\boxed{B}`."""
    found = chosen_letter(response)
    formed = found is not None
    return _score(formed and found == chosen_letter(answer), formed, found or "")


def regex(answer: str, response: str, *, pattern: str, ignore_case: bool = False) -> Score:
    """The last match of `pattern`, or its first group where it has one."""
    flags = re.IGNORECASE if ignore_case else 0
    matches = list(re.compile(pattern, flags).finditer(response))
    if not matches:
        return _score(False, False)
    found = matches[-1][1 if matches[-1].re.groups else 0] or ""
    wanted = answer.strip()
    if ignore_case:
        found, wanted = found.casefold(), wanted.casefold()
    return _score(same(wanted, found), True, _written(found))


def math(answer: str, response: str) -> Score:
    """An expression that equals the answer, by math-verify: \\frac{1}{2} and 0.5, x+1 and 1+x."""
    box = in_box(response)  # math-verify would make one set of several boxes
    found = symbolic.in_response(response if box is None else f"\\boxed{{{box}}}")
    correct = bool(found) and symbolic.equal(symbolic.in_answer(answer), found)
    return _score(correct, bool(found), str(found[0]) if found else "")


def in_box(text: str) -> str | None:
    """The content of the \\boxed{} or \\fbox{} of a text that is opened last and closed."""
    starts: list[int | None] = []  # of the open braces; None: no box's
    last, content = -1, None
    for token in re.finditer(r"(\\(?:boxed|fbox)\s*)?(\{)|\}|\\.", text, re.DOTALL):
        if token[2]:
            starts.append(token.end() if token[1] else None)
        elif token[0] == "}" and starts:
            start = starts.pop()
            if start is not None and start > last:
                last, content = start, text[start : token.start()].strip()
    return content


LETTER = r"[\s*_(\[{$\"']*(?:\\(?:text|mathrm|textbf|mathbf)\s*\{)?\(?([A-Z])(?![A-Za-z'])"
CHOICES = (
    re.compile(rf"(?i:\b(?:answer|choice|option)\b(?:\s+(?:is|would\s+be))?)\s*:?{LETTER}"),
    re.compile(
        r"(?i:\b(?:answer|choice|option)\s*(?:is)?\s*:?\s*)\(?([a-z])(?=[\s).*]*$|[).])", re.M
    ),
    re.compile(r"\\boxed\s*\{\s*(?:\\(?:text|mathrm)\s*\{)?\s*\(?([A-Za-z])\)?[}\s.]*\}"),
    re.compile(r"(?<!\w)(?:\(([A-Za-z])\)|\*\*\(?([A-Za-z])[).:]*\*\*)"),
    re.compile(r"^\W*([A-Za-z])(?=\W*$|[.):]\s)"),
    re.compile(r"(?<![\w'])([A-Z])(?=[\s.)*\"]*$)"),
)
"""What names a choice, the surest first; the last match of the first that is found counts."""


def chosen_letter(text: str) -> str | None:
    """The letter that a text chooses, in upper case."""
    text = re.sub(r"\s*\n\s*", "\n", re.sub(r"[^\S\n]+", " ", text.strip()))
    for pattern in CHOICES:
        matches = list(pattern.finditer(text))
        if matches:
            return next(letter for letter in matches[-1].groups() if letter).upper()
    return None


def same(wanted: str, found: str) -> bool:
    """True for equal numbers, and for texts that are equal once LaTeX's spacing is gone."""
    numbers = number_of(wanted), number_of(found)
    if None not in numbers:
        return numbers[0] == numbers[1]
    return bare_latex(wanted) == bare_latex(found)


def bare_latex(text: str) -> str:
    """LaTeX without what only sets it: spaces, sizes of brackets, \\text, dollars, a period."""
    text = re.sub(r"\\(?:left|right|displaystyle|[,;:! ])", "", plain(text).replace("$", ""))
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}", r"\1", text)
    return re.sub(r"\s+", "", text).removesuffix(".")


def _behind_mark(text: str) -> str:
    return text.rpartition(MARK)[2].strip()


def _marked(text: str) -> Fraction | None:
    lines = _behind_mark(text).splitlines()
    return first_number(lines[0]) if lines else None


def _of_numbers(wanted: Fraction | None, found: Fraction | None) -> Score:
    formed = found is not None
    return _score(formed and found == wanted, formed, str(found) if formed else "")


def _written(found: str) -> str:
    """What `same` calls equal, as equal texts; never the empty one, which is no answer."""
    number = number_of(found)
    return str(number) if number is not None else bare_latex(found) or repr(found)


def _score(correct: bool, formed: bool | None = None, answer: str = "") -> Score:
    parts = {} if formed is None else {"format": float(formed)}
    return Score(float(correct), parts, correct, answer)


def no_number(answer: str) -> str:
    """A number, or a text with one, as `5 apples`: of \\frac{\\sqrt{2}}{3} 3 would be left."""
    text = _behind_mark(answer)
    if number_of(text) is not None:
        return ""
    found = len(numbers_in(text))
    if found == 1 and not set("\\^") & set(text):
        return ""
    return (
        f"it has {found or 'no'} number{'s' * (found > 1)}"
        if found != 1
        else "it is a formula, which judge=math reads"
    )


def no_letter(answer: str) -> str:
    return "" if chosen_letter(answer) is not None else "it names no letter"


def empty(answer: str) -> str:
    return "" if answer.strip() else "it is empty"


def no_expression(answer: str) -> str:
    return "" if symbolic.in_answer(answer) else "math-verify reads no expression in it"


@dataclass(frozen=True)
class Judge:
    """A judge by name. answer_problem: what is wrong with an answer, "": nothing; apart: it may
    hang, so it runs in the scoring processes.
    """

    score: Judging
    answer_problem: Callable[[str], str] = empty
    apart: bool = False


JUDGES = {
    "exact": Judge(exact),
    "number": Judge(number, no_number),
    "gsm8k": Judge(gsm8k, no_number),
    "boxed": Judge(boxed),
    "choice": Judge(choice, no_letter),
    "regex": Judge(regex, apart=True),
    "math": Judge(math, no_expression, apart=True),
}


def judge_named(name: str) -> Judge:
    """The judge of `task_args.judge`. Raises ValueError where there is none of that name."""
    if name in JUDGES:
        return JUDGES[name]
    if ":" not in name:
        choices = f"{meant(name, JUDGES)}use one of {', '.join(JUDGES)}"
        remedy = f"{choices}, or MODULE:NAME for a judge of your own"
        raise ValueError(f"task_args.judge={name}: no such judge; {remedy}")
    module, attribute = import_named("task_args.judge", name, "my_package.judges:chess")
    function = getattr(module, attribute, None)
    if not callable(function):
        remedy = f"{meant(attribute, vars(module))}name a function (answer, response) of it"
        wrong = f"{module.__name__} has no function {attribute}"
        raise ValueError(f"task_args.judge={name}: {wrong}; {remedy}")
    return Judge(function, lambda answer: "", apart=True)


def settings_of(name: str, judge: Judge, args: Mapping[str, Any]) -> dict[str, Any]:
    """`judge_args` with the types that the judge's function declares. Raises ValueError that lists
    wrong ones.
    """
    keys = {
        key: parameter
        for key, parameter in inspect.signature(judge.score).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    hints, values, problems = get_type_hints(judge.score), {}, []
    for key, value in args.items():
        written = f"task_args.judge_args.{key}={value!r}"
        if key not in keys:
            has = f"it has {', '.join(keys)}" if keys else "it takes none"
            problems.append(f"{written}: judge={name} has no such setting; {meant(key, keys)}{has}")
            continue
        hint = hints.get(key, Any)
        try:
            values[key] = value_as(Text(value) if isinstance(value, str) else value, hint)
        except ValueError:
            problems.append(f"{written}: {mismatch(value, hint)}")
    needed = [key for key, parameter in keys.items() if parameter.default is parameter.empty]
    problems += [
        f"task_args.judge_args.{key} is missing: judge={name} needs it; give it a value"
        for key in needed
        if key not in args
    ]
    if not problems and judge.score is regex:
        problems += _pattern_problems(values["pattern"])
    if problems:
        raise ValueError("\n".join(problems))
    return values


def _pattern_problems(pattern: str) -> list[str]:
    written = f"task_args.judge_args.pattern={pattern!r}"
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        return [f"{written}: it is no regular expression ({error}); correct it"]
    if groups > 1:
        return [f"{written}: it has {groups} groups; use (?:...) for all but the answer's"]
    return []
