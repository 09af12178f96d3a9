// The index of the rollout browser: groups, steps with their best, typical and worst group, or
// evaluation questions, one entry each.
"use strict";

Report.rolloutList = (() => {
  const R = Report.groups;
  const T = Report.printable;
  const BARS = 32;

  const score = (value) => (R.isNumber(value) ? Report.number(value, 3) : "\u2013");

  // The place of a reward between the smallest and the largest of the run, 0 to 1.
  function shareOf(reward, {low, high}) {
    return R.isNumber(reward) && high > low ? (reward - low) / (high - low) : 0;
  }

  // Rewards of a group as small bars, between the smallest and the largest reward of the run.
  function strip(rows, range) {
    const shown = rows.slice(0, BARS);
    const bars = shown.map((row) => {
      const share = shareOf(row.reward, range);
      const kind = R.isTruncated(row) ? "cut" : row.correct === true ? "right" : "";
      const greedy = row.sample_id < 0 && rows.length > 1 ? "greedy" : "";
      return Report.el("i", {class: [kind, greedy].filter(Boolean).join(" ") || null, style: `--share:${share.toFixed(3)}`});
    });
    const words =
      `rewards ${shown.map((row) => (row.sample_id < 0 ? "greedy " : "") + score(row.reward)).join(", ")}` +
      (rows.length > BARS ? ` and ${rows.length - BARS} more` : "");
    return Report.el("span", {class: "ro-strip", role: "img", "aria-label": words, title: words}, bars);
  }

  function rangeOf(rows) {
    const rewards = rows.map((row) => row.reward).filter(R.isNumber);
    return {low: Math.min(0, -R.largest(rewards.map((value) => -value))), high: R.largest(rewards)};
  }

  const pill = (chosen) =>
    Report.el("span", {class: `pill ro-kept ${chosen}`}, chosen === "fixed" ? "question" : T.visible(chosen));

  function where(group) {
    const name =
      group.split === "eval"
        ? `evaluation${group.set ? " " + T.visible(group.set) : ""}, step ${group.step}`
        : `step ${group.step}`;
    return `${name} \u00b7 prompt ${group.first.prompt_id}`;
  }

  function notes({group, hits}) {
    const cut = group.rows.filter(R.isTruncated).length;
    return [
      hits.size < group.rows.length
        ? `${hits.size} of ${group.rows.length} match`
        : `${group.rows.length} ${group.rows.length === 1 ? "answer" : "answers"}`,
      cut ? `${cut} truncated` : "",
      group.first.left_out ? "not trained on" : "",
    ]
      .filter(Boolean)
      .join(" \u00b7 ");
  }

  // An entry that chooses {[name]: id}: a text between two lines.
  function entry(name, id, context, above, text, below) {
    return Report.el(
      "li",
      {},
      Report.el(
        "button",
        {
          type: "button",
          class: "ro-item",
          [`data-${name}`]: id,
          onclick: () => context.choose({[name]: id}),
        },
        Report.el("span", {class: "ro-item-top"}, above),
        Report.el("span", {class: "ro-item-text", dir: "auto"}, T.excerpt(text)),
        Report.el("span", {class: "ro-item-top"}, below),
      ),
    );
  }

  function groupEntry(found, context) {
    const {group} = found;
    const above = [Report.el("b", {}, where(group)), pill(group.chosen)];
    const below = [
      strip(group.rows, context.range),
      Report.el("span", {class: "ro-mean"}, score(group.reward)),
      Report.el("span", {class: "ro-notes"}, notes(found)),
    ];
    return entry("group", group.id, context, above, group.question, below);
  }

  function stepCell(kind, group, context) {
    if (!group) return Report.el("span", {class: "ro-cell empty", "data-kind": kind}, "\u2013");
    const words = `${kind} group of step ${group.step}: mean reward ${score(group.reward)}`;
    return Report.el(
      "button",
      {
        type: "button",
        class: "ro-cell",
        "data-kind": kind,
        "data-group": group.id,
        "aria-label": words,
        title: `${words}\n${T.excerpt(group.question)}`,
        onclick: () => context.choose({group: group.id}),
      },
      Report.el("span", {class: "ro-mean"}, score(group.reward)),
      strip(group.rows.slice(0, 12), context.range),
    );
  }

  function stepEntry(step, context) {
    return Report.el(
      "li",
      {class: "ro-step-line", "data-step": step.step},
      Report.el("b", {}, String(step.step)),
      stepCell("best", step.best, context),
      stepCell("typical", step.typical, context),
      stepCell("worst", step.worst, context),
    );
  }

  function questionEntry(question, context) {
    const {evaluations} = question;
    const [first, last] = [evaluations[0], evaluations.at(-1)];
    const path = `${evaluations.length} ${evaluations.length === 1 ? "evaluation" : "evaluations"}`;
    const name = `question ${question.first.prompt_id}${question.set ? " of " + T.visible(question.set) : ""}`;
    const rewards = [...new Set([first, last])].map((group) => score(group.reward));
    const above = [Report.el("b", {}, name), Report.el("span", {class: "ro-notes"}, path)];
    const below = [
      means(evaluations, context.range),
      Report.el("span", {class: "ro-mean"}, rewards.join(" \u2192 ")),
    ];
    return entry("question", question.id, context, above, question.question, below);
  }

  // Mean rewards of an evaluation question through time.
  function means(evaluations, range) {
    const every = Math.ceil(evaluations.length / BARS);
    const shown = evaluations.filter((_, at) => at % every === 0 || at === evaluations.length - 1);
    return strip(
      shown.map((group) => ({reward: group.reward})),
      range,
    );
  }

  const VIEWS = {
    groups: {title: "Groups", entry: groupEntry, none: "No rollout matches the filters."},
    steps: {title: "Steps", entry: stepEntry, none: "No step has a group that matches the filters."},
    questions: {
      title: "Through time",
      entry: questionEntry,
      none: "No evaluation question matches the filters.",
    },
  };

  return {VIEWS, pill, rangeOf, score, shareOf, strip, where};
})();
