// The ranks of one step as a Gantt chart: who works, who waits for whom.
// Tests find: svg.gantt rect.bar[data-rank][data-name][data-wave][data-wait], #timeline-step, #timeline-text.
"use strict";

Report.timeline = (() => {
  const {el, svg} = Report;
  const NOTHING = 3e-4; // seconds
  let shown = null;

  // ---- sums

  // The events of a step with their waves: the k-th "generate" of a rank is wave k. A phase that
  // a rank passes without work, as all do off their own role, is not a bar.
  function bars(timeline, step) {
    return step.ranks.flatMap((events, row) => {
      const waves = new Map();
      return events.map(([name, begin, end, wait]) => {
        waves.set(name, (waves.get(name) || 0) + 1);
        return {row, name, begin, end, wait: Math.min(wait || 0, end - begin), wave: waves.get(name),
          rank: timeline.ranks[row].rank, role: timeline.ranks[row].role};
      }).filter((bar) => bar.end - bar.begin >= NOTHING);
    });
  }

  const lasts = (step, all) => Math.max(step.seconds || 0, ...all.map((bar) => bar.end), 1e-9);

  // Share of the step that ranks of each role wait, and each rank's.
  function waits(timeline, step) {
    const all = bars(timeline, step);
    const whole = lasts(step, all);
    const ranks = timeline.ranks.map(({rank, role}, row) => ({rank, role, share:
      all.filter((bar) => bar.row === row).reduce((sum, bar) => sum + bar.wait, 0) / whole}));
    const roles = new Map();
    for (const {role, share} of ranks) roles.set(role, [...(roles.get(role) || []), share]);
    const mean = ([role, shares]) => [role, shares.reduce((a, b) => a + b, 0) / shares.length];
    return {whole, ranks, roles: new Map([...roles].map(mean))};
  }

  function roleSentence(role, share, many) {
    const who = {trainer: "trainer ranks", generator: "generator ranks"}[role] || "the ranks";
    const whom = {trainer: "for others", generator: "for others"}[role] || "for each other";
    const other = many ? {trainer: "for the generator", generator: "for the trainer"}[role] || whom : whom;
    return `${who} wait ${Report.percent(share, 2)} of the step ${other}`;
  }

  // The same over all recorded steps, weighted by their seconds.
  function overall(timeline) {
    const found = timeline.steps.map((step) => waits(timeline, step));
    const total = found.reduce((sum, one) => sum + one.whole, 0);
    const roles = [...found[0].roles.keys()].map((role) => [role,
      found.reduce((sum, one) => sum + one.roles.get(role) * one.whole, 0) / total]);
    const parts = roles.map(([role, share]) => roleSentence(role, share, roles.length > 1));
    const count = timeline.steps.length;
    return `Over ${count} recorded ${count === 1 ? "step" : "steps"}, ${parts.join(", ")}.`.replaceAll("of the step", "of the time");
  }

  function sentence(timeline, step) {
    const {whole, ranks, roles} = waits(timeline, step);
    const parts = [...roles].map(([role, share]) => roleSentence(role, share, roles.size > 1));
    const shares = ranks.map((one) => one.share);
    const least = ranks[shares.indexOf(Math.min(...shares))];
    const spread = Math.max(...shares) - least.share;
    const slow = ranks.length > 1 && spread > 0.05
      ? ` Rank ${least.rank} waits least (${Report.percent(least.share, 2)}): it is the bottleneck.` : "";
    return `Step ${step.step} takes ${Report.seconds(whole)}: ${parts.join(", ")}.${slow}`;
  }

  // ---- choosing a step

  function chosen(timeline) {
    const steps = timeline.steps.map((step) => step.step);
    const mark = Report.charts.numberIn("mark");
    return mark === null ? steps.length - 1 : Report.scales.nearest(steps, mark);
  }

  function go(place) {
    const {steps} = shown.timeline;
    const to = Math.min(Math.max(place, 0), steps.length - 1);
    Report.state.set({mark: steps[to].step});
  }

  function chooser(timeline) {
    const last = timeline.steps.length - 1;
    const button = (id, text, label, move) => el("button", {type: "button", id, "data-keep": id,
      "aria-label": label, onclick: () => go(chosen(timeline) + move)}, text);
    return el("div", {class: "toolbar controls"},
      button("timeline-previous", "\u2190", "Previous recorded step", -1),
      el("input", {type: "range", id: "timeline-step", "data-keep": "timeline-step", min: 0, max: last,
        "aria-label": "Step of the timeline", oninput: (event) => go(Number(event.target.value))}),
      button("timeline-next", "\u2192", "Next recorded step", 1),
      el("span", {id: "timeline-where", class: "number"}));
  }

  // ---- drawing

  function rowHeight(ranks) {
    return ranks <= 8 ? 28 : ranks <= 16 ? 22 : ranks <= 32 ? 17 : 13;
  }

  function barShape(bar, x, top, tall) {
    const [left, right] = [x(bar.begin), x(bar.end)];
    const width = Math.max(right - left, 0.75);
    const waiting = x(bar.begin + bar.wait) - left;
    const label = bar.name + (bar.waves > 1 ? " " + bar.wave : "");
    const room = width - waiting > 7 * label.length + 8 && tall >= 15;
    return svg("g", {class: "event", style: `--tone: ${Report.phaseTone(bar.name)}`},
      svg("rect", {class: "bar", x: left, y: top, width, height: tall, "data-rank": bar.rank,
        "data-name": bar.name, "data-wave": bar.wave, "data-wait": bar.wait}),
      bar.wait > 0 && svg("rect", {class: "wait", x: left, y: top, width: waiting, height: tall}),
      room && svg("text", {class: "inside", x: left + waiting + 5, y: top + tall / 2 + 4}, label));
  }

  function hatch() {
    return svg("pattern", {id: "hatch", width: 6, height: 6, patternUnits: "userSpaceOnUse",
      patternTransform: "rotate(45)"}, svg("rect", {class: "hatch-ground", width: 6, height: 6}),
    svg("rect", {class: "hatch-line", width: 2, height: 6}));
  }

  function rankLabel({rank, role}, left, middle) {
    const text = left > 60 ? `${rank} ${role === "both" ? "" : role}` : String(rank);
    return svg("text", {x: left - 8, y: middle + 4, "text-anchor": "end"}, text);
  }

  // Bars of one name per rank are counted, so that a single one is not called a wave.
  function counted(all) {
    const most = new Map();
    for (const bar of all) most.set(bar.row + bar.name, bar.wave);
    return all.map((bar) => ({...bar, waves: most.get(bar.row + bar.name)}));
  }

  function gantt(timeline, step, width) {
    const all = counted(bars(timeline, step));
    const row = rowHeight(timeline.ranks.length);
    const gap = row > 15 ? 4 : 2;
    const split = timeline.ranks.some(({role}) => role !== "both");
    const left = split && width > 560 ? 92 : 34;
    const bottom = timeline.ranks.length * row + 6;
    const whole = lasts(step, all);
    const x = Report.scales.linear(0, whole, left, width - 10);
    const ticks = Report.scales.ticks(0, whole, Math.max(2, Math.floor(width / 110)));
    const rules = ticks.map((tick) => [
      svg("path", {class: "rule", d: `M${x(tick).toFixed(1)} 4V${bottom}`}),
      svg("text", {x: x(tick), y: bottom + 16, "text-anchor": "middle"}, Report.number(tick) + "\u2009s")]);
    const labels = timeline.ranks.map((rank, k) => rankLabel(rank, left, 6 + k * row + (row - gap) / 2));
    const beds = timeline.ranks.map((_, k) => svg("rect", {class: "bed", x: left, y: 6 + k * row,
      width: width - 10 - left, height: row - gap}));
    const picture = svg("svg", {class: "gantt", role: "img", tabindex: 0, "data-keep": "gantt",
      viewBox: `0 0 ${width} ${bottom + 24}`, "data-step": step.step,
      "aria-label": `${sentence(timeline, step)} Arrow keys go through the bars.`,
      style: `--tall: ${bottom + 24}px`},
      svg("defs", {}, hatch()), beds, rules.flat(),
      labels, all.map((bar) => barShape(bar, x, 6 + bar.row * row, row - gap)));
    picture.bars = all;
    return picture;
  }

  // ---- what is under the pointer, or reached by arrow keys

  function described(bar) {
    const wave = bar.waves > 1 ? `, ${bar.name === "generate" ? "wave" : "part"} ${bar.wave} of ${bar.waves}` : "";
    const role = bar.role === "both" ? "" : ` (${bar.role})`;
    const wait = bar.wait > 0
      ? `, of which it waits ${Report.seconds(bar.wait)} (${Report.percent(bar.wait / (bar.end - bar.begin), 2)})` : "";
    return `Rank ${bar.rank}${role}: ${bar.name}${wave}, ${Report.seconds(bar.end - bar.begin)}${wait}, ` +
      `from ${Report.number(bar.begin)} s to ${Report.number(bar.end)} s`;
  }

  function listen(picture, tip) {
    const shapes = [...picture.querySelectorAll(".bar")];
    let current = -1;
    const show = (place) => {
      shapes.forEach((shape, k) => shape.classList.toggle("current", k === place));
      current = place;
      tip.textContent = place < 0 ? tip.dataset.rest : described(picture.bars[place]);
    };
    picture.addEventListener("pointermove", (event) => show(shapes.indexOf(under(event))));
    picture.addEventListener("pointerdown", (event) => show(shapes.indexOf(under(event))));
    picture.addEventListener("pointerleave", () => show(-1));
    picture.addEventListener("keydown", (event) => {
      const move = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1}[event.key];
      if (!move) return;
      event.preventDefault();
      show(Math.min(Math.max(current + move, 0), shapes.length - 1));
      if (current >= 0) Report.say(described(picture.bars[current]));
    });
  }

  function under(event) {
    const group = event.target.closest(".event");
    return group ? group.querySelector(".bar") : null;
  }

  // ---- the parts around it

  function phasesOf(all) {
    const names = new Set(all.map((bar) => bar.name));
    const known = Report.PHASES.filter((name) => names.has(name));
    return [...known, ...[...names].filter((name) => !known.includes(name))];
  }

  function legend(timeline, step) {
    const names = phasesOf(bars(timeline, step));
    return [names.map((name) => el("li", {"data-name": name},
      el("span", {class: "swatch", style: `--tone: ${Report.phaseTone(name)}`}), name)),
    el("li", {}, svg("svg", {width: 14, height: 12, "aria-hidden": "true", class: "hatch-sample"},
      svg("rect", {width: 14, height: 12, fill: "url(#hatch)"})), "waiting for another rank")];
  }

  function rankTable(timeline, step) {
    const all = bars(timeline, step);
    const names = phasesOf(all);
    const {ranks} = waits(timeline, step);
    const rows = timeline.ranks.map(({rank, role}, row) => {
      const own = all.filter((bar) => bar.row === row);
      const sum = (name) => own.filter((bar) => bar.name === name)
        .reduce((total, bar) => total + bar.end - bar.begin, 0);
      return [`${rank} (${role})`, ...names.map((name) => Report.number(sum(name))),
        Report.percent(ranks[row].share, 2)];
    });
    return Report.table(["Rank", ...names.map((name) => `${name} s`), "waits"], rows,
      {keep: "rank-table", label: "Seconds of each rank"});
  }

  function curve(timeline) {
    const roles = [...new Set(timeline.ranks.map(({role}) => role))];
    const shares = timeline.steps.map((step) => waits(timeline, step).roles);
    return {id: "timeline/waiting", title: "Waiting, as a share of each recorded step", percent: true, unit: "",
      help: "Mean over the ranks of a role. A click shows that step below.", note: "",
      series: roles.map((role, k) => ({key: `waiting/${role}`, run: 0, tone: Report.tone(k), dash: 0,
        label: role === "both" ? "all ranks" : role, steps: timeline.steps.map((step) => step.step),
        values: shares.map((share) => share.get(role))}))};
  }

  function redraw() {
    if (!shown || !shown.frame.isConnected) return;
    const {timeline, frame} = shown;
    const place = chosen(timeline);
    const step = timeline.steps[place];
    const width = Math.max(260, frame.clientWidth);
    const focused = document.activeElement && document.activeElement.dataset.keep === "gantt";
    const picture = gantt(timeline, step, width);
    frame.replaceChildren(picture);
    listen(picture, shown.tip);
    if (focused) picture.focus({preventScroll: true});
    shown.text.textContent = sentence(timeline, step);
    shown.legend.replaceChildren(...legend(timeline, step).flat());
    shown.table.replaceChildren(rankTable(timeline, step));
    shown.root.querySelector("#timeline-step").value = place;
    shown.root.querySelector("#timeline-previous").disabled = place === 0;
    shown.root.querySelector("#timeline-next").disabled = place === timeline.steps.length - 1;
    const mark = Report.charts.numberIn("mark");
    shown.root.querySelector("#timeline-where").textContent =
      `step ${step.step}, recorded ${place + 1} of ${timeline.steps.length}` +
      (mark !== null && mark !== step.step ? `; nearest to step ${mark}` : "");
  }

  function section(run) {
    const {timeline} = run;
    shown = null;
    if (!timeline.steps.length || !timeline.ranks.length)
      return [Report.empty("No timeline was recorded (timeline.jsonl in the run directory).")];
    const tip = el("p", {class: "tip", "data-rest": "Point at a bar to read it."}, "Point at a bar to read it.");
    const root = el("div", {class: "card timeline"}, chooser(timeline),
      el("p", {id: "timeline-text", class: "said", "aria-live": "polite"}),
      el("ul", {class: "legend phases"}), el("div", {class: "frame"}), tip,
      el("details", {"data-keep": "rank-table"}, el("summary", {}, "Seconds of each rank"), el("div", {})),
      timeline.left_out > 0 && el("p", {class: "note muted"},
        `${timeline.left_out} recorded steps are left out of this page to keep it small.`));
    shown = {timeline, root, tip, frame: root.querySelector(".frame"), text: root.querySelector("#timeline-text"),
      legend: root.querySelector(".phases"), table: root.querySelector("details div")};
    return [el("p", {class: "said", id: "timeline-overall"}, overall(timeline)), timeline.steps.length > 1 && Report.cards.card(curve(timeline)), root].filter(Boolean);
  }

  window.addEventListener("resize", () => redraw());
  Report.state.listen((changed) => changed.has("mark") && redraw());

  return {section, redraw, sentence, waits};
})();
