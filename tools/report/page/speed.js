// Where the time of a step goes: seconds of each phase on top of each other, and the curves of speed.
"use strict";

Report.PHASES = ["generate", "exchange", "train", "sync", "eval", "checkpoint", "log"];
Report.phaseTone = (name) =>
  Report.PHASES.includes(name) ? `var(--phase-${name})` : "var(--phase-other)";

Report.stacks = (() => {
  const {svg} = Report;

  function totals(spec) {
    const {series} = spec;
    return series.length ? series[0].steps.map((_, k) =>
      series.reduce((sum, one) => sum + (one.values[k] || 0), 0)) : [];
  }

  // Half the way to the neighbours on both sides: bars touch, whatever the distance of steps.
  function edges(steps) {
    const middle = (k) => (steps[k] + steps[k - 1]) / 2;
    const first = steps.length > 1 ? middle(1) - steps[0] : 0.5;
    return steps.map((step, k) => [
      k ? middle(k) : step - first,
      k + 1 < steps.length ? middle(k + 1) : step + (k ? step - middle(k) : first),
    ]);
  }

  function draw(p, spec) {
    const below = spec.series.length ? spec.series[0].steps.map(() => 0) : [];
    const widths = below.length ? edges(spec.series[0].steps) : [];
    const gap = widths.length && (p.right - p.left) / widths.length > 8 ? 1 : 0;
    return spec.series.map((series) => {
      let path = "";
      series.values.forEach((value, k) => {
        if (!value) return;
        const [top, bottom] = [p.y(below[k] + value), p.y(below[k])];
        const [left, right] = widths[k].map(p.x);
        path += `M${left.toFixed(1)} ${bottom.toFixed(1)}V${top.toFixed(1)}H${(right - gap).toFixed(1)}V${bottom.toFixed(1)}Z`;
        below[k] += value;
      });
      const points = series.values.filter(Report.charts.finite).length;
      return svg("path", {class: "stack", d: path, style: `--tone: ${series.tone}`,
        "data-key": series.key, "data-run": series.run, "data-points": points});
    });
  }

  // From the left edge of the first bar to the right edge of the last.
  const range = (steps) => [edges(steps)[0][0], edges(steps)[steps.length - 1][1]];

  return {totals, draw, range};
})();

Report.speed = (() => {
  const {el} = Report;

  function phases(run, place, several) {
    const {steps, names, seconds} = run.speed.phases;
    if (!steps.length || !names.length) return null;
    return {
      id: several ? `phases-${place}` : "phases", stacked: true, range: Report.stacks.range(steps), unit: "s", percent: false,
      title: several ? `Seconds of each phase, ${run.name}` : "Seconds of each phase",
      help: "Each phase on its slowest rank, stacked. Where ranks run phases at once, a step is shorter than the sum.",
      series: names.map((name) => ({key: `seconds/${name}`, label: name, run: place, steps,
        values: seconds[name], tone: Report.phaseTone(name), dash: 0})),
    };
  }

  // One run: cards. Several: a table with a column for each.
  function facts(runs) {
    const told = runs.filter((run) => run.speed.facts.length);
    if (!told.length) return null;
    if (runs.length === 1) return Report.facts(told[0].speed.facts);
    const all = told.flatMap((run) => run.speed.facts);
    const notes = new Map(all.map(({label, note}) => [label, note]));
    const rows = [...notes].map(([label, note]) => [[label, note && el("span", {class: "muted"}, `, ${note}`)],
      ...runs.map((run) => (run.speed.facts.find((fact) => fact.label === label) || {value: "\u2013"}).value)]);
    return Report.table(["Speed", ...runs.map((run) => run.name)], rows, {keep: "speed-facts",
      classes: ["", ...runs.map(() => "number")]});
  }

  function section(runs) {
    const stacks = runs.map((run, k) => phases(run, k, runs.length > 1)).filter(Boolean);
    const curves = Report.curves.merged(runs, (run) => run.speed.curves)
      .filter(Report.curves.hasPoints);
    const said = facts(runs);
    if (!stacks.length && !curves.length && !said)
      return [Report.empty("No step was timed yet, so nothing can be said about speed.")];
    return [said, ...stacks.map(Report.cards.card), curves.length && Report.curves.groups(curves)]
      .filter(Boolean);
  }

  return {section};
})();
