// Who works and who waits for whom: in words, as shares of every recorded step, and for one step as
// bars (gantt.js). Tests find: #timeline-overall, #timeline-text, #timeline-step, #timeline-where.
"use strict";

Report.timeline = (() => {
  const {el, svg} = Report;
  const {bars, lasts, phasesOf} = Report.gantt;
  let shown = null;

  // ---- sums

  // Share of the step that ranks of each role wait, and each rank's.
  function waits(timeline, step) {
    const all = bars(timeline, step);
    const whole = lasts(step, all);
    const waited = timeline.ranks.map(() => 0);
    for (const bar of all) waited[bar.row] += bar.wait;
    const ranks = timeline.ranks.map(({rank, role}, row) => ({rank, role, share: waited[row] / whole}));
    const roles = new Map();
    for (const {role, share} of ranks) roles.set(role, [...(roles.get(role) || []), share]);
    const mean = ([role, shares]) => [role, shares.reduce((a, b) => a + b, 0) / shares.length];
    return {whole, ranks, roles: new Map([...roles].map(mean))};
  }

  const WHO = {trainer: ["trainer ranks", "for the generator"],
    generator: ["generator ranks", "for the trainer"], both: ["ranks", "for each other"]};

  // "trainer ranks wait 20% of the step for the generator, generator ranks ..."
  const inWords = (roles, of) => [...roles].map(([role, share]) =>
    `${WHO[role][0]} wait ${Report.percent(share, 2)} of the ${of} ${WHO[role][1]}`).join(", ");

  // All recorded steps, weighted by their seconds.
  function overall(timeline) {
    if (timeline.ranks.length === 1) return "There is one rank, which waits for no other.";
    const found = timeline.steps.map((step) => waits(timeline, step));
    const total = found.reduce((sum, one) => sum + one.whole, 0);
    const roles = [...found[0].roles.keys()].map((role) => [role,
      found.reduce((sum, one) => sum + one.roles.get(role) * one.whole, 0) / total]);
    const count = timeline.steps.length;
    return `Over ${count} recorded ${count === 1 ? "step" : "steps"}, ${inWords(roles, "time")}.`;
  }

  function sentence(timeline, step) {
    const {whole, ranks, roles} = waits(timeline, step);
    const takes = `Step ${step.step} takes ${Report.seconds(whole)}`;
    if (ranks.length === 1) return `${takes} on one rank.`;
    const least = ranks.reduce((best, one) => (one.share < best.share ? one : best));
    const spread = Math.max(...ranks.map((one) => one.share)) - least.share;
    const slow = spread > 0.05
      ? ` Rank ${least.rank} waits least (${Report.percent(least.share, 2)})` +
        (least.share < 0.1 ? ": it is the bottleneck." : ".") : "";
    return `${takes}: ${inWords(roles, "step")}.${slow}`;
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

  // ---- the parts around it

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
    const picture = Report.gantt.picture(timeline, step, width, sentence(timeline, step));
    frame.replaceChildren(picture, Report.gantt.tip(picture));
    if (focused) picture.focus({preventScroll: true});
    shown.text.textContent = sentence(timeline, step);
    shown.legend.replaceChildren(...legend(timeline, step).flat());
    shown.table.replaceChildren(rankTable(timeline, step));
    const slider = shown.root.querySelector("#timeline-step");
    slider.value = place;
    slider.setAttribute("aria-valuetext", `step ${step.step}`);
    shown.root.querySelector("#timeline-previous").disabled = place === 0;
    shown.root.querySelector("#timeline-next").disabled = place === timeline.steps.length - 1;
    const mark = Report.charts.numberIn("mark");
    shown.root.querySelector("#timeline-where").textContent =
      `step ${step.step} (${place + 1} of ${timeline.steps.length} recorded)` +
      (mark !== null && mark !== step.step ? `; nearest to step ${mark}` : "");
  }

  function section(run) {
    const {timeline} = run;
    shown = null;
    if (!timeline.steps.length || !timeline.ranks.length)
      return [Report.empty("No timeline was recorded (timeline.jsonl in the run directory).")];
    const root = el("div", {class: "card timeline"}, chooser(timeline),
      el("p", {id: "timeline-text", class: "said", "aria-live": "polite"}),
      el("ul", {class: "legend phases"}), el("div", {class: "frame"}),
      el("details", {"data-keep": "rank-table"}, el("summary", {}, "Seconds of each rank"), el("div", {})),
      timeline.left_out > 0 && el("p", {class: "note muted"},
        `Recorded steps that are left out to keep this page small: ${timeline.left_out}.`));
    shown = {timeline, root, frame: root.querySelector(".frame"), text: root.querySelector("#timeline-text"),
      legend: root.querySelector(".phases"), table: root.querySelector("details div")};
    return [el("p", {class: "said", id: "timeline-overall"}, overall(timeline)), timeline.steps.length > 1 && timeline.ranks.length > 1 && Report.cards.card(curve(timeline)), root].filter(Boolean);
  }

  window.addEventListener("resize", () => redraw());
  Report.state.listen((changed) => changed.has("mark") && redraw());

  return {section, redraw, sentence, waits};
})();
