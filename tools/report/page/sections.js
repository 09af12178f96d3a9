// The first things to read: what is missing, the headline, the exactness ladder, the findings.
"use strict";

// A link that changes the state and goes to a section. Its address is made anew before it can be
// copied, since the state may have changed.
Report.jump = (section, changes, text) => {
  const address = () => Report.state.link(section, changes);
  const fresh = (event) => event.currentTarget.setAttribute("href", address());
  return Report.el("a", {href: address(), onpointerenter: fresh, onfocus: fresh,
    onclick: (event) => {
      if (event.ctrlKey || event.metaKey || event.shiftKey) return;
      event.preventDefault();
      Report.state.go(section, changes);
    }}, text);
};

Report.facts = (facts) => {
  const {el} = Report;
  return el("dl", {class: "facts", style: `--n: ${facts.length}`}, facts.map(({label, value, note}) => el("div", {class: "fact"},
    el("dt", {}, Report.breakable(label)),
    el("dd", {class: String(value).length > 15 ? "long" : ""}, Report.breakable(value)),
    note && el("dd", {class: "note"}, Report.breakable(note)))));
};

Report.missing = (runs) => {
  const {el} = Report;
  const sentences = runs.flatMap((run) => run.missing.map((sentence) =>
    runs.length > 1 ? `${run.name}: ${sentence}` : sentence));
  if (!sentences.length) return null;
  return el("div", {class: "notice", id: "missing", role: "note"},
    el("strong", {}, "What is missing or damaged"),
    el("ul", {}, sentences.map((sentence) => el("li", {}, sentence))));
};

Report.headline = (() => {
  const {el} = Report;
  const HOLDS = {yes: ["\u2713", "holds"], no: ["\u2717", "does not hold"], unknown: ["?", "not known"],
    off: ["\u2013", "off"]};

  function holds(value) {
    const [sign, text] = HOLDS[value];
    return el("span", {class: `pill ${value}`}, el("span", {"aria-hidden": "true"}, sign + " "), text);
  }

  function rungList(rungs) {
    return el("ul", {class: "rungs"}, rungs.map((one) =>
      el("li", {"data-rung": one.rung, "data-holds": one.holds},
        el("strong", {}, one.rung), holds(one.holds), el("span", {class: "promise"}, one.promise),
        el("span", {class: "how"}, one.how))));
  }

  // One run shows its ladder; of several each has a line that opens.
  function ladder(rungs, place, several) {
    if (!rungs.length) return Report.empty("Nothing is known about the exactness of this run.");
    if (!several) return el("div", {class: "ladder"}, el("h3", {}, "Exactness"), rungList(rungs));
    const held = rungs.filter((one) => one.holds === "yes").map((one) => one.rung).join(", ");
    return el("details", {"data-keep": `ladder ${place}`},
      el("summary", {}, `Exactness, known to hold: ${held || "nothing"}`),
      rungList(rungs));
  }

  function one(run, place, several) {
    const {title, sentence, facts, exactness} = run.headline;
    return el("article", {class: several ? "run card" : "run", "data-run": place},
      el("header", {},
        several && el("span", {class: "swatch", style: `--tone: ${Report.tone(place)}`}),
        el(several ? "h2" : "h1", {}, several ? run.name : title),
        el("span", {class: run.done ? "pill" : "pill info", "data-done": String(run.done)},
          run.done ? "finished" : "not finished")),
      several && !run.name.endsWith(title) && el("p", {class: "muted"}, title),
      el("p", {class: "sentence"}, sentence),
      Report.facts(facts), ladder(exactness, place, several));
  }

  function section(runs) {
    const several = runs.length > 1;
    const articles = runs.map((run, place) => one(run, place, several));
    return [several && el("h1", {}, `${runs.length} runs compared`),
      several ? el("div", {class: "runs several"}, articles) : articles[0]].filter(Boolean);
  }

  return {section};
})();

Report.findings = (() => {
  const {el} = Report;
  const WORDS = {bad: "problem", warn: "warning", info: "note"};

  // Where it began: in the charts, and in the rollouts where that step has some.
  function places({step}, run, place) {
    if (step === null) return null;
    const kept = run.samples.rows.some((row) => row.step === step && row.split === "train");
    return el("span", {}, "from ", Report.jump("curves", {mark: step}, `step ${step}`),
      kept && [" (", Report.jump("rollouts", {mark: step, step, run: place || null}, "rollouts"), ")"]);
  }

  function one(finding, run, place, several) {
    return el("li", {class: `finding card ${finding.severity}`, "data-severity": finding.severity},
      el("header", {},
        el("span", {class: `pill ${finding.severity}`}, WORDS[finding.severity]),
        el("h3", {}, finding.title),
        several && el("span", {class: "pill"}, run.name),
        places(finding, run, place)),
      el("p", {}, finding.text),
      finding.try && el("p", {class: "try"}, el("strong", {}, "Try: "), finding.try));
  }

  function section(runs) {
    const items = runs.flatMap((run, place) =>
      run.findings.map((finding) => one(finding, run, place, runs.length > 1)));
    const what = runs.some((run) => run.missing.length) ? "could be read of the run" : "the run recorded";
    if (!items.length) return [Report.empty(`No problem was found in what ${what}.`)];
    return [el("ul", {class: "findings"}, items)];
  }

  return {section};
})();
