"""Refusals of losses: settings that one does not have, and terms that make no sense together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mesh.config.keys import problem, unset, value_of
from mesh.config.schema import Conf
from mesh.program.loss import importance_of, run_objective
from mesh.rl.advantages import DIVIDED, OF_STEP
from mesh.rl.loading import BOUNDS, load_loss, loss_problems, settings_of
from mesh.rl.losses import LOSSES, Loss
from mesh.rl.objective import Objective
from mesh.rl.trial import trial


def read_loss(conf: Conf) -> Loss:
    """The loss; ValueError where there is none, or where a setting or a term does not fit it."""
    loss = load_loss(conf.loss)
    bounds = {name: value_of(conf, name) for name in BOUNDS}
    wrong = loss_problems(conf.loss, loss, bounds, conf.loss_args)
    wrong += [line for found in TERMS for line in found(conf, loss)]
    if not wrong:
        found = trial_problems(run_objective(conf, loss), conf.group_size)
        wrong += [f"loss={conf.loss}: {line}" for line in found]
    if wrong:
        raise ValueError("\n".join(wrong))
    return loss


def trial_problems(objective: Objective, group_size: int) -> list[str]:
    """The fault of a loss that fails on a few made-up tokens, or mixes what may be cut apart."""
    try:
        trial(objective, max(group_size, 2))
    except ValueError as error:
        return str(error).splitlines() or [repr(error)]
    return []


def advantage_problems(conf: Conf, loss: Loss) -> list[str]:
    """An epsilon for advantages that are not divided; statistics of a step that is cut, or whose
    equal groups are left out although they are compared with the others.
    """
    advantage, eps, found = conf.advantage or loss.advantage, conf.advantage_eps, []
    if eps != Conf.advantage_eps and advantage not in DIVIDED:
        name = advantage if isinstance(advantage, str) else "the loss's own function"
        wrong = f"the advantage is {name}, which does not divide by a deviation or mean"
        found.append(problem("advantage_eps", eps, wrong, "leave it out, or set advantage=std"))
    if conf.waves > 1 and (advantage in OF_STEP or "step_statistics" in loss.needs):
        needs = f"loss={conf.loss}" if conf.advantage is None else f"advantage={conf.advantage}"
        wrong = f"{needs} needs the rewards of the whole step before the first backward pass"
        found.append(problem("waves", conf.waves, wrong, "set waves=1"))
    if advantage == "whitened":
        wrong = (
            "with advantage=whitened groups of equal rewards teach too, as they are compared with "
            "the whole step"
        )
        remedy = "leave it out, or set advantage=centred_whitened (loss=reinforce_pp_baseline)"
        found += [problem(name, value, wrong, remedy) for name, value in leaving_out(conf).items()]
    return found


def leaving_out(conf: Conf) -> dict[str, Any]:
    """The keys by which groups of equal rewards are not trained on, where they are set."""
    keys = {name: value_of(conf, name) for name in ("drop_equal_groups", "refill_rounds")}
    return {name: value for name, value in keys.items() if value}


def negative_problems(conf: Conf, loss: Loss) -> list[str]:
    """Terms that take rewards below 0, where advantages are divided by the mean."""
    if (conf.advantage or loss.advantage) != "mean":
        return []
    wrong = (
        "it takes rewards below 0, and the advantage divides by their mean, which is made for "
        "rewards of 0 and 1"
    )
    remedy = "leave it out, or set advantage=std (loss=dapo)"
    terms = {
        "length_penalty": conf.length_penalty > 0,
        "kl_in": conf.kl_in == "reward",
        "truncated_reward": (conf.truncated_reward or 0) < 0,
    }
    return [
        problem(name, value_of(conf, name), wrong, remedy)
        for name, negative in terms.items() if negative
    ]  # fmt: skip


def bound_problems(conf: Conf, loss: Loss) -> list[str]:
    """Bounds made for the ratio of a token, for one that is closer to 1; a dual clip where nothing
    is left for it to do.
    """
    found = narrow_problems(conf, loss, loss.widest) if loss.widest is not None else []
    if conf.dual_clip is not None and "dual_clip" not in settings_of(loss):
        wrong = f"loss={conf.loss} has no such bound"
        if conf.loss in ("cispo", "sapo"):
            wrong += ", as it bounds every large ratio by itself"
        others = [name for name, other in LOSSES.items() if "dual_clip" in settings_of(other)]
        remedy = f"leave it out, or use one of {', '.join(others)}"
        found.append(problem("dual_clip", conf.dual_clip, wrong, remedy))
    high = run_bound(conf, loss)
    if conf.dual_clip is not None and high is not None and conf.dual_clip <= 1 + high:
        wrong = f"it has to be above 1 + clip_high={1 + high:g}, where clipping begins"
        found.append(problem("dual_clip", conf.dual_clip, wrong, "use e.g. 3"))
    return found


def narrow_problems(conf: Conf, loss: Loss, widest: float) -> list[str]:
    """Bounds made for the ratio of a token, for one that leaves 1 by less than `widest`."""
    wrong = (
        f"the ratio of loss={conf.loss} is the mean of a sequence, which hardly leaves 1: a bound "
        "for the ratios of tokens never clips it"
    )
    settings, found = settings_of(loss), []
    for name in (name for name in ("clip_low", "clip_high") if name in settings):
        value = value_of(conf, name)
        if value is not None and value >= widest:
            own = settings[name].default
            own = own if isinstance(own, float) else widest / 100
            remedy = f"use less than {widest:g}, e.g. {own:g}, or loss=grpo or dapo"
            found.append(problem(name, value, wrong, remedy))
    if conf.dual_clip is not None and conf.dual_clip >= 1 + widest:
        remedy = f"use less than {1 + widest:g}, e.g. {1 + widest / 10:g}, or loss=grpo or dapo"
        found.append(problem("dual_clip", conf.dual_clip, wrong, remedy))
    return found


def run_bound(conf: Conf, loss: Loss) -> float | None:
    """The upper bound that a loss with a dual clip has; None where it has none."""
    settings = settings_of(loss)
    if "dual_clip" not in settings or "clip_high" not in settings:
        return None
    own = loss.settings.get("clip_high", settings["clip_high"].default)
    return own if conf.clip_high is None else conf.clip_high


def divergence_problems(conf: Conf, loss: Loss) -> list[str]:
    """Estimators and places of the KL that give nothing to learn, or that nothing weighs."""
    found = []
    if conf.kl_coef > 0 and conf.kl_in == "loss" and conf.kl_estimator == "k1":
        wrong = (
            "in the loss its gradient is that of the logprob alone, which is 0 on average over "
            "what the policy samples: no pull towards the reference"
        )
        remedy = "use k2 or k3, or set kl_in=reward"
        found.append(problem("kl_estimator", "k1", wrong, remedy))
    if conf.kl_coef == 0:
        asked = {"kl_estimator": conf.kl_estimator is not None, "kl_in": conf.kl_in == "reward"}
        found += [
            problem(name, value_of(conf, name), "kl_coef=0 weighs no KL", "set kl_coef=0.01 or so")
            for name, given in asked.items() if given
        ]  # fmt: skip
    if conf.kl_coef > 0 and conf.kl_in == "reward" and conf.truncated == "mask":
        wrong = (
            "responses that are masked are not scored by the reference, but their rewards count in "
            "their group"
        )
        remedy = "set truncated=score, or kl_in=loss"
        found.append(problem("kl_in", "reward", wrong, remedy))
    return found


def importance_problems(conf: Conf, loss: Loss) -> list[str]:
    """A correction of what is exact, and bounds that nothing reads or nothing fits between."""
    names = ("importance_level", "importance_low", "importance_high")
    if conf.importance == "none":
        wrong = "importance=none corrects nothing"
        given = [name for name in names if value_of(conf, name) != getattr(Conf, name)]
        remedy = "leave it out, or set importance=tis or mask"
        return [problem(name, value_of(conf, name), wrong, remedy) for name in given]
    if conf.batch_invariant:
        wrong = "with batch_invariant=true trainer and generator have equal bits: every ratio is 1"
        remedy = "leave it out, or set batch_invariant=false"
        return [problem("importance", conf.importance, wrong, remedy)]
    found = importance_of(conf)
    if found is not None and found.kind == "mask" and found.low == found.high:
        wrong = f"with importance_low={found.low:g} only ratios of exactly 1 are left"
        return [problem("importance_high", found.high, wrong, "use e.g. 2")]
    return []


def length_problems(conf: Conf, loss: Loss) -> list[str]:
    """A penalty without its ramp, or a ramp without a penalty or longer than a response."""
    tokens, limit = conf.length_penalty_tokens, conf.length_penalty_limit
    if conf.length_penalty == 0:
        names = ("length_penalty_tokens", "length_penalty_limit")
        given = [name for name in names if value_of(conf, name) is not None]
        remedy = "leave it out, or set length_penalty=1"
        wrong = "length_penalty=0 takes nothing off"
        return [problem(name, value_of(conf, name), wrong, remedy) for name in given]
    longest = conf.generator.max_new_tokens
    end = longest if limit is None else limit
    if tokens is None:
        remedy = f"set it to a part of {end}, e.g. {max(end // 5, 1)}"
        return [
            unset("length_penalty_tokens", "length_penalty needs the length of its ramp", remedy)
        ]
    if tokens > end:
        wrong = f"the ramp is longer than the responses at its end, which have {end} tokens"
        return [problem("length_penalty_tokens", tokens, wrong, f"use at most {end}")]
    return []


def teacher_problems(conf: Conf, loss: Loss) -> list[str]:
    """A teacher that is missing or not read, and what makes no sense beside one."""
    keys, found = conf.teacher, []
    coef = loss.teacher_coef if keys.coef is None else keys.coef
    read = coef > 0 or bool({"teacher_logprobs", "teacher_kl"} & loss.needs)
    if loss.teacher_coef > 0 and coef == 0:
        wrong = f"loss={conf.loss} learns from the teacher alone"
        return [problem("teacher.coef", 0.0, wrong, "leave it out, or use another loss")]
    if read and keys.path is None:
        wrong = f"loss={conf.loss} with a weight of {coef:g} needs a teacher"
        remedy = "set teacher.path=DIRECTORY, a Hugging Face model of the same vocabulary"
        return [unset("teacher.path", wrong, remedy)]
    if not read:
        wrong = f"nothing reads a teacher: loss={conf.loss} does not, and teacher.coef is 0"
        remedy = "set teacher.coef above 0, or loss=distill, or leave it out"
        given = {"teacher.path": keys.path is not None, "teacher.kl": keys.kl != "sampled"}
        return [problem(name, value_of(conf, name), wrong, remedy)
                for name, is_given in given.items() if is_given]  # fmt: skip
    if coef > 0 and keys.kl == "sampled" and "sequence_ratio" in loss.needs:
        wrong = (
            f"the ratio of loss={conf.loss} is one of a whole sequence, and this KL gives each of "
            "its tokens an advantage of its own"
        )
        remedy = "set teacher.kl=full, a term beside any loss, or use loss=dapo or grpo"
        found.append(problem("teacher.kl", keys.kl, wrong, remedy))
    return found + unrewarded_problems(conf, loss)


def unrewarded_problems(conf: Conf, loss: Loss) -> list[str]:
    """What changes rewards, where none is learned from."""
    if loss.teacher_coef == 0:
        return []
    given = {
        "advantage": conf.advantage is not None,
        **dict.fromkeys(leaving_out(conf), True),
        "length_penalty": conf.length_penalty > 0,
        "kl_in": conf.kl_in == "reward",
        "truncated_reward": conf.truncated_reward is not None,
    }
    wrong = f"loss={conf.loss} learns from the teacher alone, whatever the rewards are"
    remedy = "leave it out, or use a loss of rewards with teacher.coef"
    return [problem(name, value_of(conf, name), wrong, remedy)
            for name, is_given in given.items() if is_given]  # fmt: skip


TERMS: tuple[Callable[[Conf, Loss], list[str]], ...] = (
    advantage_problems,
    negative_problems,
    bound_problems,
    divergence_problems,
    importance_problems,
    length_problems,
    teacher_problems,
)
