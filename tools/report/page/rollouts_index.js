// The list beside a rollout: a stretch of its entries is in the page, and grows at both ends as it is scrolled.
"use strict";

Report.rolloutIndex = (() => {
  const el = Report.el;
  const PAGE = 60; // entries that are added at once
  const BEFORE = 20; // entries before a chosen one that is far from the others
  const NEAR = 200; // pixels before an end at which more is added

  class Index {
    constructor() {
      const words = ["step", "best", "typical", "worst"].map((word) => el("span", {}, word));
      this.head = el("div", {class: "ro-step-line ro-step-head", "aria-hidden": "true"}, words);
      this.items = el("ol", {class: "ro-items", id: "rollouts-list"});
      this.none = el("p", {class: "ro-none", id: "rollouts-none"});
      this.less = this.button("rollouts-less", () => this.extend(PAGE, 0));
      this.more = this.button("rollouts-more", () => this.extend(0, PAGE));
      this.node = el("div", {class: "ro-list"}, this.head, this.less, this.items, this.none, this.more);
      this.node.addEventListener("scroll", () => this.scrolled(), {passive: true});
      this.now = {view: "", entries: [], context: null};
      [this.from, this.to] = [0, 0];
    }

    button(id, onclick) {
      return el("button", {type: "button", class: "ro-more", id, onclick});
    }

    scrolled() {
      const {scrollTop, clientHeight, scrollHeight} = this.node;
      if (!this.more.hidden && scrollTop + clientHeight > scrollHeight - NEAR) this.extend(0, PAGE);
    }

    written(from, to) {
      const {view, entries, context} = this.now;
      return entries.slice(from, to).map((entry) => Report.rolloutList.VIEWS[view].entry(entry, context));
    }

    // Adds so many entries before and after; what is in the window stays where it is.
    extend(before, after) {
      const from = Math.max(0, this.from - before);
      const to = Math.min(this.now.entries.length, this.to + after);
      const height = this.node.scrollHeight;
      this.items.prepend(...this.written(from, this.from));
      if (from < this.from) this.node.scrollTop += this.node.scrollHeight - height;
      this.items.append(...this.written(this.to, to));
      [this.from, this.to] = [from, to];
      this.label();
    }

    label() {
      const after = this.now.entries.length - this.to;
      const words = (count, what) => `Show ${Math.min(PAGE, count)} ${what} of ${Report.count(count)}`;
      this.less.hidden = this.from === 0;
      this.more.hidden = after === 0;
      this.less.textContent = words(this.from, "before, out");
      this.more.textContent = words(after, "more, out");
    }

    // The stretch that has the entry `at`: the one that is there, longer, or another one.
    stretch(at, from, to) {
      const total = this.now.entries.length;
      if (at < 0 || (at >= from && at < to)) return [Math.min(from, total), Math.min(to, total)];
      if (at >= to && at < to + PAGE) return [from, Math.min(total, at + PAGE)];
      return [Math.max(0, at - BEFORE), Math.min(total, at - BEFORE + PAGE)];
    }

    rewrite(from, to) {
      [this.from, this.to] = [from, to];
      this.items.replaceChildren(...this.written(from, to));
      this.label();
    }

    update(view, entries, context, at) {
      const same = view === this.now.view;
      const focused = this.items.contains(document.activeElement)
        ? {...document.activeElement.dataset}
        : null;
      const top = same ? this.node.scrollTop : 0;
      this.now = {view, entries, context};
      this.head.hidden = view !== "steps" || !entries.length;
      this.none.hidden = entries.length > 0;
      this.none.textContent = Report.rolloutList.VIEWS[view].none;
      this.rewrite(...this.stretch(at, same ? this.from : 0, same ? Math.max(this.to, PAGE) : PAGE));
      this.node.scrollTop = top;
      this.refocus(focused);
    }

    found(name, id) {
      return [...this.items.querySelectorAll(`[data-${name}="${CSS.escape(id || "")}"]`)];
    }

    refocus(data) {
      if (!data) return;
      const name = data.question ? "question" : "group";
      const [again] = this.found(name, data[name]);
      if (again) again.focus({preventScroll: true});
    }

    // Marks the chosen entry, the `at`th of all, and scrolls the list, not the page, to it.
    mark(name, id, at) {
      const [from, to] = this.stretch(at, this.from, this.to);
      if (from !== this.from || to !== this.to) this.rewrite(from, to);
      this.items.querySelectorAll("[aria-current]").forEach((entry) => entry.removeAttribute("aria-current"));
      const found = this.found(name, id);
      found.forEach((entry) => entry.setAttribute("aria-current", "true"));
      if (!found.length) return;
      const [box, spot] = [this.node, found[0]].map((node) => node.getBoundingClientRect());
      if (spot.top < box.top + 30) this.node.scrollTop -= box.top + 30 - spot.top;
      else if (spot.bottom > box.bottom) this.node.scrollTop += spot.bottom - box.bottom + 8;
    }
  }

  return {Index};
})();
