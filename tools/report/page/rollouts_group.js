// One group on the page: its prompt and all its answers, with rewards and coloured tokens.
"use strict";

Report.rolloutGroup = (() => {
  const R = Report.groups;
  const T = Report.printable;
  const V = Report.levels;
  const el = Report.el;
  const FIRST = 8; // answers that are shown before the others are asked for
  const WHY = {
    best: "Kept because its mean reward is the highest of its step.",
    worst: "Kept because its mean reward is the lowest of its step.",
    random: "Drawn at random from the groups of its step.",
    all: "Every group of the step is kept.",
    fixed: "An evaluation question, the same at every evaluation.",
    first: "One of the first groups of its step: this run did not choose.",
  };
  const ORDERS = {
    sample: ["sample", (row) => row.sample_id],
    "-reward": ["reward, high to low", (row) => -row.reward],
    reward: ["reward, low to high", (row) => row.reward],
    length: ["length, long to short", (row) => -(row.length ?? R.saidIn(row).length)],
  };

  const list = () => Report.rolloutList;
  const tokens = () => Report.rolloutTokens;
  const nameOf = (row) => (row.sample_id < 0 ? "greedy answer" : `sample ${row.sample_id}`);

  // A label and what it says; nothing where nothing is known.
  function fact(label, value, name) {
    if (value === null || value === undefined || value === "") return null;
    return el(
      "div",
      {class: "ro-fact", "data-fact": name || label},
      el("dt", {}, label),
      el("dd", {dir: "auto"}, value),
    );
  }

  // The reward of an evaluation's greedy answer, which is in none of the means.
  function greedy({rows, counted}) {
    const found = rows.find((row) => !counted.includes(row));
    return found ? `reward ${list().score(found.reward)}` : "";
  }

  // Means and counts are over the sampled answers.
  function factsOf(group) {
    const {counted, first} = group;
    const judged = counted.filter((row) => typeof row.correct === "boolean");
    const right = judged.filter((row) => row.correct).length;
    const cut = counted.filter(R.isTruncated).length;
    return el(
      "dl",
      {class: "ro-facts"},
      fact("expected answer", T.excerpt(R.text(first.answer), 300), "answer"),
      fact("mean reward", list().score(group.reward), "reward"),
      meansOfParts(counted),
      fact(
        "spread",
        counted.length > 1 && group.spread !== null ? "\u00b1 " + Report.number(group.spread, 3) : "",
        "spread",
      ),
      fact("correct", judged.length ? `${right} of ${judged.length}` : "", "correct"),
      fact("mean length", group.length === null ? "" : `${Report.number(group.length, 3)} ${group.length === 1 ? "token" : "tokens"}`, "length"),
      fact("truncated", cut ? `${cut} of ${counted.length}` : "none", "truncated"),
      fact("greedy answer", greedy(group), "greedy"),
      fact(
        "task\u2019s prompt id",
        first.task_prompt_id === undefined ? "" : String(first.task_prompt_id),
        "task",
      ),
    );
  }

  function meansOfParts(rows) {
    const names = new Set(rows.flatMap((row) => Object.keys(row.parts || {})));
    if (rows.length < 2) return null;
    return [...names].map((name) =>
      fact(
        `mean ${T.visible(name)}`,
        list().score(R.mean(rows.map((row) => (row.parts || {})[name]))),
        `part ${name}`,
      ),
    );
  }

  function turn(role, kind, ...content) {
    return el(
      "div",
      {class: `ro-turn ${kind}`, "data-role": role},
      el("div", {class: "ro-role"}, T.visible(role)),
      content,
    );
  }

  const kindOf = (role) =>
    role === "prompt" ? "user" : ["system", "user", "assistant", "tool"].includes(role) ? role : "reply";

  // The prompt as chat turns, and as the text that the model saw.
  function prompt(group, state) {
    const {first} = group;
    const query = state.get("q");
    const raw = state.get("raw") === "1" && first.prompt_text;
    const shown = raw
      ? [turn("as the model saw it", "raw", T.block(R.text(first.prompt_text), query))]
      : R.messagesOf(first).map((message) =>
          turn(message.role, kindOf(message.role), T.block(message.text, query)),
        );
    const button = first.prompt_text
      ? el(
          "button",
          {
            type: "button",
            id: "rollouts-raw",
            class: "ro-small",
            "aria-pressed": String(Boolean(raw)),
            onclick: () => state.set({raw: raw ? "" : "1"}),
          },
          "As the model saw it",
        )
      : null;
    return el(
      "section",
      {class: "ro-prompt", "aria-label": "Prompt"},
      el("div", {class: "ro-bar"}, el("h4", {}, "Prompt"), button),
      el("div", {class: "ro-turns"}, shown),
    );
  }

  // What the chosen colour says of a row, in words; tokens that it names are buttons.
  function words(row, look, reveal) {
    if (!look.measure || look.plain) return null;
    if (!V.tokensOf(row))
      return el("p", {class: "ro-words"}, "Not coloured: its token texts are not in this page.");
    const [begin, at, named, end] = V.wordsOf(look.measure, row);
    const link = named
      ? el("button", {type: "button", class: "ro-jump", onclick: () => reveal(at)}, named)
      : null;
    return el("p", {class: "ro-words", "data-measure": look.measure}, begin, link, end);
  }

  function answerTurn(row, said, look, tip) {
    const role = Array.isArray(row.messages) ? "assistant" : "answer";
    const label = said.sampled ? role : "reply of the task";
    const kind = said.sampled ? "assistant" : "tool";
    const coloured = look.measure && said.tokens && said.tokens.length;
    const body = coloured ? tokens().block(row, said, look, tip) : T.block(said.text, look.query);
    return {
      node: turn(label, kind, said.text || coloured ? body : el("p", {class: "ro-none"}, "(empty)")),
      body,
      tokens: coloured ? said.tokens : [],
    };
  }

  function rewardOf(row, range) {
    const share = list().shareOf(row.reward, range);
    return el(
      "span",
      {class: "ro-reward", title: `reward ${row.reward}`},
      el("span", {class: "ro-meter", "aria-hidden": "true"}, el("i", {style: `--share:${share.toFixed(3)}`})),
      "reward ",
      el("b", {"data-value": "reward"}, list().score(row.reward)),
    );
  }

  function verdict(row) {
    if (typeof row.correct !== "boolean") return null;
    return el(
      "span",
      {class: `pill ${row.correct ? "good" : "bad"}`, "data-value": "correct"},
      row.correct ? "\u2713 correct" : "\u2717 not correct",
    );
  }

  function finish(row) {
    if (!row.finish_reason) return null;
    const cut = R.isTruncated(row);
    return el(
      "span",
      {
        class: `pill ${cut ? "warn" : ""}`,
        "data-value": "finish",
        title: cut ? R.CUT[row.finish_reason] : `finish reason ${T.visible(R.text(row.finish_reason))}`,
      },
      cut ? `truncated: ${row.finish_reason}` : T.visible(R.text(row.finish_reason)),
    );
  }

  function partsOf(row) {
    return Object.entries(row.parts || {}).map(([name, value]) =>
      el(
        "span",
        {class: "ro-part", "data-part": name},
        T.visible(name),
        " ",
        el("b", {}, list().score(value)),
      ),
    );
  }

  function head(row, context) {
    const {range, hits, filtered} = context;
    const advantage = R.isNumber(row.advantage)
      ? el(
          "span",
          {class: `ro-advantage ${row.advantage < 0 ? "below" : row.advantage > 0 ? "above" : ""}`},
          "advantage ",
          el("b", {"data-value": "advantage"}, V.signed(row.advantage)),
        )
      : null;
    const signs = Object.entries(R.SIGNS).filter(
      ([key, [, , test]]) => ["loop", "hack", "unpaid", "empty"].includes(key) && test(row),
    );
    return el(
      "header",
      {class: "ro-head"},
      el("b", {class: "ro-name"}, nameOf(row)),
      rewardOf(row, range),
      advantage,
      verdict(row),
      finish(row),
      R.isNumber(row.length)
        ? el(
            "span",
            {class: "ro-part", "data-value": "length"},
            el("b", {}, Report.count(row.length)),
            row.length === 1 ? " token" : " tokens",
          )
        : null,
      partsOf(row),
      signs.map(([key, [title, help]]) =>
        el("span", {class: "pill warn", "data-sign": key, title: help}, title.toLowerCase()),
      ),
      row.left_out
        ? el(
            "span",
            {class: "pill", "data-value": "left-out"},
            `not trained on: ${T.visible(R.text(row.left_out))}`,
          )
        : null,
      row.cut
        ? el("span", {class: "ro-notes"}, `${Report.count(row.cut)} characters are left out of this page`)
        : null,
      filtered && !hits.has(row) ? el("span", {class: "ro-notes"}, "does not match the filters") : null,
    );
  }

  // One answer: its head, its turns, the colour in words, its tokens as a table.
  function answer(row, context) {
    const {look, tip, filtered, hits} = context;
    const turns = V.turnsOf(row).map((said) => answerTurn(row, said, look, tip));
    const reveal = (at) => {
      const found = turns.find((one) => one.tokens.some((token) => token.at === at));
      if (found) found.body.reveal(at);
    };
    return el(
      "article",
      {
        class: "ro-answer" + (filtered && !hits.has(row) ? " other" : ""),
        "data-sample": row.sample_id,
        "aria-label": nameOf(row),
      },
      head(row, context),
      el(
        "div",
        {class: "ro-turns"},
        turns.map((one) => one.node),
      ),
      el(
        "div",
        {class: "ro-foot"},
        words(row, look, reveal),
        V.tokensOf(row) ? Report.rolloutTable.table(row) : null,
      ),
    );
  }

  // Answers that the filters meant come first.
  function ordered(rows, order, hits) {
    const keyOf = (ORDERS[order] || ORDERS.sample)[1];
    const meant = (row) => Number(!hits.has(row));
    return [...rows].sort((a, b) => meant(a) - meant(b) || keyOf(a) - keyOf(b) || a.sample_id - b.sample_id);
  }

  function orderChoice(state) {
    const select = el(
      "select",
      {
        id: "rollouts-order",
        onchange: (event) => state.set({order: event.target.value === "sample" ? "" : event.target.value}),
      },
      Object.entries(ORDERS).map(([value, [title]]) => el("option", {value}, title)),
    );
    select.value = Object.hasOwn(ORDERS, state.get("order")) ? state.get("order") : "sample";
    return el("label", {class: "ro-inline"}, "order ", select);
  }

  function answers(group, context) {
    const rows = ordered(group.rows, context.state.get("order"), context.hits);
    const box = el(
      "div",
      {class: "ro-answers"},
      rows.slice(0, FIRST).map((row) => answer(row, context)),
    );
    if (rows.length > FIRST) {
      const more = T.moreButton(`Show ${rows.length - FIRST} more answers`, () =>
        more.replaceWith(...rows.slice(FIRST).map((row) => answer(row, context))),
      );
      box.append(more);
    }
    return box;
  }

  // The whole: what `found` = {group, hits} has, with `context` = {state, look, tip, range, filtered, link}.
  function draw({group, hits}, context) {
    const inside = {...context, hits};
    return el(
      "div",
      {class: "ro-group", "data-group": group.id},
      el(
        "header",
        {class: "ro-title"},
        el("h3", {}, list().where(group)),
        list().pill(group.chosen),
        el("a", {class: "ro-link", href: context.link, title: "An address of this group"}, "link"),
        Report.jump("curves", {mark: group.step}, "charts at this step"),
        context.question
          ? el(
              "button",
              {type: "button", class: "ro-small", id: "rollouts-time", onclick: context.question},
              "Through time",
            )
          : null,
      ),
      el(
        "p",
        {class: "ro-why"},
        WHY[group.chosen] || "",
        group.first.left_out ? " It was not trained on." : "",
      ),
      factsOf(group),
      prompt(group, context.state),
      el(
        "section",
        {class: "ro-samples", "aria-label": "Answers"},
        el(
          "div",
          {class: "ro-bar"},
          el("h4", {}, `${group.rows.length} ${group.rows.length === 1 ? "answer" : "answers"}`),
          group.rows.length > 1 ? orderChoice(context.state) : null,
        ),
        answers(group, inside),
      ),
    );
  }

  return {answer, draw, factsOf, nameOf, prompt};
})();
