"""Loading a configuration: schema <- `conf/NAME.yaml` <- `key=value` arguments.

Every value is text until the schema's type parses it, in a YAML and on the command line alike:
YAML's own guesses would make `sync.verify=off` a false and `run_dir=1e3` the number 1000.0. Values
below `task_args`, `loss_args` and the like stay text until whoever reads them gives them a type.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_origin

import yaml  # type: ignore[import-untyped]
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mesh.config.changes import changed
from mesh.config.evaluation_sets import start_problems
from mesh.config.help import missing_config_text, print_help_and_exit
from mesh.config.keys import (
    SECRETS,
    ConfKey,
    Refusal,
    alternatives,
    conf_keys,
    example,
    expected,
    override_problems,
    problem,
    refuse,
)
from mesh.config.moved import MOVED, moved_problem
from mesh.config.run_format import run_format_problems
from mesh.config.schema import CONF_DIR, Conf
from mesh.config.spelling import meant, near_below, near_keys
from mesh.config.text import Text, dump_text, from_word, load_yaml, value_as

OPEN = tuple(key.name for key in conf_keys().values() if get_origin(key.annotation) is dict)
BELOW_OPEN = tuple(f"{name}." for name in OPEN)
NO_REFERENCES = ("${...} is not replaced here", "write the value itself")


@dataclass(frozen=True)
class Setting:
    """One `key: value` as written; `source` is "" on the command line, else the YAML's name."""

    source: str
    name: str
    value: Any


def load_conf(argv: list[str], resumes: bool = False) -> tuple[str, Conf]:
    """The name and the values of the run that the command line `argv` (no program name) asks for.

    Prints keys and configs, and exits, for `--help` and for `conf=` without a name. Raises Refusal
    where no conf= is given, or listing every unknown key, wrong type, value out of its range,
    unknown config and argument that is not key=value. `resumes`: the program can continue the run
    of `resume=RUN_DIR`, which takes the place of conf=.
    """
    settings, problems = read_words(argv)
    named = [setting.value for setting in settings if setting.name == "conf"]
    resumed = [setting.value for setting in settings if setting.name == "resume"]
    if wants_help(argv) or "" in named:
        print_help_and_exit()
    if not (named or resumed):
        raise Refusal(missing_config_text())
    overrides = [setting for setting in settings if setting.name != "conf"]
    if resumed:
        conf, more = resumed_conf(resumed[-1], overrides, resumes and not named)
        refuse(problems + more + start_problems(conf))
        return Path(resumed[-1]).name, conf
    base, more = read_config(named[-1])
    conf, wrong = merge(base + overrides)
    if conf.resume is not None:
        remedy = "leave it out, and give resume=RUN_DIR in place of conf= to continue a run"
        wrong.append(problem("resume", conf.resume, "a config cannot resume", remedy))
    refuse(problems + more + wrong + start_problems(conf))
    return Path(named[-1]).stem, conf


def resumed_conf(run_dir: str, words: list[Setting], can: bool) -> tuple[Conf, list[str]]:
    """The configuration of a saved run with `words` applied, and the problems with that.

    Only keys that leave the computation unchanged can be overridden (`override_problems`).
    """
    if not can:
        remedy = "continue it by recipes/grpo.py resume=RUN_DIR, without conf="
        return Conf(), [problem("resume", run_dir, "this program cannot resume", remedy)]
    path = Path(run_dir).expanduser() / "config.yaml"
    if path.is_symlink() or not path.is_file():
        wrong = f"holds no run ({path} is not a file)"
        return Conf(), [problem("resume", run_dir, wrong, "name the directory of a run")]
    if problems := run_format_problems(run_dir):
        return Conf(), problems
    settings, problems = read_yaml(path, ())
    settings += [Setting("", name, run_dir) for name in ("run_dir", "resume")]
    saved, more = merge(settings)
    conf, of_words = merge(settings + words)
    if more:
        return saved, problems + more
    return conf, problems + override_problems(saved, conf) + of_words


def to_yaml(conf: Conf) -> str:
    """Every key of `conf` as YAML, so that `read_conf` gives an equal one."""
    return dump_text(asdict(conf))


def from_yaml(text: str) -> Conf:
    """The configuration of a `to_yaml`, without keys that this version does not have."""
    return merge(flatten("", dict(load_yaml(text)[0]), ""))[0]


def save_conf(conf: Conf, path: Path | str) -> None:
    """Write `to_yaml(conf)`."""
    Path(path).write_text(to_yaml(conf))


def read_conf(path: Path | str) -> Conf:
    """The configuration that `save_conf` wrote; Refusal as for `load_conf`."""
    settings, problems = read_yaml(Path(path), ())
    conf, wrong = merge(settings)
    refuse(problems + wrong + start_problems(conf))
    return conf


def read_words(words: list[str]) -> tuple[list[Setting], list[str]]:
    """The settings of a command line, and a problem for each argument that is not key=value."""
    settings, problems = [], []
    for word in words:
        name, equals, text = word.partition("=")
        if word in ("-h", "--help"):
            continue
        if not equals or not name or name.startswith("-"):
            remedy = f"write {name.lstrip('-') or 'KEY'}={text or 'VALUE'}"
            problems.append(f"{word!r} is not key=value; {remedy}")
        elif not text and name != "conf":
            problems.append(f"{word} has no value; write {name}=VALUE, or {name}=null to unset it")
        else:
            settings.append(Setting("", name, Text(text)))
    return settings, problems


def config_names() -> list[str]:
    """The configs of `conf/`, by name."""
    return sorted(path.stem for path in CONF_DIR.glob("*.yaml"))


def read_config(name: str, seen: tuple[Path, ...] = ()) -> tuple[list[Setting], list[str]]:
    """The settings of a config given by name or as a path to a .yaml, its base's settings first."""
    path = Path(name) if name.endswith(".yaml") else CONF_DIR / f"{name}.yaml"
    if path.is_file():
        return read_yaml(path, seen)
    names = config_names()
    remedy = f"{meant(name, names)}name one of {', '.join(names)}, or a path to a .yaml"
    return [], [problem("conf", name, "no such config", remedy)]


def read_yaml(path: Path, seen: tuple[Path, ...]) -> tuple[list[Setting], list[str]]:
    """The settings of one YAML after those of the config that its `defaults:` line names."""
    if path.resolve() in seen:
        return [], [f"{path.name}: its defaults lead back to itself; remove one of them"]
    try:
        content, repeated = load_yaml(path.read_text())
    except yaml.YAMLError as error:
        return [], [f"{path} is not YAML: {' '.join(str(error).split())}"]
    if content is not None and not isinstance(content, dict):
        return [], [f"{path} holds no `key: value` lines; write e.g. `steps: 100`"]
    content = dict(content or {})
    base = content.pop("defaults", None)
    settings, problems = read_config(base, (*seen, path.resolve())) if base else ([], [])
    problems += [f"{path}: {line}" for line in repeated]
    return settings + flatten(path.name, content, ""), problems


def flatten(source: str, content: dict[str, Any], prefix: str) -> list[Setting]:
    """One setting for each leaf of nested mappings; an empty value is null, as YAML has it."""
    settings: list[Setting] = []
    for part, value in content.items():
        name = f"{prefix}{part}"
        if isinstance(value, dict) and value and not name.startswith(BELOW_OPEN):
            settings += flatten(source, value, f"{name}.")
        else:
            empty = value == "" and isinstance(value, Text)
            settings.append(Setting(source, name, None if empty else value))
    return settings


def merge(settings: list[Setting]) -> tuple[Conf, list[str]]:
    """The schema's defaults overridden by `settings` in order, and the problems with those."""
    merged, problems, keys = writable(OmegaConf.structured(Conf)), [], conf_keys()
    free: dict[str, dict[str, Any]] = {name: {} for name in OPEN}
    for setting in settings:
        is_open = setting.name in OPEN or setting.name.startswith(BELOW_OPEN)
        wrong = put_open(free, setting) if is_open else apply(merged, setting, keys)
        if wrong:
            problems.append(f"{setting.source}: {wrong}" if setting.source else wrong)
    conf = OmegaConf.to_object(merged)
    assert isinstance(conf, Conf)
    return changed(conf, free), problems


def writable(node: DictConfig) -> DictConfig:
    """The node and all below it, which a frozen schema makes read-only, open to values."""
    OmegaConf.set_readonly(node, False)
    for name in node:
        child = node._get_node(name)
        if isinstance(child, DictConfig):
            writable(child)
    return node


def apply(merged: DictConfig, setting: Setting, keys: dict[str, ConfKey]) -> str | None:
    """Set one key of `merged`; return the problem where its name or its type is wrong."""
    name, value = setting.name, setting.value
    if name in MOVED:
        return moved_problem(name, value, setting.source)
    if (key := keys.get(name)) is None:
        return unknown_key(name, value, keys)
    if "${" in str(value):
        return problem(name, value, *NO_REFERENCES)
    try:
        OmegaConf.update(merged, name, typed(value, key.annotation))
    except (OmegaConfBaseException, ValueError, yaml.YAMLError):
        wrong = f"expected {expected(key.annotation)}"
        return problem(name, value, wrong, f"write e.g. {name}={example(key, value)}")
    return None


def put_open(free: dict[str, dict[str, Any]], setting: Setting) -> str | None:
    """Set a value in or below a key that takes any name; return the problem with it."""
    name = setting.name
    key = next(key for key in OPEN if f"{name}.".startswith(f"{key}."))
    if "${" in str(setting.value):
        return problem(name, setting.value, *NO_REFERENCES)
    try:
        value = from_word(setting.value)
    except ValueError as error:
        return problem(name, setting.value, str(error), "write it once")
    if name in OPEN and not isinstance(value, dict):
        wrong = f"expected {expected(dict)}"
        return problem(name, setting.value, wrong, f"write e.g. {name}={{}}")
    put(free, [key, *name[len(key) + 1 :].split(".")] if name != key else [key], value)
    return None


def put(into: dict[str, Any], path: list[str], value: Any) -> None:
    """Set a value in nested mappings; a mapping is merged into one that is there."""
    first, *rest = path
    if not rest and not isinstance(value, dict):
        into[first] = value
        return
    if not isinstance(into.get(first), dict):
        into[first] = {}
    if rest:
        put(into[first], [Text(part) for part in rest], value)
        return
    for key, item in value.items():
        put(into[first], [key], item)


def unknown_key(name: str, value: Any, keys: dict[str, ConfKey]) -> str:
    """The problem of a name that is no key: a group of keys, or a misspelt one."""
    if name.lower().endswith(SECRETS):
        value = "(not shown)"
    inside = [key for key in keys if key.startswith(f"{name}.")]
    if inside:
        return problem(name, value, "a group of keys", f"set one of {', '.join(inside)}")
    near = near_below(name, OPEN) or near_keys(name, keys)
    question = f"did you mean {' or '.join(near)}? " if near else ""
    return problem(name, value, "unknown key", f"{question}--help lists all keys")


def typed(value: Any, annotation: Any) -> Any:
    """A written value as OmegaConf takes it: text as it stands, anything else read."""
    kind, optional = alternatives(annotation)
    if value is None or (isinstance(value, str) and not isinstance(value, Text)):
        return value
    if kind is str or get_origin(kind) is Literal:
        plain = str(value) if isinstance(value, Text) else value
        return None if optional and plain == "null" else plain
    return texts(value) if kind == list[str] else value_as(from_word(value), annotation)


def texts(value: Any) -> list[str]:
    """A list of texts as YAML writes it, each as it stands; any other text is a list of one."""
    if isinstance(value, str):
        value = load_yaml(value)[0] if value.startswith("[") else [value]
    return [str(text) for text in value]


def wants_help(argv: list[str]) -> bool:
    return "-h" in argv or "--help" in argv
