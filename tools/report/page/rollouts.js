// The rollout browser: Report.rollouts(element, RUN, Report.state), again with new data as often as a live
// page wants. The chosen group, the filters and the scroll position stay. rollouts_*.js: the parts of the
// browser. What they draw is worked out in groups.js, levels.js, new_tokens.js and printable_text.js.
"use strict";

(() => {
  const LOOKS = ["view", "colour", "order", "raw", "answer", "times", "new"]; // what the detail depends on, beside filters
  const LISTS = ["group", "question", "sort", "mark"];
  const KINDS = ["best", "typical", "worst"];
  const NONE =
    "There are no rollouts: the run wrote none (log.samples=0), or has not finished its first step.";
  const PLAIN =
    "The texts are not coloured: no rollout has token texts. log.tokens was false, the run is from " +
    "before they were written, or they were left out to keep the page small.";

  const browsers = new Map(); // by the state that they follow
  const counted = (count, one) => `${Report.count(count)} ${count === 1 ? one : one + "s"}`;
  const onlyStep = (step) => step.best || step.typical || step.worst || step.groups[0];
  const IDS = {groups: (one) => one.group.id, steps: (one) => onlyStep(one).id, questions: (one) => one.id};

  // The text of all rows that a group or question shows: the detail is drawn again where it changes.
  const texts = new WeakMap();
  function textOf(shown) {
    if (!texts.has(shown))
      texts.set(shown, JSON.stringify(shown.rows || shown.evaluations.map((one) => one.rows)));
    return texts.get(shown);
  }

  class Browser {
    constructor(state) {
      this.state = state;
      this.parts = Report.rolloutFrame.frame(state, {
        move: (by) => this.move(by),
        change: (changes) => state.set(changes),
      });
      this.run = null;
      this.model = null;
      this.now = {view: "groups", entries: [], found: []};
      this.fallback = {}; // what is shown where nothing was chosen, by view
      this.drawn = "";
      this.listed = "";
      this.listen();
    }

    listen() {
      const own = [...LOOKS, ...LISTS, ...Report.rolloutFilters.KEYS];
      this.state.listen((changed) => {
        if (!this.model || !own.some((key) => changed.has(key))) return;
        this.render();
        this.leave(changed);
      });
      document.addEventListener("scroll", () => this.parts.tip.moved(), {passive: true, capture: true});
      document.addEventListener("click", ({target}) => {
        if (target instanceof Element && !target.closest(".ro-t, .ro-jump")) this.parts.tip.close();
      });
      document.addEventListener("keydown", (event) => this.press(event));
    }

    press(event) {
      if (event.key === "Escape") this.parts.tip.close();
      const typing = event.target instanceof Element && event.target.closest("input, select, textarea");
      if (typing || event.ctrlKey || event.metaKey || event.altKey || !this.inView()) return;
      if (event.key === "j" || event.key === "k") this.move(event.key === "j" ? 1 : -1);
    }

    inView() {
      const {top, bottom} = this.parts.root.getBoundingClientRect();
      return (
        this.parts.root.isConnected && top < window.innerHeight * 0.6 && bottom > window.innerHeight * 0.4
      );
    }

    draw(run) {
      const {parts} = this;
      if (this.run && this.run.name !== run.name) this.fallback = {};
      this.run = run;
      this.model = Report.groups.modelOf((run.samples && run.samples.rows) || []);
      this.range = Report.rolloutList.rangeOf(this.model.rows);
      this.scales = Report.levels.scalesOf(this.model.rows);
      const any = this.model.rows.length > 0;
      parts.empty.hidden = any;
      parts.body.hidden = !any;
      parts.empty.textContent = NONE;
      this.plain = !this.model.rows.some((row) => Report.levels.tokensOf(row));
      parts.notice.textContent = PLAIN;
      parts.notice.hidden = !this.plain;
      parts.colours.node.hidden = this.plain;
      this.render();
    }

    // ---- what is chosen

    get view() {
      const {steps, questions} = this.model;
      const view = this.state.get("view");
      return (view === "steps" && steps.length) || (view === "questions" && questions.length)
        ? view
        : "groups";
    }

    get name() {
      return this.now.view === "questions" ? "question" : "group";
    }

    look() {
      const colour = this.state.get("colour", "logprob");
      const measure =
        colour === "none" ? "" : Object.hasOwn(Report.levels.MEASURES, colour) ? colour : "logprob";
      return {
        measure,
        top: measure ? this.scales(measure) : 0,
        query: this.state.get("q"),
        plain: this.plain,
      };
    }

    // The id that is shown: the chosen one, else the first of the list, which then stays.
    shownId() {
      const {view, entries} = this.now;
      if (this.state.get(this.name)) return this.state.get(this.name);
      const ids = entries.map(IDS[view]);
      if (!ids.includes(this.fallback[view])) this.fallback[view] = ids[0];
      return this.fallback[view];
    }

    shown(id) {
      const all = this.now.view === "questions" ? this.model.questions : this.model.groups;
      return all.find((one) => one.id === id);
    }

    choose(changes) {
      this.state.set(changes);
      const {detail} = this.parts;
      if (detail.getBoundingClientRect().top > window.innerHeight * 0.75) detail.parentNode.scrollIntoView();
    }

    // A chosen entry that does not pass new filters makes room for the first that does.
    leave(changed) {
      const filtered = Report.rolloutFilters.KEYS.some((key) => changed.has(key));
      const id = this.state.get(this.name);
      if (filtered && id && !changed.has(this.name) && this.placeOf(id) < 0)
        this.state.set({[this.name]: ""});
    }

    // ---- going through the list

    placeOf(id) {
      const {view, entries} = this.now;
      if (view === "steps") return entries.findIndex((step) => step.groups.some((group) => group.id === id));
      return entries.findIndex((one) => IDS[view](one) === id);
    }

    // The next entry; in the list of steps, the next step's group of the same kind.
    move(by) {
      const {view, entries} = this.now;
      if (!entries.length) return;
      const id = this.shownId();
      const at = this.placeOf(id);
      const next = entries[at < 0 ? 0 : Math.max(0, Math.min(entries.length - 1, at + by))];
      const kind =
        view === "steps" && at >= 0 && KINDS.find((one) => entries[at][one] && entries[at][one].id === id);
      this.state.set({[this.name]: kind && next[kind] ? next[kind].id : IDS[view](next)});
    }

    // ---- drawing

    render() {
      if (!this.model || !this.model.rows.length) return;
      const {parts, state, model} = this;
      const {view} = this;
      this.now = {view, ...this.listing(view)};
      const id = this.shownId();
      parts.filters.update(model.rows);
      parts.tabs.update(view, (one) => one !== "groups" && !model[one].length);
      parts.sorts.update();
      parts.sorts.node.hidden = view === "questions";
      parts.colours.update(this.look());
      parts.count.textContent = this.countWords();
      parts.walk.update(this.placeOf(id), this.now.entries.length);
      this.drawList(id);
      this.drawDetail(id);
    }

    // What the index lists: groups that match, or the steps and questions that have one.
    listing(view) {
      const {state, model} = this;
      const {sorted, matching} = Report.rolloutFilters;
      const found = sorted(matching(model.groups, state), state);
      const matched = new Set(found.map(({group}) => group));
      const has = (groups) => groups.some((group) => matched.has(group));
      const steps = state.get("sort") === "step" ? model.steps : [...model.steps].reverse();
      if (view === "steps") return {found, entries: steps.filter((step) => has(step.groups))};
      if (view === "questions")
        return {found, entries: model.questions.filter((question) => has(question.evaluations))};
      return {found, entries: found};
    }

    countWords() {
      const {found} = this.now;
      const all = this.model.rows.length;
      const rows = found.reduce((sum, {hits}) => sum + hits.size, 0);
      const {total} = this.run.samples;
      const match =
        rows === all ? counted(all, "rollout") : `${Report.count(rows)} of ${counted(all, "rollout")}`;
      const more = total > all ? ` The run kept ${Report.count(total)}; this page shows a choice.` : "";
      return `${match} in ${counted(found.length, "group")}.${more}`;
    }

    drawList(id) {
      const {view, entries, found} = this.now;
      const {list} = this.parts;
      const key = JSON.stringify([
        this.run.name,
        view,
        this.model.rows.length,
        this.range,
        entries.map(IDS[view]),
        found.map(({hits}) => hits.size),
      ]);
      const context = {range: this.range, choose: (changes) => this.choose(changes)};
      if (key !== this.listed) list.update(view, entries, context, this.placeOf(id));
      list.mark(this.name, id, this.placeOf(id));
      this.listed = key;
    }

    drawDetail(id) {
      const shown = this.shown(id);
      const chosen = [...LOOKS, ...Report.rolloutFilters.KEYS].map((key) => this.state.get(key));
      const key =
        JSON.stringify([this.run.name, this.now.view, id, chosen, this.look(), this.range]) +
        (shown ? textOf(shown) : "");
      if (key === this.drawn) return;
      this.drawn = key;
      this.parts.tip.close();
      this.parts.detail.replaceChildren(shown ? this.detail(shown) : this.absent(id));
    }

    detail(shown) {
      const context = this.context(shown.id);
      if (this.now.view === "questions") return Report.rolloutQuestions.draw(shown, context);
      const passes = Report.rolloutFilters.testOf(this.state);
      const question = this.model.questions.find((one) => one.evaluations.includes(shown));
      if (question && question.evaluations.length > 1)
        context.question = () => this.choose({view: "questions", question: question.id});
      return Report.rolloutGroup.draw({group: shown, hits: new Set(shown.rows.filter(passes))}, context);
    }

    context(id) {
      const {KEYS} = Report.rolloutFilters;
      const address = {...Object.fromEntries(KEYS.map((key) => [key, ""])), [this.name]: id};
      return {
        state: this.state,
        look: this.look(),
        tip: this.parts.tip,
        range: this.range,
        filtered: KEYS.some((key) => this.state.get(key)),
        link: this.state.link("rollouts", address),
        open: (group) => this.choose({view: "", group: group.id}),
      };
    }

    absent(id) {
      if (!id) return Report.empty("Nothing to show: no rollout matches the filters.");
      return Report.empty(
        `The ${this.name} ${Report.printable.visible(id)} is not among the rollouts of this page.`,
      );
    }
  }

  Report.rollouts = (element, run, state) => {
    if (!browsers.has(state)) browsers.set(state, new Browser(state));
    const browser = browsers.get(state);
    if (browser.parts.root.parentNode !== element) element.replaceChildren(browser.parts.root);
    browser.draw(run);
  };
})();
