// The parts of the rollout browser that stay while what they show changes.
"use strict";

Report.rolloutFrame = (() => {
  const el = Report.el;
  const COLOURS = ["logprob", "advantage", "entropy", "difference", "none"];

  // Buttons of which one is pressed: {node, update(pressed, hidden)}.
  function toggles(label, name, choices, choose, lead) {
    const buttons = choices.map(([value, title]) =>
      el("button", {type: "button", [`data-${name}`]: value, onclick: () => choose(value)}, title),
    );
    const node = el("div", {class: "ro-tabs", role: "group", "aria-label": label}, lead, buttons);
    function update(pressed, isHidden = () => false) {
      for (const button of buttons) {
        button.setAttribute("aria-pressed", String(button.dataset[name] === pressed));
        button.hidden = isHidden(button.dataset[name]);
      }
    }
    return {node, update};
  }

  function tabs(state) {
    const views = Object.entries(Report.rolloutList.VIEWS).map(([view, {title}]) => [view, title]);
    return toggles("Index", "view", views, (view) => state.set({view: view === "groups" ? "" : view}));
  }

  function sorts(state) {
    const {SORTS} = Report.groups;
    const options = Object.entries(SORTS).map(([value, [title]]) => el("option", {value}, title));
    const chosen = (event) => state.set({sort: event.target.value === "-step" ? "" : event.target.value});
    const select = el("select", {id: "rollouts-sort", onchange: chosen}, options);
    const node = el("label", {class: "ro-inline"}, "sort ", select);
    return {
      node,
      update() {
        select.value = Object.hasOwn(SORTS, state.get("sort")) ? state.get("sort") : "-step";
      },
    };
  }

  // What tokens are coloured by, with the scale of it.
  function colours(state) {
    const {MEASURES} = Report.levels;
    const titles = COLOURS.map((colour) => [colour, colour === "none" ? "none" : MEASURES[colour].title]);
    const buttons = toggles(
      "Colour tokens by",
      "colour",
      titles,
      (colour) => state.set({colour: colour === "logprob" ? "" : colour}),
      el("span", {class: "ro-label"}, "Colour by"),
    );
    const scale = el("div");
    const node = el("div", {class: "ro-colours"}, buttons.node, scale);
    function update({measure, top}) {
      buttons.update(measure || "none");
      const key = `${measure} ${top}`;
      if (scale.dataset.key === key) return;
      scale.dataset.key = key;
      scale.replaceChildren(...(measure ? [Report.rolloutTokens.legend(measure, top)] : []));
    }
    return {node, update};
  }

  function walk(move) {
    const step = (by, words, key, sign) => {
      const hint = `${words} (key ${key})`;
      const id = `rollouts-${words.toLowerCase()}`;
      return el(
        "button",
        {type: "button", id, "aria-label": words, title: hint, onclick: () => move(by)},
        sign,
      );
    };
    const place = el("span", {class: "ro-notes", id: "rollouts-place"});
    const buttons = [step(-1, "Previous", "k", "\u2039"), step(1, "Next", "j", "\u203a")];
    const node = el(
      "div",
      {class: "ro-walk", role: "group", "aria-label": "Go through the list"},
      place,
      buttons,
    );
    function update(at, total) {
      place.textContent = at < 0 ? "" : `${Report.count(at + 1)} of ${Report.count(total)}`;
      buttons[0].disabled = at === 0 || !total;
      buttons[1].disabled = at === total - 1 || !total;
    }
    return {node, update};
  }

  function frame(state, {move, change}) {
    const parts = {
      filters: Report.rolloutFilters.bar(state, change),
      tabs: tabs(state),
      sorts: sorts(state),
      colours: colours(state),
      walk: walk(move),
      list: new Report.rolloutIndex.Index(),
      tip: Report.rolloutTokens.tooltip(),
      empty: Report.empty(""),
      count: el("p", {class: "ro-count", id: "rollouts-count", role: "status"}),
      notice: el("p", {class: "ro-notice", id: "rollouts-notice"}),
      detail: el("div", {class: "ro-detail", id: "rollouts-detail"}),
    };
    const index = el(
      "div",
      {class: "ro-index"},
      el("div", {class: "ro-bar"}, parts.tabs.node, parts.sorts.node),
      parts.count,
      parts.list.node,
    );
    const main = el(
      "div",
      {class: "ro-main"},
      el("div", {class: "ro-look"}, parts.colours.node, parts.walk.node),
      parts.notice,
      parts.detail,
    );
    parts.body = el(
      "div",
      {class: "ro-body"},
      parts.filters.node,
      el("div", {class: "ro-split"}, index, main),
    );
    parts.root = el("div", {class: "ro", id: "rollouts-browser"}, parts.empty, parts.body, parts.tip.box);
    return parts;
  }

  return {frame};
})();
