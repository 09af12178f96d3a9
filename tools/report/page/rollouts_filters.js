// The filter bar of the rollout browser. What is chosen lives in the address.
"use strict";

Report.rolloutFilters = (() => {
  const R = Report.groups;
  const KEYS = ["step", "split", "set", "kept", "finish", "correct", "min", "max", "look", "q"];
  const KEPT = {
    best: "best of its step",
    worst: "worst of its step",
    random: "drawn at random",
    all: "every group is kept",
    fixed: "evaluation question",
    first: "first of its step",
  };
  const haystacks = new WeakMap();

  function haystack(row) {
    if (!haystacks.has(row)) haystacks.set(row, R.haystack(row));
    return haystacks.get(row);
  }

  // "10", "10-20", "10-", "-20", and several of them with commas.
  function stepTest(text) {
    const ranges = text.split(",").map((part) => /^\s*(\d*)\s*(?:([-\u2013])\s*(\d*))?\s*$/.exec(part));
    const bounds = ranges.filter((found) => found && (found[1] || found[3]));
    if (!bounds.length) return null;
    return (row) =>
      bounds.some(
        ([, low, dash, high]) =>
          row.step >= Number(low || 0) && row.step <= (dash ? Number(high || Infinity) : Number(low)),
      );
  }

  function limit(text) {
    const value = Number(text);
    return text.trim() !== "" && Number.isFinite(value) ? value : null;
  }

  const keptOf = (row) => row.chosen || (R.splitOf(row) === "eval" ? "fixed" : "first");

  const TESTS = {
    step: stepTest,
    split: (wanted) => (row) => R.splitOf(row) === wanted,
    set: (wanted) => (row) => R.splitOf(row) === "eval" && (row.set || "own") === wanted,
    kept: (wanted) => (row) => keptOf(row) === wanted,
    finish: (wanted) => (wanted === "truncated" ? R.isTruncated : (row) => row.finish_reason === wanted),
    correct: (wanted) => (row) => row.correct === (wanted === "yes"),
    min: (text) => (limit(text) === null ? null : (row) => row.reward >= limit(text)),
    max: (text) => (limit(text) === null ? null : (row) => row.reward <= limit(text)),
    look: (wanted) => (Object.hasOwn(R.SIGNS, wanted) ? R.SIGNS[wanted][2] : null),
    q: (text) => {
      const found = Report.printable.matcher(text);
      return (row) => found.test(haystack(row));
    },
  };

  // The test that a row has to pass, of all filters that are set but those in `without`.
  function testOf(state, without = []) {
    const tests = KEYS.filter((key) => !without.includes(key) && state.get(key))
      .map((key) => TESTS[key](state.get(key)))
      .filter(Boolean);
    return (row) => tests.every((test) => test(row));
  }

  // Groups with a row that passes: {group, hits}. A group is shown whole; `hits` says which rows were meant.
  function matching(groups, state) {
    const passes = testOf(state);
    return groups
      .map((group) => ({group, hits: new Set(group.rows.filter(passes))}))
      .filter(({hits}) => hits.size);
  }

  function sorted(found, state) {
    const keyOf = (R.SORTS[state.get("sort")] || R.SORTS["-step"])[1];
    const keys = new Map(found.map((one) => [one, keyOf(one.group)]));
    return [...found].sort((a, b) => compare(keys.get(a), keys.get(b)));
  }

  function compare(a, b) {
    const at = a.findIndex((value, index) => value !== b[index]);
    return at < 0 ? 0 : a[at] < b[at] ? -1 : 1;
  }

  const counted = (rows, of) =>
    rows.reduce((counts, row) => counts.set(of(row), (counts.get(of(row)) || 0) + 1), new Map());

  // Choices of a list: [value, words], from what the rows have.
  function choices(rows, key) {
    if (key === "split")
      return [
        ["train", "training"],
        ["eval", "evaluation"],
      ].filter(([value]) => rows.some((row) => R.splitOf(row) === value));
    if (key === "correct")
      return rows.some((row) => typeof row.correct === "boolean")
        ? [
            ["yes", "correct"],
            ["no", "not correct"],
          ]
        : [];
    if (key === "set")
      return [
        ...counted(
          rows.filter((row) => R.splitOf(row) === "eval"),
          (row) => row.set || "own",
        ),
      ].map(([value]) => [value, value === "own" ? "the run\u2019s own" : value]);
    if (key === "kept") return [...counted(rows, keptOf)].map(([value]) => [value, KEPT[value] || value]);
    const reasons = [...counted(rows, (row) => R.text(row.finish_reason))].filter(([value]) => value);
    const shown = reasons.map(([value, count]) => [value, `${value} (${Report.count(count)})`]);
    return reasons.some(([value]) => Object.hasOwn(R.CUT, value)) && reasons.length > 1
      ? [["truncated", "any truncation"], ...shown]
      : shown;
  }

  const LISTS = {split: "Split", set: "Set", kept: "Kept as", finish: "Finish reason", correct: "Correct"};

  function labelled(words, control) {
    return Report.el("label", {class: "ro-field"}, Report.el("span", {}, words), control);
  }

  function choice(key, change) {
    return Report.el("select", {
      id: `rollouts-${key}`,
      "data-filter": key,
      onchange: (event) => change({[key]: event.target.value}),
    });
  }

  function entry(key, type, change, more) {
    let waiting = 0;
    return Report.el("input", {
      id: `rollouts-${key}`,
      type,
      "data-filter": key,
      autocomplete: "off",
      spellcheck: "false",
      ...more,
      oninput: (event) => {
        clearTimeout(waiting);
        waiting = setTimeout(() => change({[key]: event.target.value}), type === "search" ? 150 : 250);
      },
      // Whoever goes on to the next filter is not waited for: drawing it would take back what is typed.
      onchange: (event) => {
        clearTimeout(waiting);
        change({[key]: event.target.value});
      },
    });
  }

  function fill(select, all, wanted) {
    const options = [["", "all"], ...all];
    if (wanted && !all.some(([value]) => value === wanted)) options.push([wanted, wanted]);
    const key = JSON.stringify(options);
    if (select.dataset.options !== key) {
      select.dataset.options = key;
      select.replaceChildren(...options.map(([value, words]) => Report.el("option", {value}, T(words))));
    }
    select.value = wanted;
    select.closest("label").hidden = all.length < 2 && !wanted;
  }

  const T = (words) => Report.printable.visible(words);

  // A step that is marked in the charts leads here: to its rollouts, or those of the nearest step that has some.
  function marked(rows, state, change) {
    const wanted = state.get("mark");
    const steps = rows.map((row) => row.step);
    if (!wanted || !Number.isFinite(Number(wanted)) || !steps.length) return null;
    const near = steps.reduce((best, step) =>
      Math.abs(step - wanted) < Math.abs(best - wanted) ? step : best,
    );
    if (state.get("step") === String(near)) return null;
    const words =
      near === Number(wanted) ? `Marked step ${near}` : `Step ${near}, near the marked ${Number(wanted)}`;
    return Report.el(
      "button",
      {type: "button", class: "ro-chip", id: "rollouts-mark", onclick: () => change({step: near})},
      words,
    );
  }

  function signs(rows, state, change, box) {
    const passes = testOf(state, ["look"]);
    const meant = rows.filter(passes);
    const buttons = Object.entries(R.SIGNS)
      .map(([key, [title, help, test]]) => {
        const count = meant.filter(test).length;
        const on = state.get("look") === key;
        if (!count && !on) return null;
        return Report.el(
          "button",
          {
            type: "button",
            class: "ro-chip",
            "data-look": key,
            "data-count": count,
            title: help,
            "aria-pressed": String(on),
            onclick: () => change({look: on ? "" : key}),
          },
          title,
          " ",
          Report.el("b", {}, Report.count(count)),
        );
      })
      .filter(Boolean);
    const step = marked(rows, state, change);
    box.hidden = !buttons.length && !step;
    const focused = box.contains(document.activeElement) ? document.activeElement.dataset.look : null;
    box.replaceChildren(
      Report.el("span", {class: "ro-label"}, "Look for"),
      ...buttons,
      ...(step ? [step] : []),
    );
    const again = focused && box.querySelector(`[data-look="${focused}"]`);
    if (again) again.focus();
  }

  // On a narrow screen all fields but the text are folded away.
  function unfold(button, node) {
    const open = node.classList.toggle("open");
    button.setAttribute("aria-expanded", String(open));
  }

  // The bar: {node, update(rows)}.
  // `change` takes over what the reader chose.
  function bar(state, change) {
    const lists = Object.keys(LISTS).map((key) => choice(key, change));
    const step = entry("step", "text", change, {placeholder: "10, 20-40", size: 9});
    const min = entry("min", "number", change, {
      placeholder: "from",
      step: "any",
      "aria-label": "Smallest reward",
    });
    const max = entry("max", "number", change, {
      placeholder: "to",
      step: "any",
      "aria-label": "Largest reward",
    });
    const words = entry("q", "search", change, {placeholder: "in prompts, answers, solutions"});
    const clear = Report.el(
      "button",
      {
        type: "button",
        id: "rollouts-clear",
        class: "ro-clear",
        onclick: () => change(Object.fromEntries(KEYS.map((key) => [key, ""]))),
      },
      "Clear filters",
    );
    const chips = Report.el("div", {class: "ro-chips", role: "group", "aria-label": "Look for"});
    const open = Report.el(
      "button",
      {
        type: "button",
        id: "rollouts-filters",
        class: "ro-open",
        "aria-expanded": "false",
        onclick: () => unfold(open, node),
      },
      "Filters",
    );
    const rewards = Report.el(
      "div",
      {class: "ro-field", role: "group", "aria-label": "Reward"},
      Report.el("span", {}, "Reward"),
      Report.el("span", {class: "ro-range"}, min, max),
    );
    const node = Report.el(
      "div",
      {class: "ro-filters", role: "search", "aria-label": "Filter rollouts"},
      Report.el(
        "div",
        {class: "ro-fields"},
        labelled("Text", words),
        open,
        labelled("Step", step),
        lists.map((list) => labelled(LISTS[list.dataset.filter], list)),
        rewards,
      ),
      Report.el("div", {class: "ro-bar"}, chips, clear),
    );

    function update(rows) {
      lists.forEach((list) => fill(list, choices(rows, list.dataset.filter), state.get(list.dataset.filter)));
      for (const input of [step, min, max, words]) {
        if (input !== document.activeElement) input.value = state.get(input.dataset.filter);
      }
      clear.disabled = !KEYS.some((key) => state.get(key));
      signs(rows, state, change, chips);
    }
    return {node, update};
  }

  return {KEPT, KEYS, bar, keptOf, matching, sorted, stepTest, testOf};
})();
