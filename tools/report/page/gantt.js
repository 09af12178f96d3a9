// The ranks of one step as bars along its time: phases in their colours, waiting hatched at their
// beginning. Tests find: svg.gantt rect.bar[data-rank][data-name][data-wave][data-wait], .frame .tip.
"use strict";

Report.gantt = (() => {
  const {el, svg} = Report;
  const NOTHING = 3e-4; // seconds

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

  function phasesOf(all) {
    const names = new Set(all.map((bar) => bar.name));
    const known = Report.PHASES.filter((name) => names.has(name));
    return [...known, ...[...names].filter((name) => !known.includes(name))];
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
    const text = role === "both" ? String(rank) : `${rank} ${role}`;
    return svg("text", {x: left - 8, y: middle + 4, "text-anchor": "end"}, text);
  }

  // Bars of one name per rank are counted, so that a single one is not called a wave.
  function counted(all) {
    const most = new Map();
    for (const bar of all) most.set(bar.row + bar.name, bar.wave);
    return all.map((bar) => ({...bar, waves: most.get(bar.row + bar.name)}));
  }

  function picture(timeline, step, width, said) {
    const all = counted(bars(timeline, step));
    const row = rowHeight(timeline.ranks.length);
    const gap = row > 15 ? 4 : 2;
    const split = timeline.ranks.some(({role}) => role !== "both");
    const left = split ? 86 : 34;
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
    const drawn = svg("svg", {class: "gantt", role: "img", tabindex: 0, "data-keep": "gantt",
      viewBox: `0 0 ${width} ${bottom + 24}`, "data-step": step.step,
      "aria-label": `${said} Arrow keys go through the bars.`,
      style: `--tall: ${bottom + 24}px`},
      svg("defs", {}, hatch()), beds, rules.flat(),
      labels, all.map((bar) => barShape(bar, x, 6 + bar.row * row, row - gap)));
    drawn.bars = all;
    return drawn;
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

  // A box beside the bar that is read; it keeps inside the picture.
  function tip(drawn) {
    const box = el("div", {class: "tip", hidden: true});
    const shapes = [...drawn.querySelectorAll(".bar")];
    let current = -1;
    function show(place) {
      shapes.forEach((shape, k) => shape.classList.toggle("current", k === place));
      current = place;
      box.hidden = place < 0;
      if (place < 0) return;
      box.textContent = described(drawn.bars[place]);
      beside(box, shapes[place], drawn);
    }
    drawn.addEventListener("pointermove", (event) => show(shapes.indexOf(under(event))));
    drawn.addEventListener("pointerdown", (event) => show(shapes.indexOf(under(event))));
    for (const name of ["pointerleave", "blur"]) drawn.addEventListener(name, () => show(-1));
    drawn.addEventListener("keydown", (event) => {
      const move = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1}[event.key];
      if (event.key === "Escape") show(-1);
      if (!move) return;
      event.preventDefault();
      show(Math.min(Math.max(current + move, 0), shapes.length - 1));
      if (current >= 0) Report.say(described(drawn.bars[current]));
    });
    return box;
  }

  function beside(box, shape, drawn) {
    const [bar, all] = [shape.getBoundingClientRect(), drawn.getBoundingClientRect()];
    const middle = bar.left + bar.width / 2 - all.left - box.offsetWidth / 2;
    box.style.left = Math.min(Math.max(middle, 0), all.width - box.offsetWidth) + "px";
    box.style.top = bar.bottom - all.top + 6 + "px";
  }

  function under(event) {
    const group = event.target.closest(".event");
    return group ? group.querySelector(".bar") : null;
  }

  return {bars, lasts, phasesOf, picture, tip};
})();
