// The curves of all runs, chart by chart, in the groups of the first run that has them.
"use strict";

Report.curves = (() => {
  const {el} = Report;
  const TONES = 8;
  Report.tone = (place) => `var(--s${(place % TONES) + 1})`;

  // Charts with one id are one chart. {id, group, title, ..., series of every run}
  function merged(runs, curvesOf) {
    const charts = new Map();
    runs.forEach((run, place) => {
      for (const curve of curvesOf(run)) {
        const id = curve.id;
        if (!charts.has(id)) charts.set(id, {...curve, series: [], runs: new Set()});
        const chart = charts.get(id);
        for (const series of curve.series) chart.series.push({...series, run: place});
        chart.runs.add(place);
      }
    });
    return [...charts.values()].map((chart) => dressed(chart, runs));
  }

  // Series that are equal in every point take turns along their line, so that each is seen:
  // twin = [which of them it is, how many there are].
  function twins(all) {
    const equal = new Map();
    for (const series of all) {
      const points = JSON.stringify([series.steps, series.values, series.low, series.high]);
      equal.set(points, [...(equal.get(points) || []), series]);
    }
    for (const same of equal.values())
      if (same.length > 1) same.forEach((series, k) => (series.twin = [k, same.length]));
  }

  // One run: a colour for each key. Several: a colour for each run, and dashes tell keys apart.
  function dressed(chart, runs) {
    const keys = [...new Set(chart.series.map((series) => series.key))];
    const several = runs.length > 1;
    chart.series = chart.series.map((series) => {
      const key = keys.indexOf(series.key);
      const [tone, dash] = several ? [series.run, key + Math.floor(series.run / TONES)] : [key, Math.floor(key / TONES)];
      const name = runs[series.run].name;
      if (!several) return {...series, tone: Report.tone(tone), dash};
      const [label, short] = keys.length > 1 ? [`${series.label}, ${name}`, series.label] : [name, ""];
      return {...series, label, short, tone: Report.tone(tone), dash};
    });
    twins(chart.series);
    const names = [...chart.runs].map((place) => runs[place].name);
    chart.note = names.length < runs.length ? "Only in " + names.join(", ") : "";
    return chart;
  }

  const hasPoints = (chart) => chart.series.some((series) => series.steps.length > 0);

  function grouped(charts) {
    const groups = new Map();
    for (const chart of charts) {
      if (!groups.has(chart.group)) groups.set(chart.group, []);
      groups.get(chart.group).push(chart);
    }
    return [...groups];
  }

  function group([name, charts]) {
    return el("div", {class: "group", "data-group": name, style: `--n: ${charts.length}`},
      name && el("h3", {}, name), charts.map(Report.cards.card));
  }

  const groups = (charts) => el("div", {class: "groups"}, grouped(charts).map(group));

  function runsLegend(runs) {
    return el("ul", {class: "legend runs-legend", "aria-label": "Runs"}, runs.map((run, place) =>
      el("li", {}, Report.charts.stroke({tone: Report.tone(place), dash: 0}), run.name)));
  }

  function smoothing() {
    const now = Report.state.get("smooth", "0");
    const choices = [["0", "none"], ["5", "5 steps"], ["20", "20 steps"], ["50", "50 steps"]];
    return el("label", {class: "controls"}, "Smoothing",
      el("select", {id: "smooth", "data-keep": "smooth",
        onchange: (event) => Report.state.set({smooth: event.target.value === "0" ? null : event.target.value})},
        choices.map(([value, text]) => el("option", {value, selected: value === now}, text))));
  }

  function toolbar(runs) {
    return el("div", {class: "toolbar"},
      runs.length > 1 && runsLegend(runs), smoothing(),
      el("label", {class: "controls"}, "Metric", el("input", {type: "search", id: "metrics-search",
        "data-keep": "metrics-search", value: Report.state.get("metric"),
        oninput: (event) => Report.state.set({metric: event.target.value})})),
      el("span", {class: "muted controls"}, "A click or a tap marks a step, dragging with the mouse chooses a range."));
  }

  function section(runs) {
    const charts = merged(runs, (run) => run.curves).filter(hasPoints);
    if (!charts.length) return [Report.empty("No metrics were recorded yet, so there are no curves.")];
    return [toolbar(runs), groups(charts),
      el("p", {class: "empty", id: "metrics-none", hidden: true}, "No metric matches this search.")];
  }

  // The charts whose title, group or a metric has the text that the reader searches for.
  function filter() {
    const text = Report.state.get("metric").toLowerCase();
    const all = document.querySelectorAll("#curves .group");
    let shown = 0;
    for (const box of all) {
      const charts = [...box.querySelectorAll(".chart")];
      for (const chart of charts) chart.hidden = !searched(box, chart).includes(text);
      const kept = charts.filter((chart) => !chart.hidden).length;
      box.hidden = kept === 0;
      box.style.setProperty("--n", kept);
      shown += kept;
    }
    if (!all.length) return;
    document.getElementById("metrics-none").hidden = shown > 0;
    Report.cards.layout(document.getElementById("curves"));
  }

  function searched(box, chart) {
    const keys = [...chart.querySelectorAll("path.line")].map((path) => path.dataset.key);
    return [box.dataset.group, chart.querySelector("h4").textContent, ...keys].join("\n").toLowerCase();
  }

  Report.state.listen((changed) => changed.has("metric") && filter());

  return {merged, section, hasPoints, groups, filter};
})();

// The mean of the values in the `window` steps around each place, as many steps before it as after; gaps
// stay gaps. A thinned curve has fewer points than steps.
Report.runningMean = (steps, values, window) => values.map((value, k) => {
  if (!Report.charts.finite(value)) return null;
  const side = Math.min(Math.floor(window / 2), steps[k] - steps[0], steps[steps.length - 1] - steps[k]);
  let [first, last] = [k, k];
  while (first > 0 && steps[k] - steps[first - 1] <= side) first--;
  while (last < steps.length - 1 && steps[last + 1] - steps[k] <= side) last++;
  const kept = values.slice(first, last + 1).filter(Report.charts.finite);
  return kept.reduce((sum, one) => sum + one, 0) / kept.length;
});
