// Line charts. All charts share the step under the pointer, the marked step and the range of steps.
//
// A specification: {id, title, unit, help, percent, series: [{key, label, run, tone, dash, steps,
// values, low, high}], stacked}. A tone is a CSS colour, a dash 0 to 3. Tests find: figure.chart[data-chart=ID], in it path.line[data-key][data-run]
// [data-points], path.band, path.dots, .legend li[data-key], button.enlarge, button.log.
"use strict";

Report.charts = (() => {
  const {el, svg} = Report;
  const live = new Set();
  const MOST_BANDS = 6;
  let focus = null;

  const finite = (value) => value !== null && value !== undefined && Number.isFinite(value);
  const format = (spec, value, more = 0) =>
    spec.percent ? Report.percent(value, 3 + more) : Report.number(value, 4 + more);
  const withUnit = (spec, value) =>
    format(spec, value) + (finite(value) && spec.unit && !spec.percent ? "\u2009" + spec.unit : "");

  // ---- what is asked for in the address

  const isLarge = (chart) => Report.state.has("zoom", chart.spec.id);
  const isLog = (chart) => chart.spansDecades && Report.state.has("log", chart.spec.id);
  const numberIn = (name) => {
    const value = Report.state.get(name);
    return value !== "" && Number.isFinite(Number(value)) ? Number(value) : null;
  };

  // ---- geometry

  function steps(chart) {
    const range = chart.spec.range || Report.scales.extent(chart.spec.series.map((s) => s.steps));
    const from = numberIn("from");
    const to = numberIn("to");
    if (from !== null && to !== null && from < to) return [from, to];
    return range[0] === range[1] ? [range[0] - 1, range[1] + 1] : range;
  }

  function visible(series, [first, last]) {
    const within = series.steps.map((step) => step >= first && step <= last);
    const lists = [series.values, series.low, series.high].filter(Boolean);
    return lists.map((list) => list.filter((_, k) => within[k]));
  }

  // As many digits as tell all ticks apart.
  function tickLabels(spec, ticks) {
    for (let more = 0; ; more++) {
      const labels = ticks.map((tick) => format(spec, tick, more));
      if (new Set(labels).size === ticks.length || more > 8) return labels;
    }
  }

  function plan(chart) {
    const {spec} = chart;
    const x = steps(chart);
    const found = Report.scales.extent(spec.stacked ? [[0], Report.stacks.totals(spec)]
      : spec.series.flatMap((series) => visible(series, x)));
    const log = isLog(chart) && found !== null;
    const y = log ? [found[0] * 0.9, found[1] * 1.1] : Report.scales.roomy(found || [0, 1], spec.percent);
    const tall = chart.height;
    const yTicks = log ? Report.scales.logTicks(...y) : Report.scales.ticks(...y, tall > 200 ? 8 : 5);
    const labels = tickLabels(spec, yTicks);
    const left = 12 + 6.6 * Math.max(3.5, ...labels.map((label) => label.length));
    const right = chart.width - 12;
    const make = log ? Report.scales.logarithmic : Report.scales.linear;
    return {
      x: Report.scales.linear(...x, left, right),
      y: make(...y, tall - 22, 8),
      range: x, left, right, top: 8, bottom: tall - 22, yTicks, labels,
      xTicks: Report.scales.stepTicks(...x, Math.max(2, Math.floor(chart.width / 80))),
    };
  }

  // ---- shapes

  const point = (p, step, value) => p.x(step).toFixed(1) + " " + p.y(value).toFixed(1);

  // A line for each stretch without gaps.
  function linePath(p, series, values) {
    let path = "";
    let pen = "M";
    for (let k = 0; k < values.length; k++) {
      if (!finite(values[k])) pen = "M";
      else {
        path += pen + point(p, series.steps[k], values[k]);
        pen = "L";
      }
    }
    return path;
  }

  function bandPath(p, series) {
    let path = "";
    for (let k = 0, first = 0; k <= series.steps.length; k++) {
      if (k < series.steps.length && finite(series.low[k]) && finite(series.high[k])) continue;
      const places = Array.from({length: k - first}, (_, i) => first + i);
      if (places.length > 1) {
        const up = places.map((i) => point(p, series.steps[i], series.high[i]));
        const down = places.reverse().map((i) => point(p, series.steps[i], series.low[i]));
        path += "M" + [...up, ...down].join("L") + "Z";
      }
      first = k + 1;
    }
    return path;
  }

  // Whiskers where an interval has no neighbour to make a band with: a point between gaps.
  function whiskers(p, series) {
    const known = series.steps.map((_, k) => finite(series.low[k]) && finite(series.high[k]));
    return series.steps.map((step, k) => known[k] && !known[k - 1] && !known[k + 1]
      ? "M" + point(p, step, series.low[k]) + "L" + point(p, step, series.high[k]) : "").join("");
  }

  // Dots where points are ten pixels apart, and always where a point has no neighbour.
  function dotPath(p, {steps, values}) {
    const last = steps.length - 1;
    const few = p.x(steps[last]) - p.x(steps[0]) > 10 * last;
    let path = "";
    for (let k = 0; k <= last; k++) {
      if (!finite(values[k])) continue;
      const alone = !finite(values[k - 1]) && !finite(values[k + 1]);
      if (few || alone) path += "M" + point(p, steps[k], values[k]) + "h0";
    }
    return path;
  }

  function smoothed(series) {
    const window = Number(Report.state.get("smooth", "0"));
    if (!(window > 1) || series.values.length < Math.max(50, 3 * window)) return null;
    return Report.runningMean(series.steps, series.values, window);
  }

  // Dashes tell the keys of several runs apart; they go back and forth between equal lines.
  const DASHES = ["", "6 3", "2 3", "9 3 2 3", "14 4", "4 2 1 2 1 2"];
  const TURN = 7; // pixels

  function dashes({dash, twin}) {
    if (!twin) return {"stroke-dasharray": DASHES[dash % DASHES.length]};
    const [which, count] = twin;
    if (which === 0) return {};
    return {"stroke-dasharray": `${TURN} ${TURN * (count - 1)}`, "stroke-dashoffset": -TURN * which};
  }

  // A piece of a line, for a legend.
  const stroke = ({tone, dash}) => svg("svg", {class: "stroke", width: dash ? 30 : 18, height: 4,
    "aria-hidden": "true", style: `--tone: ${tone}`, "data-dash": dash % DASHES.length},
  svg("path", {d: `M0 2H${dash ? 30 : 18}`, ...dashes({dash})}));

  // The series whose intervals are drawn: those of equal lines once, and in a small chart with many,
  // which would hide each other, those of the first key.
  function withIntervals(chart) {
    const {series} = chart.spec;
    const shown = series.filter((one) => one.low && !(one.twin && one.twin[0]));
    if (shown.length <= MOST_BANDS || isLarge(chart)) return new Set(shown);
    return new Set(shown.filter((one) => one.key === series[0].key));
  }

  function drawSeries(p, series, interval) {
    const style = `--tone: ${series.tone}`;
    const mean = smoothed(series);
    const points = series.values.filter(finite).length;
    const line = (values, name, extra) => svg("path", {
      class: name, d: linePath(p, series, values), ...dashes(series), ...extra});
    const about = {"data-key": series.key, "data-run": series.run, "data-points": points};
    return svg("g", {style, class: mean ? "series faint" : "series"},
      interval && svg("path", {class: "band", d: bandPath(p, series)}),
      interval && svg("path", {class: "whiskers", d: whiskers(p, series)}),
      line(series.values, "line", about),
      !(series.twin && series.twin[0]) && svg("path", {class: "dots", d: dotPath(p, series)}),
      mean && line(mean, "mean", {}));
  }

  // What the lower axis counts, at its beginning, where the first number leaves room.
  function axisName(p) {
    const first = p.xTicks.length ? p.x(p.xTicks[0]) - 3.3 * Report.number(p.xTicks[0]).length : Infinity;
    const end = Math.min(p.left - 3, first - 5);
    return end >= 23 ? svg("text", {class: "axis", x: end, y: p.bottom + 16, "text-anchor": "end"}, "step") : null;
  }

  function drawAxes(chart, p) {
    const grid = p.yTicks.map((tick) =>
      svg("path", {class: tick === 0 ? "zero" : "rule", d: `M${p.left} ${p.y(tick).toFixed(1)}H${p.right}`}));
    const numbers = p.yTicks.map((tick, k) =>
      svg("text", {x: p.left - 6, y: p.y(tick) + 4, "text-anchor": "end"}, p.labels[k]));
    const below = p.xTicks.map((tick) =>
      svg("text", {x: p.x(tick), y: p.bottom + 16, "text-anchor": "middle"}, Report.number(tick)));
    return svg("g", {class: "axes", "aria-hidden": "true"}, grid, numbers, below, axisName(p));
  }

  function summary(spec) {
    const parts = spec.series.map((series) => {
      const values = series.values.filter(finite);
      const range = Report.scales.extent([values]);
      if (!range) return `${series.label}: no values`;
      return `${series.label}: ${values.length} points, first ${withUnit(spec, values[0])}, ` +
        `last ${withUnit(spec, values[values.length - 1])}, ` +
        `lowest ${withUnit(spec, range[0])}, highest ${withUnit(spec, range[1])}`;
    });
    return `${spec.title}. ${parts.join("; ")}. Arrow keys move the step.`;
  }

  // ---- one chart

  function draw(chart) {
    const {spec} = chart;
    chart.plan = plan(chart);
    const p = chart.plan;
    const intervals = withIntervals(chart);
    const clip = "clip-" + chart.number;
    const box = {x: p.left - 4, y: 0, width: Math.max(0, p.right - p.left + 8), height: p.bottom + 4};
    chart.over = svg("g", {class: "over", "aria-hidden": "true"});
    chart.svg.setAttribute("viewBox", `0 0 ${chart.width} ${chart.height}`);
    chart.svg.setAttribute("aria-label", summary(spec));
    chart.svg.replaceChildren(
      svg("clipPath", {id: clip}, svg("rect", box)),
      drawAxes(chart, p),
      svg("g", {"clip-path": `url(#${clip})`}, spec.stacked
        ? Report.stacks.draw(p, spec) : spec.series.map((series) => drawSeries(p, series, intervals.has(series)))),
      chart.over);
    drawOver(chart);
  }

  function upright(chart, step, name) {
    const p = chart.plan;
    if (step === null || step < p.range[0] || step > p.range[1]) return null;
    const place = p.x(step).toFixed(1);
    const text = Math.min(Math.max(p.x(step), p.left + 12), p.right - 12);
    return svg("g", {class: name},
      svg("path", {d: `M${place} ${p.top}V${p.bottom}`}),
      svg("text", {x: text, y: p.bottom + 16, "text-anchor": "middle"}, Report.count(step)));
  }

  // The nearest point of a series that has a value.
  function at(series, step) {
    if (!series.known) {
      const kept = series.steps.map((_, k) => k).filter((k) => finite(series.values[k]));
      series.known = {places: kept, steps: kept.map((k) => series.steps[k])};
    }
    if (!series.known.places.length) return null;
    const place = series.known.places[Report.scales.nearest(series.known.steps, step)];
    return {step: series.steps[place], value: series.values[place], place};
  }

  function drawOver(chart) {
    const p = chart.plan;
    const dots = focus === null || chart.spec.stacked ? [] : chart.spec.series.map((series) => {
      const found = at(series, focus);
      if (!found || found.step < p.range[0] || found.step > p.range[1]) return null;
      return svg("circle", {cx: p.x(found.step), cy: p.y(found.value), r: 3.5,
        style: `--tone: ${series.tone}`});
    });
    const mark = upright(chart, numberIn("mark"), "mark");
    const cross = upright(chart, focus, "cross");
    if (mark && cross && Math.abs(p.x(numberIn("mark")) - p.x(focus)) < 30) mark.lastChild.remove();
    chart.over.replaceChildren(...[mark, cross, ...dots].filter(Boolean));
    drawReadings(chart);
  }

  // The value of each series at the step in focus, else at the marked one; the last one otherwise.
  function drawReadings(chart) {
    const p = chart.plan;
    const far = 0.02 * (p.range[1] - p.range[0]);
    const step = focus === null ? numberIn("mark") : focus;
    chart.readings.forEach((reading, k) => {
      const series = chart.spec.series[k];
      const found = at(series, step === null ? Infinity : step);
      const apart = found && step !== null && Math.abs(found.step - step) > far;
      let text = found ? format(chart.spec, found.value) : "no values";
      if (found && step !== null && series.low && finite(series.low[found.place]))
        text += ` (${format(chart.spec, series.low[found.place])} to ${format(chart.spec, series.high[found.place])})`;
      reading.textContent = text + (apart ? ` at ${found.step}` : "");
    });
  }

  return {live, stroke, isLarge, isLog, numberIn, draw, drawOver, at, withUnit, finite, format,
    get focus() {
      return focus;
    },
    set focus(step) {
      focus = step;
    },
  };
})();
