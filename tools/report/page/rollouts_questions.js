// One evaluation question through time: its answers at every evaluation, beside each other.
"use strict";

Report.rolloutQuestions = (() => {
  const R = Report.groups;
  const T = Report.printable;
  const V = Report.levels;
  const el = Report.el;
  const DENSE = 24; // evaluations beyond which their squares are narrow
  const FIRST = 12; // evaluations that are shown before the others are asked for

  const list = () => Report.rolloutList;
  const group = () => Report.rolloutGroup;

  function samplesOf(question) {
    const ids = new Set(question.evaluations.flatMap((one) => one.rows.map((row) => row.sample_id)));
    return [...ids].sort((a, b) => a - b);
  }

  const nameOf = (id) => (id < 0 ? "greedy answer" : `sample ${id}`);
  const rowOf = (evaluation, id) => evaluation.rows.find((row) => row.sample_id === id);

  function chosenSample(question, state) {
    const ids = samplesOf(question);
    const wanted = state.get("answer");
    if (wanted === "all") return null;
    return ids.includes(Number(wanted)) && wanted !== "" ? Number(wanted) : ids[0];
  }

  // Consecutive evaluations with the same answer are one entry: {from, to, evaluation, changed}.
  function changes(question, id) {
    const said = (evaluation) =>
      JSON.stringify(
        evaluation.rows
          .filter((row) => id === null || row.sample_id === id)
          .map((row) => [R.saidIn(row), row.reward]),
      );
    const entries = [];
    for (const evaluation of question.evaluations) {
      const last = entries.at(-1);
      if (last && said(last.evaluation) === said(evaluation)) last.to = evaluation.step;
      else entries.push({from: evaluation.step, to: evaluation.step, evaluation});
    }
    return entries;
  }

  function entriesOf(question, id, show) {
    const every = question.evaluations.map((evaluation) => ({
      from: evaluation.step,
      to: evaluation.step,
      evaluation,
    }));
    if (show === "all") return every;
    if (show === "ends") return every.length > 1 ? [every[0], every.at(-1)] : every;
    return changes(question, id);
  }

  function square(evaluation, id, range) {
    const row = rowOf(evaluation, id);
    const said = row ? list().score(row.reward) : "not kept";
    const share = row ? list().shareOf(row.reward, range).toFixed(3) : 0;
    return el(
      "td",
      {title: `step ${evaluation.step}, ${nameOf(id)}: ${row ? "reward " : ""}${said}`},
      el("i", {class: row ? null : "absent", style: `--share:${share}`}),
      el("span", {class: "visually-hidden"}, said),
    );
  }

  // A line a sample, a square an evaluation; of many evaluations only some have their step above.
  function squares(question, {range}) {
    const {evaluations} = question;
    const dense = evaluations.length > DENSE;
    const every = dense ? Math.ceil(evaluations.length / 10) : 1;
    const steps = evaluations.map(({step}, at) =>
      at % every === 0
        ? el("th", {scope: "colgroup", colspan: Math.min(every, evaluations.length - at)}, String(step))
        : null,
    );
    const lines = samplesOf(question).map((id) =>
      el(
        "tr",
        {},
        el("th", {scope: "row"}, nameOf(id)),
        evaluations.map((one) => square(one, id, range)),
      ),
    );
    const head = el("thead", {}, el("tr", {}, el("th", {scope: "col"}, "step"), steps));
    const name = {tabindex: "0", role: "region", "aria-label": "Rewards at every evaluation"};
    return el(
      "div",
      {class: `ro-squares scroll${dense ? " dense" : ""}`, ...name},
      el("table", {}, head, el("tbody", {}, lines)),
    );
  }

  // Indices of the tokens of `row` that its answer of the entry before has not.
  function freshIn(row, earlier) {
    const before = earlier && rowOf(earlier.evaluation, row.sample_id);
    const [old, now] = [before, row].map((one) => one && V.tokensOf(one));
    if (!old || !now) return null;
    return new Set(
      Report.newTokens.freshIn(
        old.map((token) => token.text),
        now.map((token) => token.text),
      ),
    );
  }

  function column(entry, earlier, id, context) {
    const {evaluation, from, to} = entry;
    const marked = context.state.get("new") === "1";
    const rows = evaluation.rows.filter((row) => id === null || row.sample_id === id);
    const title = from === to ? `Step ${from}` : `Steps ${from}\u2013${to}`;
    const inside = {...context, hits: new Set(evaluation.rows), filtered: false};
    return el(
      "section",
      {class: "ro-column", "data-step": from, "aria-label": title},
      el(
        "header",
        {class: "ro-bar"},
        el("h4", {}, title),
        from === to ? null : el("span", {class: "ro-notes"}, "the same answer"),
        el(
          "button",
          {
            type: "button",
            class: "ro-small",
            title: "All answers of this evaluation",
            onclick: () => context.open(evaluation),
          },
          "Group",
        ),
      ),
      rows.length
        ? rows.map((row) =>
            group().answer(row, {
              ...inside,
              look: {...context.look, fresh: marked ? freshIn(row, earlier) : null},
            }),
          )
        : el("p", {class: "ro-none"}, "This answer was not kept here."),
    );
  }

  function columns(question, id, context) {
    const entries = entriesOf(question, id, context.state.get("times"));
    const all = (from, to) =>
      entries.slice(from, to).map((entry, at) => column(entry, entries[from + at - 1], id, context));
    const box = el(
      "div",
      {class: "ro-columns", tabindex: "0", role: "region", "aria-label": "Answers through time"},
      all(0, FIRST),
    );
    if (entries.length > FIRST) {
      const more = T.moreButton(`Show ${entries.length - FIRST} more`, () =>
        more.replaceWith(...all(FIRST, entries.length)),
      );
      box.append(more);
    }
    return box;
  }

  function pick(name, words, options, now, state) {
    const select = el(
      "select",
      {id: `rollouts-${name}`, onchange: (event) => state.set({[name]: event.target.value})},
      options.map(([value, title]) => el("option", {value}, title)),
    );
    select.value = now;
    return el("label", {class: "ro-inline"}, words, " ", select);
  }

  function choices(question, id, state) {
    const answers = [...samplesOf(question).map((one) => [String(one), nameOf(one)]), ["all", "all answers"]];
    const times = [
      ["", "where the answer changed"],
      ["all", "every evaluation"],
      ["ends", "first and last"],
    ];
    const marked = state.get("new") === "1";
    const mark = el(
      "button",
      {
        type: "button",
        id: "rollouts-new",
        class: "ro-small",
        "aria-pressed": String(marked),
        title: "Underline the tokens that the answer before does not have",
        onclick: () => state.set({new: marked ? "" : "1"}),
      },
      "Mark what is new",
    );
    return [
      mark,
      pick("answer", "answer", answers, id === null ? "all" : String(id), state),
      pick("times", "show", times, state.get("times"), state),
    ];
  }

  // The whole; `context` as in rollouts_group.js, and `open` shows a group.
  function draw(question, context) {
    const id = chosenSample(question, context.state);
    const {first, evaluations} = question;
    const name = `Question ${first.prompt_id}${question.set ? " of " + T.visible(question.set) : ""}`;
    return el(
      "div",
      {class: "ro-question", "data-question": question.id},
      el(
        "header",
        {class: "ro-title"},
        el("h3", {}, name),
        el(
          "span",
          {class: "ro-notes"},
          `${evaluations.length} ${evaluations.length === 1 ? "evaluation" : "evaluations"}, steps ${evaluations[0].step}\u2013${evaluations.at(-1).step}`,
        ),
        el("a", {class: "ro-link", href: context.link, title: "An address of this question"}, "link"),
      ),
      first.answer
        ? el(
            "p",
            {class: "ro-why"},
            "Expected answer: ",
            el("b", {dir: "auto"}, T.excerpt(R.text(first.answer), 300)),
          )
        : null,
      group().prompt(evaluations[0], context.state),
      squares(question, context),
      el("div", {class: "ro-bar"}, el("h4", {}, "Answers"), choices(question, id, context.state)),
      columns(question, id, context),
    );
  }

  return {changes, draw, entriesOf, samplesOf};
})();
