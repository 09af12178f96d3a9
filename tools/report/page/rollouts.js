// The rollout browser: Report.rollouts(element, RUN, Report.state), again with new data as often as a live
// page wants. The chosen group, the filters and the scroll position stay.
"use strict";

Report.rollouts = (() => {
  const OWN = ["view", "group", "question", "colour", "sort", "order", "raw", "answer", "times", "step", "split", "set", "kept", "finish", "correct", "min", "max", "look", "q"];
  const COLOURS = ["logprob", "advantage", "entropy", "difference", "none"];
  const browsers = new Map(); // by the state that they follow
  const el = Report.el;

  const wordsOf = (count, one, many) => `${Report.count(count)} ${count === 1 ? one : many}`;

  function tabs(state) {
    const buttons = Object.entries(Report.rolloutList.VIEWS).map(([view, {title}]) =>
      el("button", {type: "button", "data-view": view, onclick: () => state.set({view: view === "groups" ? "" : view})}, title));
    const node = el("div", {class: "ro-tabs", role: "group", "aria-label": "Index"}, buttons);
    const update = (view, counts) => buttons.forEach((button) => {
      button.setAttribute("aria-pressed", String(button.dataset.view === view));
      button.hidden = !counts[button.dataset.view];
    });
    return {node, update};
  }

  function sorts(state) {
    const select = el("select", {id: "rollouts-sort", onchange: (event) => state.set({sort: event.target.value === "-step" ? "" : event.target.value})},
      Object.entries(Report.rolloutRows.SORTS).map(([value, [title]]) => el("option", {value}, title)));
    const node = el("label", {class: "ro-inline"}, "sort ", select);
    return {node, update: () => { select.value = Report.rolloutRows.SORTS[state.get("sort")] ? state.get("sort") : "-step"; }};
  }

  function colours(state) {
    const buttons = COLOURS.map((colour) => el("button", {type: "button", "data-colour": colour, onclick: () => state.set({colour: colour === "logprob" ? "" : colour})},
      colour === "none" ? "none" : Report.rolloutValues.MEASURES[colour].title));
    const scale = el("div", {class: "ro-legend-place"});
    const node = el("div", {class: "ro-colours"}, el("div", {class: "ro-tabs", role: "group", "aria-label": "Colour tokens by"}, el("span", {class: "ro-label"}, "Colour by"), buttons), scale);
    function update({measure, top}) {
      buttons.forEach((button) => button.setAttribute("aria-pressed", String(button.dataset.colour === (measure || "none"))));
      const key = `${measure} ${top}`;
      if (scale.dataset.key === key) return;
      scale.dataset.key = key;
      scale.replaceChildren(...(measure ? [Report.rolloutTokens.legend(measure, top)] : []));
    }
    return {node, update};
  }

  // Parts that stay while what they show changes.
  function frame(state, move) {
    const parts = {
      filters: Report.rolloutFilters.bar(state), tabs: tabs(state), sorts: sorts(state), colours: colours(state), list: Report.rolloutList.list(), tip: Report.rolloutTokens.tooltip(),
      count: el("p", {class: "ro-count", id: "rollouts-count", role: "status"}), notice: el("p", {class: "ro-notice", id: "rollouts-notice"}),
      detail: el("div", {class: "ro-detail", id: "rollouts-detail", tabindex: "-1"}), empty: Report.empty(""),
    };
    const step = (by, words, sign, id) => el("button", {type: "button", id, "aria-label": words, title: `${words} (${by < 0 ? "k" : "j"})`, onclick: () => move(by)}, sign);
    const walk = el("div", {class: "ro-walk", role: "group", "aria-label": "Go through the list"}, step(-1, "Previous", "\u2039", "rollouts-previous"), step(1, "Next", "\u203a", "rollouts-next"));
    parts.body = el("div", {class: "ro-body"}, parts.filters.node,
      el("div", {class: "ro-split"},
        el("div", {class: "ro-index"}, el("div", {class: "ro-bar"}, parts.tabs.node, parts.sorts.node), parts.count, parts.list.node),
        el("div", {class: "ro-main"}, el("div", {class: "ro-look"}, parts.colours.node, walk), parts.notice, parts.detail)));
    parts.root = el("div", {class: "ro", id: "rollouts-browser"}, parts.empty, parts.body, parts.tip.box);
    return parts;
  }

  function viewOf(model, state) {
    const view = state.get("view") || "groups";
    const there = {groups: true, steps: model.steps.length > 0, questions: model.questions.length > 0};
    return there[view] ? view : "groups";
  }

  // What the index lists: groups that match, and the steps and questions that have one.
  function listing(model, view, state) {
    const found = Report.rolloutFilters.sorted(Report.rolloutFilters.matching(model.groups, state), state);
    const ids = new Set(found.map(({group}) => group.id));
    const has = (groups) => groups.some((group) => ids.has(group.id));
    if (view === "steps") return {found, entries: ordered(model.steps.filter((step) => has(step.groups)), state)};
    if (view === "questions") return {found, entries: model.questions.filter((question) => has(question.evaluations))};
    return {found, entries: found};
  }

  const ordered = (steps, state) => (state.get("sort") === "step" ? steps : [...steps].reverse());

  const idOf = {groups: (one) => one.group.id, steps: (one) => (one.best || one.typical || one.worst || one.groups[0]).id, questions: (one) => one.id};

  // Says why tokens have no colours, where that is so for all rows of the run.
  function noticeOf(model) {
    const without = model.rows.filter((row) => !Report.rolloutValues.tokensOf(row)).length;
    if (!without) return "";
    const cause = "log.tokens was false, the run is from before tokens were written, or they were left out to keep the page small";
    if (without === model.rows.length) return `The texts are not coloured: no row has token texts (${cause}).`;
    return `${wordsOf(without, "rollout", "rollouts")} of ${Report.count(model.rows.length)} cannot be coloured: without token texts (${cause}).`;
  }

  function create(state) {
    const parts = frame(state, move);
    let run = null;
    let model = null;
    let scales = null;
    let now = {view: "groups", entries: [], found: []};
    let fallback = {}; // what is shown where nothing was chosen, by view
    let drawn = "";
    let listed = "";

    function look() {
      const colour = state.get("colour");
      const measure = colour === "none" ? "" : Report.rolloutValues.MEASURES[colour] ? colour : "logprob";
      return {measure, top: measure ? scales(measure) : 0, query: state.get("q")};
    }

    const nameNow = () => (now.view === "questions" ? "question" : "group");

    // The id that is shown: the chosen one, else the first of the list, which then stays.
    function shownId() {
      const name = nameNow();
      if (state.get(name)) return state.get(name);
      const ids = now.entries.map(idOf[now.view]);
      if (!ids.includes(fallback[now.view])) fallback[now.view] = ids[0];
      return fallback[now.view];
    }

    function choose(chosen) {
      state.set(chosen);
      if (parts.list.node.clientHeight && parts.detail.getBoundingClientRect().top > window.innerHeight * 0.75) parts.detail.scrollIntoView({block: "start"});
    }

    // The index of the shown entry; in steps, by its step, so that going on keeps the kind of group.
    function placeOf(id) {
      if (now.view !== "steps") return now.entries.findIndex((one) => idOf[now.view](one) === id);
      return now.entries.findIndex((step) => step.groups.some((group) => group.id === id));
    }

    function kindOf(step, id) {
      return ["best", "typical", "worst"].find((kind) => step && step[kind] && step[kind].id === id) || "best";
    }

    function move(by) {
      if (!now.entries.length) return;
      const at = placeOf(shownId());
      const to = at < 0 ? 0 : Math.max(0, Math.min(now.entries.length - 1, at + by));
      const next = now.entries[to];
      const own = now.view === "steps" && next[kindOf(now.entries[at], shownId())];
      state.set({[nameNow()]: own ? own.id : idOf[now.view](next)});
    }

    function contextOf(id) {
      const filtered = Report.rolloutFilters.KEYS.some((key) => state.get(key));
      const address = {...Object.fromEntries(Report.rolloutFilters.KEYS.map((key) => [key, ""])), [nameNow()]: id};
      return {state, look: look(), tip: parts.tip, range: model.range, filtered, choose, link: state.link("rollouts", address),
        open: (group) => choose({view: "", group: group.id})};
    }

    function drawGroup(id) {
      const group = model.groups.find((one) => one.id === id);
      if (!group) return absent("group", id);
      const passes = Report.rolloutFilters.testOf(state);
      const question = model.questions.find((one) => one.evaluations.includes(group));
      const context = {...contextOf(id), question: question && question.evaluations.length > 1 ? () => choose({view: "questions", question: question.id}) : null};
      return Report.rolloutGroup.draw({group, hits: new Set(group.rows.filter(passes))}, context);
    }

    function drawQuestion(id) {
      const question = model.questions.find((one) => one.id === id);
      return question ? Report.rolloutQuestions.draw(question, contextOf(id)) : absent("question", id);
    }

    function absent(what, id) {
      return id ? Report.empty(`The ${what} ${Report.rolloutText.visible(id)} is not among the rollouts of this page.`) : Report.empty("Nothing to show: no rollout matches the filters.");
    }

    // What the detail shows, as a text: it is drawn again only where this has changed.
    function signature(id) {
      const shown = now.view === "questions" ? model.questions.find((one) => one.id === id)?.evaluations.flatMap((one) => one.rows) : model.groups.find((one) => one.id === id)?.rows;
      const chosen = OWN.filter((key) => !["sort", "group", "question"].includes(key)).map((key) => state.get(key));
      return JSON.stringify([run.name, now.view, id, chosen, look(), model.range, shown || null]);
    }

    function drawDetail(id) {
      const key = signature(id);
      if (key === drawn) return;
      drawn = key;
      parts.tip.close();
      parts.detail.replaceChildren(now.view === "questions" ? drawQuestion(id) : drawGroup(id));
    }

    function drawList(id) {
      const key = JSON.stringify([run.name, now.view, model.rows.length, model.range, now.entries.map(idOf[now.view]), now.found.map(({hits}) => hits.size)]);
      if (key !== listed) parts.list.update(now.view, now.entries, {range: model.range, choose}, placeOf(id));
      parts.list.mark(nameNow(), id, true);
      listed = key;
    }

    function render() {
      if (!model || !model.rows.length) return;
      const view = viewOf(model, state);
      now = {view, ...listing(model, view, state)};
      const id = shownId();
      parts.filters.update(model.rows);
      parts.tabs.update(view, {groups: true, steps: model.steps.length, questions: model.questions.length});
      parts.sorts.update();
      parts.sorts.node.hidden = view === "questions";
      parts.colours.update(look());
      parts.count.textContent = countWords();
      drawList(id);
      drawDetail(id);
    }

    function countWords() {
      const rows = now.found.reduce((sum, {hits}) => sum + hits.size, 0);
      const {total} = run.samples;
      const kept = total > model.rows.length ? ` The run wrote ${Report.count(total)}; this page has ${Report.count(model.rows.length)}.` : "";
      const all = rows === model.rows.length ? wordsOf(rows, "rollout", "rollouts") : `${Report.count(rows)} of ${wordsOf(model.rows.length, "rollout", "rollouts")}`;
      return `${all} in ${wordsOf(now.found.length, "group", "groups")}.${kept}`;
    }

    function draw(next) {
      if (run && run.name !== next.name) fallback = {};
      run = next;
      model = Report.rolloutRows.modelOf((run.samples && run.samples.rows) || []);
      model.range = Report.rolloutList.rangeOf(model.rows);
      scales = Report.rolloutValues.scalesOf(model.rows);
      const any = model.rows.length > 0;
      parts.empty.hidden = any;
      parts.body.hidden = !any;
      parts.empty.textContent = "There are no rollouts: the run wrote none (log.samples=0), or it has not finished its first step.";
      parts.notice.textContent = noticeOf(model);
      parts.notice.hidden = !parts.notice.textContent;
      render();
    }

    function inView() {
      const {top, bottom} = parts.root.getBoundingClientRect();
      return top < window.innerHeight * 0.6 && bottom > window.innerHeight * 0.4;
    }

    document.addEventListener("keydown", (event) => {
      const typing = event.target instanceof Element && event.target.closest("input, select, textarea");
      if (event.key === "Escape") parts.tip.close();
      if (typing || event.ctrlKey || event.metaKey || event.altKey || !parts.root.isConnected || !inView()) return;
      if (event.key === "j" || event.key === "k") move(event.key === "j" ? 1 : -1);
    });
    window.addEventListener("scroll", () => parts.tip.leave(), {passive: true});
    state.listen((changed) => {
      if (OWN.some((key) => changed.has(key))) render();
    });
    return {draw, root: parts.root};
  }

  return (element, run, state) => {
    if (!browsers.has(state)) browsers.set(state, create(state));
    const browser = browsers.get(state);
    if (browser.root.parentNode !== element) element.append(browser.root);
    browser.draw(run);
  };
})();
