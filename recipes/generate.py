"""Answers from a checkpoint, through the engine and the weight bridge that training uses.

    torchrun recipes/generate.py conf=qwen3_tiny model.path=RUN_DIR/model 'generate.prompts=[abc>]'
    cat questions.txt | torchrun recipes/generate.py conf=qwen3_tiny generate.prompts=-
    torchrun recipes/generate.py conf=CONF prompt.chat=true 'generate.prompts=[What is 12*7?]'

Without prompts the first held-out ones of the task are answered. generate.file has them in a file,
as texts, messages or token ids, and generate.output keeps the answers. Several processes share the
prompts as the configuration lays them out; answers are printed when all are there, and Ctrl-C ends
it at once. Left out: streaming, a server, and more prompts than fit in memory.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace

from mesh.config.keys import problem, refuse, refusing
from mesh.config.schema import Conf, resolve_path
from mesh.lifecycle.process import Process
from mesh.program.assembly import (
    Program,
    assemble,
    attempt,
    check,
    launch,
    read_command,
    sync,
)
from mesh.program.plan import Plan
from mesh.program.prompt_checks import prompt_problems
from mesh.program.text_warnings import prompt_warnings
from mesh.program.warnings import EVALUATED, SAMPLED, other_run_warnings
from mesh.roles.conversation import warn_of_replies
from mesh.roles.generator import EVAL_STEP
from mesh.tasks import draw_held_out, num_held_out, numbered
from mesh.tasks.replying import converses
from mesh.tasks.transcript import shown, turn_texts
from mesh.text.prompt_file import read_prompts
from mesh.types import TRUNCATED, NumberedPrompt, Prompt, Rollout

NUM_SHOWN = 8  # held-out prompts that are answered where none are given


def main(argv: list[str]) -> None:
    _, conf = read_command(argv)
    if conf.generate.prompts == ["-"]:
        conf = replace(conf, stall_seconds=0)  # a person may be typing
    with launch(conf) as process:
        plan = check(conf, process, training=False, held_out=False)
        prompts = asked(conf, process, plan)
        given = [numbered.prompt for numbered in prompts]
        refuse(prompt_problems(process, plan.prompts, given, "prompts"))
        for line in prompt_warnings(process, plan.prompts, given, 0):
            process.say(line)
        for line in reply_warnings(conf, plan, given):
            process.say(line)
        for line in other_run_warnings(conf, plan, deciding_keys(conf)):
            process.say(line)
        program = assemble(plan, process)
        sync(program)
        completions = answers(conf, process, program, prompts)
        process.say(table(plan, prompts, completions))
        if conf.generate.output is not None:
            lines = json_lines(plan, prompts, completions)
            process.write(resolve_path(conf.generate.output), lines)


def deciding_keys(conf: Conf) -> tuple[str, ...]:
    """The keys that decide the answers: those of the task only for its own prompts, those of
    sampling only where it samples."""
    names = [name for name in EVALUATED if not name.startswith("eval.")]
    if conf.generate.prompts or conf.generate.file is not None:
        names.remove("task")
    return tuple(name for name in names if not (conf.generate.greedy and name in SAMPLED))


def asked(conf: Conf, process: Process, plan: Plan) -> list[NumberedPrompt]:
    """The prompts of the command line, of a file, of stdin's lines, or the first held-out ones."""
    texts = conf.generate.prompts
    if conf.generate.file is not None:
        return numbered(of_file(conf, process, conf.generate.file))
    if not texts:
        with refusing():
            num = min(NUM_SHOWN, num_held_out(plan.task, conf.eval.num_prompts))
            return numbered(draw_held_out(plan.task, num))
    if texts == ["-"]:
        texts = process.read_lines()
    prompts = [Prompt(i, text, answer="") for i, text in enumerate(filter(None, texts))]
    refuse([] if prompts else ["generate.prompts=-: stdin has no lines; write one prompt a line"])
    return numbered(prompts)


def reply_warnings(conf: Conf, plan: Plan, prompts: Sequence[Prompt]) -> list[str]:
    """A warning where the task replies to prompts that are not its own and say nothing beside."""
    own = not conf.generate.prompts and conf.generate.file is None
    bare = sum(not (prompt.answer or prompt.info) for prompt in prompts)
    if own or not bare or not converses(plan.task):
        return []
    return [
        f"warning: task={conf.task} replies to what is generated, and {bare} of {len(prompts)} "
        "prompts have neither an answer nor info, which reply may need; give them as columns of a "
        "generate.file, or ask the task's held-out prompts"
    ]


def of_file(conf: Conf, process: Process, name: str) -> list[Prompt]:
    """The prompts of generate.file, as rank 0 reads them. Collective."""
    if conf.generate.prompts:
        both = "generate.prompts is set too"
        refuse([problem("generate.file", name, both, "leave out one of the two")])
    wrong: list[str] = []
    found = attempt(wrong, read_prompts, resolve_path(name))
    prompts, wrong = process.from_rank0((found, wrong))
    refuse([f"generate.file={name}: {line}" for line in wrong])
    return prompts


def answers(
    conf: Conf, process: Process, program: Program, prompts: Sequence[NumberedPrompt]
) -> list[Rollout]:
    """The answers to all prompts, by (prompt_id, sample_id), on every rank. Collective."""
    generator = program.generator
    sampling = generator.sampling(EVAL_STEP, temperature=0 if conf.generate.greedy else None)
    mine, _ = generator.answers(program.scorer, prompts, conf.generate.num_samples, sampling)
    warn_of_replies(program.scorer, process.cpu_group)
    shares = process.gather(mine if generator.speaks else [])
    return sorted((r for share in shares for r in share), key=lambda r: r.key)


def table(plan: Plan, prompts: Sequence[NumberedPrompt], rollouts: Sequence[Rollout]) -> str:
    """A line per answer: the prompt, an arrow, the answer; a mark where it was cut off."""
    return "\n".join(
        f"{prompts[r.prompt_id].text} -> {written(plan, r)}"
        + (" ..." if r.finish_reason in TRUNCATED else "")
        for r in rollouts
    )


def written(plan: Plan, rollout: Rollout) -> str:
    """The answer as a text; in a conversation each reply stands in brackets."""
    if not rollout.turns:
        return plan.tokenizer.response(rollout)
    turns = turn_texts(plan.tokenizer, rollout)
    return "".join(turn.text if turn.sampled else f"[{turn.text}]" for turn in turns)


def json_lines(plan: Plan, prompts: Sequence[NumberedPrompt], rollouts: Sequence[Rollout]) -> str:
    """A JSON object per answer, with its prompt in the form in which it was given."""
    lines = []
    for r in rollouts:
        prompt = prompts[r.prompt_id].prompt
        given = {"messages": list(prompt.messages), "tokens": list(prompt.tokens)}
        given = {name: value for name, value in given.items() if value}
        lines.append({
            "prompt_id": r.prompt_id, "sample_id": r.sample_id,
            **(given or {"prompt": prompt.text}),
            **({"prefill": prompt.prefill} if prompt.prefill else {}), **shown(plan.tokenizer, r),
            "finish_reason": r.finish_reason,
        })  # fmt: skip
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


if __name__ == "__main__":
    main(sys.argv[1:])
