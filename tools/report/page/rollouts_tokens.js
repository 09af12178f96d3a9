// Tokens on the page: coloured spans, the legend, and what is known of the one under the pointer.
"use strict";

Report.rolloutTokens = (() => {
  const T = Report.printable;
  const M = Report.levels;
  const HEAD = 800; // tokens of a long turn that are shown before it is asked for
  const TAIL = 160;
  const PIECE = 500; // tokens of a box, of which a long text has many
  const AT_ONCE = 8; // boxes that go into the page at once
  const LONGEST = 2000; // characters of one token that are shown
  const PLAIN = /^[!-~][ -~]*$|^ [!-~][ -~]*$/;

  function character(node, letter, blank) {
    if (letter === "\n") node.append(Report.el("span", {class: "ro-nl"}, "\n"));
    else if (letter === "\t") node.append(Report.el("span", {class: "ro-tab"}, "\t"));
    else if (letter === " " && blank) node.append(Report.el("span", {class: "ro-sp"}, " "));
    else T.append(node, letter);
  }

  function span(token, className) {
    const node = document.createElement("span");
    node.className = className;
    node.dataset.at = token.at;
    if (token.text.length > LONGEST) {
      T.append(node, token.text.slice(0, LONGEST));
      node.append(
        Report.el(
          "span",
          {class: "ro-notes"},
          `\u2026 ${Report.count(token.text.length)} characters in one token`,
        ),
      );
    } else if (PLAIN.test(token.text)) node.textContent = token.text;
    else if (token.text === "") node.classList.add("ro-void");
    else if (/[\n\t]/.test(token.text) || !token.text.trim()) {
      const blank = !token.text.trim();
      for (const part of token.text.split(/([\n\t ])/)) if (part) character(node, part, blank);
    } else T.append(node, token.text);
    return node;
  }

  // Indices of the tokens that a match of the query touches.
  function hitsOf(tokens, query) {
    const hits = new Set();
    const ranges = T.rangesOf(tokens.map((token) => token.text).join(""), query);
    let at = 0;
    let begin = 0;
    for (const token of tokens) {
      const end = begin + token.text.length;
      while (at < ranges.length && ranges[at][1] <= begin) at++;
      if (at < ranges.length && ranges[at][0] < end && begin < end) hits.add(token.at);
      begin = end;
    }
    return hits;
  }

  // `look`: {measure, top, query, fresh: indices that are marked as new}; `values`: of the row's sampled tokens, or null.
  function writer(tokens, values, look) {
    const hits = look.query ? hitsOf(tokens, look.query) : new Set();
    return (token) => {
      const value = values && token.sampled ? values[token.place] : null;
      const colour = value === null ? "" : M.classOf(look.measure, value, look.top);
      return span(
        token,
        [
          "ro-t",
          colour,
          token.sampled ? "" : "ro-given",
          hits.has(token.at) ? "ro-hit" : "",
          look.fresh && look.fresh.has(token.at) ? "ro-new" : "",
        ]
          .filter(Boolean)
          .join(" "),
      );
    };
  }

  // Ends of the pieces of a long text: after a newline where there is one, so that few lines are cut.
  function cuts(tokens) {
    const ends = [];
    let from = 0;
    while (tokens.length - from > PIECE) {
      const least = from + PIECE / 2;
      let end = from + PIECE;
      for (let at = end; at > least; at--) {
        if (!tokens[at - 1].text.endsWith("\n")) continue;
        end = at;
        break;
      }
      ends.push(end);
      from = end;
    }
    return [...ends, tokens.length];
  }

  // A long text is many boxes: the browser lays out those that are in the window.
  function fillAll(node, tokens, write, done) {
    const ends = cuts(tokens);
    node.replaceChildren();
    T.inPieces(ends.length, AT_ONCE, (first, last) => {
      for (let piece = first; piece < last; piece++) {
        const part = tokens.slice(piece ? ends[piece - 1] : 0, ends[piece]).map(write);
        node.append(...(ends.length === 1 ? part : [Report.el("div", {class: "ro-piece"}, part)]));
      }
      if (last === ends.length && done) done();
    });
  }

  // A block of tokens; `node.reveal(at)` shows one that is folded away and selects it.
  function block(row, turn, look, tip) {
    const {tokens} = turn;
    const {values} = M.MEASURES[look.measure] ? M.MEASURES[look.measure].of(row) : {};
    const write = writer(tokens, values || null, look);
    const node = Report.el("div", {
      class: "ro-tokens",
      dir: "auto",
      tabindex: "0",
      role: "group",
      "aria-label": `${Report.count(tokens.length)} tokens; left and right arrow keys go through them`,
    });
    const folded = tokens.length > HEAD + 2 * TAIL;
    const all = (done) => fillAll(node, tokens, write, done);
    if (folded) fillEnds(node, tokens, write, () => all());
    else all();
    const select = (at) => node.querySelector(`[data-at="${at}"]`);
    const point = (at) => {
      select(at).scrollIntoView({block: "center"});
      tip.pin(select(at), row);
    };
    node.reveal = (at) => (select(at) ? point(at) : all(() => point(at)));
    listen(node, row, tip);
    return node;
  }

  function fillEnds(node, tokens, write, show) {
    const characters = tokens.reduce((sum, token) => sum + token.text.length, 0);
    const words = `\u2026 show all ${Report.count(characters)} characters, ${Report.count(tokens.length)} tokens \u2026`;
    node.append(
      ...tokens.slice(0, HEAD).map(write),
      T.moreButton(words, show),
      ...tokens.slice(-TAIL).map(write),
    );
  }

  const tokenAt = (event) => (event.target instanceof Element ? event.target.closest(".ro-t") : null);

  function listen(node, row, tip) {
    node.addEventListener("mouseover", (event) => tokenAt(event) && tip.show(tokenAt(event), row));
    node.addEventListener("mouseleave", () => tip.leave());
    node.addEventListener("click", (event) => tokenAt(event) && tip.toggle(tokenAt(event), row));
    node.addEventListener("blur", () => tip.close());
    node.addEventListener(
      "focus",
      () => node.matches(":focus-visible") && tip.pin(node.querySelector(".ro-t"), row),
    );
    node.addEventListener("keydown", (event) => {
      const next = target(node, event.key);
      if (!next) return;
      event.preventDefault();
      next.scrollIntoView({block: "nearest"});
      tip.pin(next, row);
    });
  }

  function target(node, key) {
    const all = [...node.querySelectorAll(".ro-t")];
    const at = all.findIndex((token) => token.classList.contains("ro-on"));
    const to = {ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: all.length - 1}[key];
    return to === undefined ? null : all[Math.max(0, Math.min(all.length - 1, to))];
  }

  const valueOf = (row, measure, token) => {
    const {values} = M.MEASURES[measure].of(row);
    return values && token.sampled ? values[token.place] : null;
  };

  // A value in a few digits; one that can have either sign has its sign.
  function exact(value, measure) {
    if (!Number.isFinite(value)) return "\u2013";
    return M.MEASURES[measure].diverging && value !== 0 ? M.signed(value) : Report.number(value, 4);
  }

  // What is known of a token: [label, text, ...].
  function factsOf(row, token, total) {
    const logprob = valueOf(row, "logprob", token);
    const entropy = valueOf(row, "entropy", token);
    const known = [["token", `${token.at + 1} of ${total}`]];
    if (Array.isArray(row.tokens)) known.push(["id", String(row.tokens[token.at])]);
    if (!token.sampled) return [...known, ["sampled", "no: a reply, without loss"]];
    if (logprob !== null)
      known.push(["logprob", Report.number(logprob, 4)], ["probability", Report.percent(Math.exp(logprob))]);
    if (entropy !== null) known.push(["entropy", Report.number(entropy, 4) + " nats"]);
    for (const [measure, label] of [
      ["difference", "trainer \u2212 generator"],
      ["advantage", "advantage"],
    ]) {
      const value = valueOf(row, measure, token);
      if (value !== null) known.push([label, exact(value, measure)]);
    }
    return known;
  }

  // A token in one line; its white space as symbols.
  function shown(text) {
    const short = text.length > 200 ? text.slice(0, 200) + "\u2026" : text;
    return short
      .replace(/\n/g, "\u21b5")
      .replace(/\t/g, "\u21e5")
      .replace(/^ +| +$/g, (blank) => "\u00b7".repeat(blank.length));
  }

  // The note beside a token; one a browser. A pinned one stays until it is closed.
  function tooltip() {
    const box = Report.el("div", {class: "ro-tip", id: "rollout-token", role: "status", hidden: true});
    let on = null;
    let pinned = false;

    function close() {
      if (on) on.classList.remove("ro-on");
      on = null;
      pinned = false;
      box.hidden = true;
    }

    function write(token, row) {
      if (on) on.classList.remove("ro-on");
      on = token;
      on.classList.add("ro-on");
      const list = M.tokensOf(row);
      const one = list[Number(token.dataset.at)];
      const quoted = Report.el("code", {dir: "auto"});
      T.append(
        quoted,
        one.text === "" ? "no text: part of the next character" : `\u201c${shown(one.text)}\u201d`,
      );
      box.replaceChildren(
        quoted,
        Report.el(
          "dl",
          {},
          factsOf(row, one, list.length).map(([label, value]) => [
            Report.el("dt", {}, label),
            Report.el("dd", {}, value),
          ]),
        ),
      );
      box.hidden = false;
      place(box, token);
    }

    function pin(token, row) {
      if (!token) return;
      write(token, row);
      pinned = true;
    }

    return {
      box,
      close,
      pin,
      show: (token, row) => !pinned && write(token, row),
      leave: () => !pinned && close(),
      moved: () => (pinned ? place(box, on) : close()),
      toggle: (token, row) => (pinned && on === token ? close() : pin(token, row)),
    };
  }

  function place(box, token) {
    const spot = token.getClientRects()[0] || token.getBoundingClientRect();
    const width = box.offsetWidth;
    const below = spot.bottom + 6 + box.offsetHeight < window.innerHeight;
    box.style.left = Math.max(8, Math.min(spot.left, window.innerWidth - width - 8)) + "px";
    box.style.top = (below ? spot.bottom + 6 : Math.max(8, spot.top - 6 - box.offsetHeight)) + "px";
  }

  // The scale of a measure: swatches with their values.
  function legend(measure, top) {
    const {unit, scale} = M.MEASURES[measure];
    const steps = scale(top);
    const words = steps
      .filter((step) => step.label)
      .map((step) => step.label)
      .join(", ");
    return Report.el(
      "div",
      {
        class: "ro-legend",
        "data-measure": measure,
        role: "img",
        "aria-label": `Colour scale: ${unit}; ${words}`,
      },
      Report.el("span", {class: "ro-unit"}, unit),
      Report.el(
        "span",
        {class: "ro-scale"},
        steps.map(({level, above, label}) =>
          Report.el(
            "span",
            {class: "ro-step"},
            Report.el("i", {class: `ro-t l${level}` + (above ? " above" : "")}),
            Report.el("b", {}, label),
          ),
        ),
      ),
    );
  }

  return {block, exact, factsOf, legend, shown, tooltip, valueOf};
})();
