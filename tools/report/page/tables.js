// Tables: configuration, comparison, environment; profiles as they were printed.
"use strict";

// Rows of values or nodes; the first cell heads its row. Wide tables scroll inside their frame.
Report.table = (headers, rows, {tall = false, keep = "", label = "", classes = []} = {}) => {
  const {el} = Report;
  const head = el("thead", {}, el("tr", {}, headers.map((text) => el("th", {scope: "col"}, text))));
  const body = el("tbody", {}, rows.map((row) => el("tr", {}, row.map((cell, k) =>
    el(k ? "td" : "th", {class: classes[k], scope: k ? null : "row"},
      typeof cell === "string" ? Report.breakable(cell) : cell)))));
  return el("div", {class: tall ? "scroll tall" : "scroll", tabindex: 0, role: "region",
    "aria-label": label || headers.join(", "), "data-keep": keep || null},
    el("table", {class: headers.length > 2 ? "columns" : null}, head, body));
};

Report.configuration = (() => {
  const {el} = Report;

  function row(entry) {
    return el("tr", {class: entry.changed ? "changed" : "", "data-key": entry.key},
      el("th", {class: "key", scope: "row"}, Report.breakable(entry.key)),
      el("td", {class: "value"}, Report.breakable(entry.value),
        entry.earlier !== undefined && el("span", {class: "earlier"}, `, first ${entry.earlier}`)),
      el("td", {class: "value default"}, entry.changed ? entry.default : ""),
      el("td", {class: "help"}, entry.help));
  }

  // The rows that the reader asks for: a text in key, value or help; only those that differ.
  function filter() {
    const table = document.getElementById("settings-table");
    if (!table) return;
    const text = Report.state.get("settings").toLowerCase();
    const only = Report.state.get("changed") === "1";
    let shown = 0;
    for (const one of table.querySelectorAll("tbody tr")) {
      const fits = (!only || one.classList.contains("changed")) &&
        one.textContent.toLowerCase().includes(text);
      one.hidden = !fits;
      shown += fits;
    }
    const all = table.querySelectorAll("tbody tr").length;
    document.getElementById("settings-count").textContent = `${shown} of ${all} keys`;
    document.getElementById("settings-none").hidden = shown > 0;
  }

  function toolbar(config) {
    const changed = config.filter((entry) => entry.changed).length;
    return el("div", {class: "toolbar controls"},
      el("label", {}, "Search", el("input", {type: "search", id: "settings-search",
        "data-keep": "settings-search", value: Report.state.get("settings"),
        oninput: (event) => Report.state.set({settings: event.target.value})})),
      el("label", {}, el("input", {type: "checkbox", id: "settings-changed",
        "data-keep": "settings-changed", checked: Report.state.get("changed") === "1",
        onchange: (event) => Report.state.set({changed: event.target.checked ? "1" : null})}),
        `Changed only (${changed})`),
      el("span", {id: "settings-count", class: "muted", role: "status"}));
  }

  function section(run) {
    if (!run.config.length)
      return [Report.empty("The run directory has no resolved configuration (config.yaml).")];
    const heads = ["Key", "Value", "Default", "Meaning"];
    return [toolbar(run.config),
      el("div", {class: "scroll tall", tabindex: 0, role: "region", "aria-label": "Configuration",
        "data-keep": "settings"},
        el("table", {id: "settings-table"},
          el("thead", {}, el("tr", {}, heads.map((text) => el("th", {scope: "col"}, text)))),
          el("tbody", {}, run.config.map(row)))),
      el("p", {class: "empty", id: "settings-none", hidden: true}, "No key matches this search.")];
  }

  Report.state.listen((changed) => {
    if (changed.has("settings") || changed.has("changed")) filter();
  });
  return {section, filter};
})();

Report.comparison = (() => {
  const {el} = Report;

  // The step, the metric and its value in each run; the sentence about it stands above.
  function difference(found, names) {
    if (!found) return null;
    const values = found.values.map((value, k) => `${shown(value)} (${names[k]})`).join(", ");
    return el("p", {class: "card first-difference"}, el("strong", {}, "First difference: "),
      Report.jump("curves", {mark: found.step}, `step ${found.step}`),
      found.metric && [", ", el("code", {}, found.metric), ": ", values]);
  }

  function differing(table) {
    for (const row of table.querySelectorAll("tbody tr")) {
      const texts = [...row.querySelectorAll("td")].map((cell) => cell.textContent);
      if (new Set(texts).size > 1) row.classList.add("differs");
    }
    return table;
  }

  const shown = (value) => typeof value === "number" ? Report.number(value, 8)
    : value === null || value === undefined ? "\u2013" : String(value);

  function section(comparison, runs) {
    const names = runs.map((run) => run.name);
    const classes = ["key", ...names.map(() => "value")];
    const results = comparison.results.map((row) => [row.label, ...row.values.map(shown)]);
    const config = comparison.config.map((row) => [row.key, ...row.values.map(shown)]);
    return [comparison.text && el("p", {class: "said"}, comparison.text),
      difference(comparison.first_difference, names),
      el("h3", {}, "Results"),
      results.length ? differing(Report.table(["Result", ...names], results, {classes: ["", ...classes.slice(1)], keep: "results"}))
        : Report.empty("The runs have no result in common that could be compared."),
      el("h3", {}, "Configuration that differs"),
      config.length ? Report.table(["Key", ...names], config, {classes, keep: "config-differs"})
        : Report.empty("The configurations are the same.")].filter(Boolean);
  }

  return {section};
})();

Report.environment = (run) => {
  const {el} = Report;
  const rows = run.environment.map(({label, value}) => [label, value]);
  const profiles = run.profiles.map(({name, text}) => el("details", {class: "profile",
    "data-keep": `profile ${name}`}, el("summary", {}, name), el("pre", {tabindex: 0}, text)));
  return [rows.length ? Report.table(["What", "Value"], rows, {keep: "environment", classes: ["", "value wide"]})
    : Report.empty("The run did not record its environment, or it was left out."),
  el("h3", {id: "profiles"}, "Profiles"),
  ...(profiles.length ? profiles
    : [Report.empty("No step was profiled. profile.steps=[3] records one.")])];
};
