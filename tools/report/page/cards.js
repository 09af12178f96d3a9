// The card around a chart: title, legend with readings, enlarging, and what pointer and keys do.
"use strict";

Report.cards = (() => {
  const {el, svg} = Report;
  const SMALL = 150;
  const LARGE = 340;
  let numbers = 0;

  // ---- making one

  function stroke(spec, series) {
    return spec.stacked ? el("span", {class: "swatch", style: `--tone: ${series.tone}`})
      : Report.charts.stroke(series);
  }

  // A line of the legend for each label, with a reading for each run that has it.
  function legend(chart) {
    const {spec} = chart;
    const rows = new Map();
    spec.series.forEach((series, k) => {
      const label = series.short === undefined ? series.label : series.short;
      if (!rows.has(label)) rows.set(label, {label, key: series.key, parts: []});
      rows.get(label).parts.push([stroke(spec, series), chart.readings[k]]);
    });
    return el("ul", {class: "legend"}, [...rows.values()].map(({label, key, parts}) =>
      el("li", {"data-key": key, title: key}, parts.length > 1 || !label
        ? [label && el("span", {class: "label"}, label), parts.map((part) => el("span", {class: "part"}, part))]
        : [parts[0][0], el("span", {class: "label"}, label), parts[0][1]])));
  }

  // The label of a chart's only line, where it says more than the title: the name of a reward's part.
  function only({series: [{label}], title}) {
    const told = title.toLowerCase().includes(label.toLowerCase());
    return told ? null : el("p", {class: "note only"}, Report.breakable(label));
  }

  function heading(chart, buttons) {
    const {spec} = chart;
    const one = spec.series.length === 1;
    return el("figcaption", {},
      el("h4", {title: spec.help || null}, spec.title,
        spec.unit && !spec.percent && el("span", {class: "unit"}, " " + spec.unit)),
      one && chart.readings[0],
      el("span", {class: "controls"}, buttons));
  }

  function buttonsOf(chart) {
    const {id, title} = chart.spec;
    chart.logButton = chart.spansDecades && el("button", {type: "button", class: "small log",
      "data-keep": `log ${id}`, "aria-label": `Logarithmic scale: ${title}`,
      onclick: () => Report.state.toggle("log", id)}, "log");
    chart.largeButton = el("button", {type: "button", class: "small enlarge",
      "data-keep": `zoom ${id}`, onclick: () => Report.state.toggle("zoom", id)});
    return [chart.logButton, chart.largeButton];
  }

  function card(spec) {
    const chart = {spec, number: ++numbers, width: 0, height: SMALL,
      spansDecades: Report.scales.spansDecades(spec.series.map((series) => series.values))};
    chart.readings = spec.series.map(() => el("span", {class: "reading number"}));
    spec.series.forEach((series, k) => (chart.readings[k].dataset.run = series.run));
    chart.svg = svg("svg", {role: "img", tabindex: 0, "data-keep": `chart ${spec.id}`,
      onkeydown: (event) => key(chart, event)});
    listen(chart);
    chart.figure = el("figure", {class: "chart card", "data-chart": spec.id},
      heading(chart, buttonsOf(chart)),
      spec.help && el("p", {class: "about"}, spec.help),
      spec.series.length > 1 ? legend(chart) : only(spec),
      spec.note && el("p", {class: "note"}, spec.note),
      chart.svg, valuesOf(chart));
    Report.charts.live.add(chart);
    return chart.figure;
  }

  // ---- the numbers as a table, made when it is opened

  function valuesTable(spec) {
    const steps = [...new Set(spec.series.flatMap((series) => series.steps))].sort((a, b) => a - b);
    const cells = spec.series.map((series) =>
      new Map(series.steps.map((step, k) => [step, series.values[k]])));
    return Report.table(["step", ...spec.series.map((series) => series.label)],
      steps.map((step) => [step, ...cells.map((cell) => {
        const value = cell.get(step);
        return value === undefined || value === null ? "" : value;
      })]), {tall: true});
  }

  function valuesOf(chart) {
    const box = el("details", {class: "values", "data-keep": `values ${chart.spec.id}`},
      el("summary", {}, "Values"));
    box.addEventListener("toggle", () => {
      if (box.open && box.children.length === 1) box.append(valuesTable(chart.spec));
    });
    return box;
  }

  // ---- pointer and keys

  function stepUnder(chart, event) {
    const box = chart.svg.getBoundingClientRect();
    const place = (event.clientX - box.left) * (chart.width / box.width);
    const wanted = chart.plan.x.invert(Math.min(Math.max(place, chart.plan.left), chart.plan.right));
    let best = null;
    for (const series of chart.spec.series) {
      const found = Report.charts.at(series, wanted);
      if (found && (best === null || Math.abs(found.step - wanted) < Math.abs(best - wanted)))
        best = found.step;
    }
    return best;
  }

  let waiting = false;
  function focusOn(step) {
    if (Report.charts.focus === step) return;
    Report.charts.focus = step;
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      for (const chart of Report.charts.live) if (chart.plan) Report.charts.drawOver(chart);
    });
  }

  function mark(step) {
    const same = Report.charts.numberIn("mark") === step;
    Report.state.set({mark: same ? null : step});
  }

  // Dragging with a mouse chooses a range of steps, a click marks a step.
  function listen(chart) {
    let start = null;
    const box = chart.svg;
    box.addEventListener("pointermove", (event) => {
      if (start && event.buttons) drag(chart, start, event);
      focusOn(stepUnder(chart, event));
    });
    box.addEventListener("pointerleave", () => focusOn(null));
    box.addEventListener("pointerdown", (event) => {
      start = {x: event.clientX, step: stepUnder(chart, event)};
      focusOn(start.step);
    });
    box.addEventListener("pointerup", (event) => {
      const step = stepUnder(chart, event);
      const moved = start && Math.abs(event.clientX - start.x) > 12;
      if (moved && event.pointerType === "mouse" && step !== start.step) choose(start.step, step);
      else if (start && !moved && step !== null) mark(step);
      start = null;
      Report.charts.drawOver(chart);
    });
    box.addEventListener("dblclick", () => Report.state.set({from: null, to: null}));
  }

  function choose(one, other) {
    Report.state.set({from: Math.min(one, other), to: Math.max(one, other)});
  }

  function drag(chart, start, event) {
    if (event.pointerType !== "mouse") return;
    const p = chart.plan;
    const [left, right] = [start.step, stepUnder(chart, event)].map(p.x).sort((a, b) => a - b);
    Report.charts.drawOver(chart);
    chart.over.prepend(svg("rect", {class: "chosen", x: left, y: p.top, width: right - left,
      height: p.bottom - p.top}));
  }

  function key(chart, event) {
    const steps = [...new Set(chart.spec.series.flatMap((s) => s.steps))].sort((a, b) => a - b);
    const now = Report.charts.focus === null ? Report.charts.numberIn("mark") : Report.charts.focus;
    const place = now === null ? -1 : Report.scales.nearest(steps, now);
    const moves = {ArrowRight: place + 1, ArrowLeft: place < 0 ? steps.length - 1 : place - 1,
      Home: 0, End: steps.length - 1};
    if (event.key in moves) {
      const step = steps[Math.min(Math.max(moves[event.key], 0), steps.length - 1)];
      focusOn(step);
      Report.say(`Step ${step}: ` + chart.spec.series.map((series) =>
        `${series.label} ${Report.charts.withUnit(chart.spec, Report.charts.at(series, step)?.value)}`).join(", "));
    } else if (event.key === "Enter" && now !== null) mark(now);
    else if (event.key === "Escape") focusOn(null);
    else return;
    event.preventDefault();
  }

  // ---- sizes

  function dress(chart) {
    const large = Report.charts.isLarge(chart);
    chart.figure.classList.toggle("large", large);
    chart.height = large ? LARGE : SMALL;
    chart.svg.style.setProperty("--tall", chart.height + "px");
    chart.largeButton.textContent = large ? "\u2715" : "\u2922";
    chart.largeButton.setAttribute("aria-label", `${large ? "Shrink" : "Enlarge"} ${chart.spec.title}`);
    chart.largeButton.setAttribute("aria-pressed", large);
    chart.largeButton.title = large ? "Shrink" : "Enlarge";
    if (chart.logButton) chart.logButton.setAttribute("aria-pressed", Report.charts.isLog(chart));
  }

  // Draws all charts of an element: sizes are set, then read once, then used.
  function layout(within = document) {
    const charts = [...Report.charts.live].filter((chart) => {
      if (!chart.figure.isConnected) Report.charts.live.delete(chart);
      return within.contains(chart.figure);
    });
    charts.forEach(dress);
    charts.forEach((chart) => (chart.width = Math.max(120, chart.svg.clientWidth)));
    charts.forEach(Report.charts.draw);
  }

  let width = 0;
  window.addEventListener("resize", () => {
    if (!Report.charts || window.innerWidth === width) return; // the page may still be loading
    width = window.innerWidth;
    layout();
  });
  Report.state.listen((changed) => {
    if (["zoom", "log", "smooth", "from", "to"].some((name) => changed.has(name))) layout();
    else if (changed.has("mark")) Report.charts.live.forEach((chart) => Report.charts.drawOver(chart));
  });

  return {card, layout, focusOn};
})();
