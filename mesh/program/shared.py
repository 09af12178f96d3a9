"""What the ranks of a run must share and each derives by itself: the configuration, the code, the
files, the plan. Compared at the start (`mesh/lifecycle/agreement.py`).
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mesh.checkpoint.same_run import Inputs
from mesh.config.keys import conf_keys, refuse, shown, value_of
from mesh.config.schema import PACKAGE, Conf, resolve_path
from mesh.lifecycle.agreement import Part, disagreements, text_of
from mesh.lifecycle.process import Process
from mesh.program.encoding import tokenizer_directory
from mesh.program.plan import Plan
from mesh.tasks.prompts import digest_of_step
from mesh.text.template import TEMPLATE_FILE, TEMPLATE_FOLDER

PACKAGES = ("torch", "torchtitan", "tokenizers", "safetensors", "numpy", "triton", "vllm")
ENVIRONMENT = (
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "CUBLAS_WORKSPACE_CONFIG",
)
"""Variables that change what a kernel computes."""

CONFIGS = ("config.json", "generation_config.json")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", TEMPLATE_FILE)
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
OF_TASKS = ("training", "prompts", "evaluations", "tokenizer")
"""Parts of a plan that hold a task or a tokenizer, which are compared by their sources."""

SAMPLES, SAMPLE = 64, 4096  # pieces of a large file that are hashed, and their size [bytes]


def refuse_differences(process: Process, *parts: Part) -> None:
    """Raise one Refusal, on every rank alike, where a part is not the same on all. Collective."""
    refuse(disagreements(process, *parts))


def of_start(conf: Conf) -> list[Part]:
    """What is there before a model, a task or a loss is read."""
    keys = {name: shown(value_of(conf, name)) for name in conf_keys()}
    variables = {name: os.environ.get(name, "unset") for name in ENVIRONMENT}
    same_files = "copy the same files to every machine"
    return [
        Part("the configuration", keys, "start every rank with the same command and files"),
        Part("the software", software(), "install the same on every machine"),
        Part("the environment", variables, "set the same on every machine"),
        Part("the model directory", model_files(conf), same_files),
    ]


def of_user_code(
    task: Any,
    loss: Any,
    scores: Iterable[str],
    problems: Iterable[str],
    optimizer: str | None = None,
) -> Part:
    """The modules of a task, a loss, an optimizer and score functions, and the problems that
    reading them had."""
    items = user_code(task, loss, scores, optimizer) | {
        "the problem": "; ".join(problems) or "none"
    }
    return Part("the task or the loss", items, "use the same code on every machine")


def user_code(
    task: Any, loss: Any, scores: Iterable[str], optimizer: str | None = None
) -> dict[str, str]:
    """Digests of the modules of a task, a loss, and score functions and an optimizer, which are
    named as MODULE:NAME."""
    modules = [(what, module) for what, value in (("task", task), ("loss", loss))
               for module in modules_of(value)]  # fmt: skip
    modules += [("task", module) for module in getattr(task, "user_modules", ())]
    modules += [("score function", name.partition(":")[0]) for name in scores]
    modules += [("optimizer", optimizer.partition(":")[0])] if optimizer else []
    return {f"the {what}'s module {module}": source_of(module) for what, module in modules}


def inputs_of(conf: Conf, plan: Plan) -> Inputs:
    """What a run computes with, for its checkpoints."""
    code = user_code(plan.task, plan.objective.loss, conf.scores, conf.trainer.optimizer)
    drawn = partial(digest_of_step, plan.prompts, conf.num_prompts)
    return Inputs(digests_of(small_files(conf)), code, drawn)


def of_plan(plan: Plan) -> Part:
    """Everything that is resolved of a configuration, but for what the other parts have."""
    names = [field.name for field in fields(plan) if field.name not in OF_TASKS]
    texts = {name: text_of(getattr(plan, name)) for name in names}
    return Part("the plan", texts, "start every rank on the same kind of machine")


def software() -> dict[str, str]:
    """Versions, and digests of our own sources and of the program that was started."""
    ours = sorted(PACKAGE.rglob("*.py"))
    digest = hashlib.blake2b(digest_size=8)
    for path in ours:
        digest.update(f"{path.relative_to(PACKAGE)}".encode() + path.read_bytes())
    versions = {name: version_of(name) for name in PACKAGES}
    code = {"mesh": digest.hexdigest(), "the program": source_of("__main__")}
    return {"python": platform.python_version()} | versions | code


def version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def model_files(conf: Conf) -> dict[str, str]:
    """Digests of the files that are read of the model and the tokenizer."""
    paths = small_files(conf)
    if conf.model.path is not None and conf.model.init == "checkpoint":
        model = resolve_path(conf.model.path)
        paths["model"] += weights_in(model)
    if conf.teacher.path is not None:
        paths["teacher"] += weights_in(resolve_path(conf.teacher.path))
    return digests_of(paths)


def weights_in(directory: Path) -> list[Path]:
    return [path for kind in WEIGHTS for path in sorted(directory.glob(kind))]


def small_files(conf: Conf) -> dict[str, list[Path]]:
    """The files of the tokenizer and its templates, those of model and teacher that hold no
    weights, and the examples before every prompt."""
    tokenizer = tokenizer_directory(conf)
    paths = {"tokenizer": [tokenizer / name for name in (*TOKENIZER, *CONFIGS)]}
    paths["tokenizer"] += sorted((tokenizer / TEMPLATE_FOLDER).glob("*.jinja"))
    if conf.prompt.few_shot is not None:
        paths["prompt"] = [resolve_path(conf.prompt.few_shot)]
    if conf.model.path is not None:
        paths["model"] = [resolve_path(conf.model.path) / name for name in CONFIGS]
    if conf.teacher.path is not None:
        read = ("config.json", "tokenizer.json")
        paths["teacher"] = [resolve_path(conf.teacher.path) / name for name in read]
    return paths


def digests_of(paths: Mapping[str, Sequence[Path]]) -> dict[str, str]:
    return {
        f"{path.name} of the {what}": digest_of_file(path)
        for what, found in paths.items()
        for path in found
    }


def digest_of_file(path: Path) -> str:
    """Size and digest of a file; of a large one, of pieces that lie evenly in it: files of weights
    that were trained differently differ everywhere.
    """
    if not path.is_file():
        return "missing"
    try:
        size, content = path.stat().st_size, sampled(path)
    except OSError as error:  # whoever reads all of it refuses the file
        return f"not readable ({error.strerror})"
    return f"{size} bytes, digest {hashlib.blake2b(content, digest_size=8).hexdigest()}"


def sampled(path: Path) -> bytes:
    """The bytes of a small file; evenly spaced pieces of a large one."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= SAMPLES * SAMPLE or path.suffix == ".json":
            return file.read()
        pieces = []
        for i in range(SAMPLES):
            file.seek(i * (size - SAMPLE) // (SAMPLES - 1))
            pieces.append(file.read(SAMPLE))
    return b"".join(pieces)


def modules_of(value: Any) -> list[str]:
    """The modules of a user's task and its base classes, or of the function of a loss."""
    if value is None:
        return []
    function = getattr(value, "surrogate", None)
    names = [function.__module__] if function else [one.__module__ for one in type(value).__mro__]
    return [name for name in dict.fromkeys(names) if name.partition(".")[0] not in OWN]


OWN = ("mesh", "builtins", "typing", "abc")


def source_of(module: str) -> str:
    """Digest of the file of a module."""
    file = getattr(sys.modules.get(module), "__file__", None)
    return "no file" if file is None else digest_of_file(Path(file))
