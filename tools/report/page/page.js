// Draws the report: Report.draw(DATA), and again with new data as often as a live page wants. A part
// whose data did not change is left alone; the others keep what is open, scrolled and in focus.
"use strict";

(() => {
  const {el} = Report;
  const drawn = new Map();
  let latest = null;

  // ---- the sections, in order

  function runOf(data) {
    const place = Number(Report.state.get("run", "0"));
    return data.runs[place] ? place : 0;
  }

  // {id, title, hint, data: what it depends on, make: its nodes, or nothing where it has drawn itself into
  // the body that it got, after: once they are in the page}
  function sections(data) {
    const {runs} = data;
    const place = runOf(data);
    const run = runs[place];
    const of = runs.length > 1 ? run.name : "";
    const list = [
      {id: "headline", title: "", data: runs.map((one) => [one.name, one.done, one.headline]),
        make: () => Report.headline.section(runs)},
      {id: "findings", title: "Findings", data: runs.map((one) => [one.name, one.findings, one.samples.kept, one.missing]),
        make: () => Report.findings.section(runs)},
      {id: "curves", title: "Curves", data: runs.map((one) => [one.name, one.curves]),
        make: () => Report.curves.section(runs), after: () => Report.state.get("metric") && Report.curves.filter()},
      {id: "speed", title: "Speed", data: runs.map((one) => [one.name, one.speed]),
        make: () => Report.speed.section(runs)},
      {id: "timeline", title: "Timeline", hint: of, data: [place, run.timeline],
        make: () => Report.timeline.section(run), after: Report.timeline.redraw},
      {id: "rollouts", title: "Rollouts", hint: of, data: [place, run.samples],
        make: (body) => Report.rollouts(body, run, Report.state)},
      {id: "configuration", title: "Configuration", hint: of, data: [place, run.config],
        make: () => Report.configuration.section(run), after: Report.configuration.filter},
      {id: "environment", title: "Environment", hint: of, data: [place, run.environment, run.profiles],
        make: () => Report.environment(run)},
    ];
    if (data.comparison) list.splice(6, 0, {id: "comparison", title: "Comparison",
      data: [data.comparison, runs.map((one) => one.name)],
      make: () => Report.comparison.section(data.comparison, runs)});
    return list;
  }

  // ---- drawing one

  function frame({id, title, hint}) {
    const section = el("section", {id, "aria-label": title || "Headline"});
    const head = title && el("div", {class: "head"}, el("h2", {}, title), el("span", {class: "hint"}, hint || ""));
    section.append(...[head, el("div", {class: "body"})].filter(Boolean));
    return section;
  }

  // A part that cannot be drawn says so in its place, and the others are drawn. The error is
  // reported as one that nobody caught: in Report.errors and in the browser's console.
  function made(part, body) {
    try {
      return part.make(body);
    } catch (error) {
      reportError(error);
      return [el("p", {class: "notice"}, `This part could not be drawn: ${error.message}`)];
    }
  }

  // A text that the reader has selected is not drawn anew under it.
  function isSelected(section) {
    const selection = document.getSelection();
    return !selection.isCollapsed && section.contains(selection.anchorNode);
  }

  function place(part, before) {
    let section = document.getElementById(part.id);
    if (!section) {
      section = frame(part);
      before.after(section);
    }
    const signature = JSON.stringify(part.data);
    if (drawn.get(part.id) === signature || isSelected(section)) return section;
    drawn.set(part.id, signature);
    const kept = keep(section);
    const body = section.querySelector(".body");
    const nodes = made(part, body);
    if (nodes) body.replaceChildren(...nodes);
    const hint = section.querySelector(".hint");
    if (hint) hint.textContent = part.hint || "";
    Report.cards.layout(section);
    if (part.after) part.after();
    restore(section, kept);
    return section;
  }

  // ---- what a second drawing keeps

  function keep(section) {
    const named = [...section.querySelectorAll("[data-keep]")];
    const active = section.contains(document.activeElement) ? document.activeElement : null;
    return {
      open: new Set(named.filter((node) => node.open).map((node) => node.dataset.keep)),
      scrolled: new Map(named.filter((node) => node.scrollLeft || node.scrollTop)
        .map((node) => [node.dataset.keep, [node.scrollLeft, node.scrollTop]])),
      focus: active ? active.dataset.keep : null,
      selection: active && active.selectionStart !== undefined ? [active.selectionStart, active.selectionEnd] : null,
    };
  }

  function restore(section, {open, scrolled, focus, selection}) {
    for (const node of section.querySelectorAll("[data-keep]")) {
      const name = node.dataset.keep;
      if (open.has(name)) node.open = true;
      if (scrolled.has(name)) [node.scrollLeft, node.scrollTop] = scrolled.get(name);
      if (!focus || name !== focus) continue;
      node.focus({preventScroll: true});
      if (selection && node.type === "search") node.setSelectionRange(...selection);
    }
  }

  // The section at the top of the window stays where it is, whatever grows above it.
  function anchored(change) {
    const top = (node) => node.getBoundingClientRect().top;
    const seen = window.scrollY > 0 && [...document.querySelectorAll("main > section")]
      .find((node) => node.getBoundingClientRect().bottom > 60);
    const before = seen ? top(seen) : 0;
    change();
    if (seen && seen.isConnected && top(seen) !== before) window.scrollBy(0, top(seen) - before);
  }

  function notice(main, runs) {
    const old = document.getElementById("missing");
    const fresh = Report.missing(runs);
    if (old) old.remove();
    if (fresh) main.prepend(fresh);
  }

  function drawAll(data) {
    const main = document.getElementById("report");
    if (!data || !data.runs.length) {
      main.replaceChildren(Report.empty("There is no run to report yet."));
      drawn.clear();
      return;
    }
    for (const node of main.querySelectorAll(":scope > noscript, :scope > .empty")) node.remove();
    document.title = data.runs.map((run) => run.headline.title || run.name).join(" | ");
    let anchor = document.getElementById("report-start");
    if (!anchor) main.append(anchor = el("span", {id: "report-start"}));
    const parts = sections(data);
    for (const part of parts) anchor = place(part, anchor);
    for (const node of main.querySelectorAll(":scope > section"))
      if (!parts.some((part) => part.id === node.id)) {
        drawn.delete(node.id);
        node.remove();
      }
    notice(main, data.runs);
    Report.bar(data, parts.map(({id, title}) => ({id, title: title || "Headline"})));
    Report.footer(main, data);
  }

  // New data waits while a pointer is pressed: a slider or a choice of steps is not torn away.
  let pressed = false;
  let postponed = null;
  window.addEventListener("pointerdown", () => (pressed = true), true);
  for (const name of ["pointerup", "pointercancel"])
    window.addEventListener(name, () => {
      pressed = false;
      if (postponed) setTimeout(() => Report.draw(postponed));
    });

  Report.draw = (data) => {
    postponed = pressed ? data : null;
    if (pressed) return;
    const first = latest === null;
    latest = data;
    anchored(() => drawAll(data));
    if (first && Report.state.section) Report.state.scroll();
  };

  // Says something to those who listen to the page instead of looking at it.
  Report.say = (sentence) => {
    let region = document.getElementById("said");
    if (!region) document.body.append(region = el("div", {id: "said", class: "visually-hidden", "aria-live": "polite"}));
    region.textContent = sentence;
  };

  Report.state.listen((changed) => {
    if (!changed.has("run") || !latest) return;
    document.getSelection().removeAllRanges();
    anchored(() => drawAll(latest));
  });
})();
