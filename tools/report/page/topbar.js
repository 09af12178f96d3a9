// The bar at the top: sections, run, marked step, theme. And the last line of the page.
"use strict";

(() => {
  const {el} = Report;
  let signature = "";

  // ---- theme: the system's, unless the reader chose one

  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (Report.state.get("theme") || (system.matches ? "dark" : "light")) === "dark";

  function applyTheme() {
    const theme = Report.state.get("theme");
    if (theme === "dark" || theme === "light") document.documentElement.dataset.theme = theme;
    else delete document.documentElement.dataset.theme;
    const button = document.getElementById("theme");
    if (button) button.setAttribute("aria-pressed", isDark());
  }

  function themeButton() {
    return el("button", {type: "button", id: "theme", class: "small", title: "Light or dark",
      "aria-label": "Dark theme", onclick: () => Report.state.set({theme: isDark() ? "light" : "dark"})}, "\u25d0");
  }

  // ---- the parts of the bar

  function runChooser(runs) {
    const now = Report.state.get("run", "0");
    return el("select", {id: "run", "aria-label": "Run",
      onchange: (event) => Report.state.set({run: event.target.value === "0" ? null : event.target.value})},
    runs.map((run, place) => el("option", {value: place, selected: String(place) === now}, run.name)));
  }

  // What the charts are set to, with a button each that takes it back.
  function chips() {
    return [
      el("button", {type: "button", id: "range", class: "small", title: "Show all steps",
        onclick: () => Report.state.set({from: null, to: null})}),
      el("button", {type: "button", id: "mark", class: "small", title: "Remove the mark",
        onclick: () => Report.state.set({mark: null})}),
    ];
  }

  function applyChips() {
    const [from, to, mark] = ["from", "to", "mark"].map(Report.charts.numberIn);
    const show = (id, text) => {
      const button = document.getElementById(id);
      if (!button) return;
      button.hidden = text === "";
      button.textContent = `${text} \u2715`;
    };
    show("range", from === null || to === null ? "" : `steps ${from}\u2013${to}`);
    show("mark", mark === null ? "" : `step ${mark}`);
  }

  Report.bar = (data, sections) => {
    const wanted = JSON.stringify([sections, data.runs.map((run) => run.name)]);
    if (signature === wanted) return;
    signature = wanted;
    const links = sections.map(({id, title}) => {
      const link = Report.jump(id, {}, title);
      link.dataset.section = id;
      return link;
    });
    document.getElementById("top").replaceChildren(...[
      el("nav", {"aria-label": "Sections"}, links), ...chips(),
      data.runs.length > 1 && runChooser(data.runs), themeButton()].filter(Boolean));
    applyTheme();
    applyChips();
    showWhere();
  };

  // ---- the section that is being read

  function showWhere() {
    const seen = [...document.querySelectorAll("main > section")]
      .filter((node) => node.getBoundingClientRect().top < window.innerHeight * 0.35).pop();
    for (const link of document.querySelectorAll("#top nav a")) {
      const here = seen && link.dataset.section === seen.id;
      if (here && !link.hasAttribute("aria-current")) {
        link.setAttribute("aria-current", "true");
        const bar = link.parentElement;
        bar.scrollLeft = link.offsetLeft - bar.offsetLeft - bar.clientWidth / 2 + link.clientWidth / 2;
      } else if (!here) link.removeAttribute("aria-current");
    }
  }

  let waiting = false;
  window.addEventListener("scroll", () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      showWhere();
    });
  }, {passive: true});

  Report.footer = (main, data) => {
    const old = main.querySelector(":scope > footer");
    if (old) old.remove();
    main.append(el("footer", {}, data.live
      ? `Read ${data.made} from the run directory by tools/watch.py, which serves this page.`
      : `Made ${data.made} by tools/report.py from the files of the run. ` +
        "This file holds its data; it reads nothing from a network."));
  };

  // On paper everything is open, and charts are drawn for the width of a sheet.
  let opened = [];
  function printing(begins) {
    if (begins) opened = [...document.querySelectorAll("details:not([open], .values)")];
    opened.forEach((node) => (node.open = begins));
    document.documentElement.classList.toggle("printing", begins);
    Report.cards.layout();
    Report.timeline.redraw();
  }
  window.addEventListener("beforeprint", () => printing(true));
  window.addEventListener("afterprint", () => printing(false));
  system.addEventListener("change", applyTheme);
  Report.state.listen((changed) => {
    if (changed.has("theme")) applyTheme();
    if (["mark", "from", "to"].some((name) => changed.has(name))) applyChips();
  });
  applyTheme();
})();
