// The numbers behind the colours of an answer, as a table that is made when it is opened.
"use strict";

Report.rolloutTable = (() => {
  const T = Report.printable;
  const V = Report.levels;
  const el = Report.el;
  const PAGE = 200; // rows that are added at once
  const MEASURES = ["logprob", "entropy", "difference", "advantage"];

  // {title, text(token, values): of a sampled token, whose values are by measure}
  function columnsOf(row) {
    const {exact} = Report.rolloutTokens;
    const known = MEASURES.filter((measure) => V.MEASURES[measure].of(row).values);
    const columns = known.map((measure) => ({
      title: V.MEASURES[measure].title,
      text: (values) => exact(values[measure], measure),
    }));
    const probability = {title: "probability", text: ({logprob}) => Report.percent(Math.exp(logprob ?? NaN))};
    if (known.includes("logprob")) columns.splice(1, 0, probability);
    return columns;
  }

  function valuesOf(row, token) {
    return Object.fromEntries(
      MEASURES.map((measure) => [measure, Report.rolloutTokens.valueOf(row, measure, token)]),
    );
  }

  const number = (text) => el("td", {class: "number"}, text);

  function line(row, token, columns, withIds) {
    const said = T.visible(Report.rolloutTokens.shown(token.text));
    const values = token.sampled && valuesOf(row, token);
    const cells = values
      ? columns.map((column) => number(column.text(values)))
      : el("td", {colspan: columns.length, class: "muted"}, "reply, not sampled");
    return el(
      "tr",
      {},
      number(String(token.at + 1)),
      el("td", {}, el("code", {dir: "auto"}, said)),
      withIds ? number(String(row.tokens[token.at])) : null,
      cells,
    );
  }

  function filled(row) {
    const tokens = V.tokensOf(row);
    const columns = columnsOf(row);
    const withIds = Array.isArray(row.tokens);
    const body = el("tbody");
    const more = T.moreButton("", grow);
    let shown = 0;
    function grow() {
      body.append(...tokens.slice(shown, shown + PAGE).map((token) => line(row, token, columns, withIds)));
      shown = Math.min(tokens.length, shown + PAGE);
      const left = tokens.length - shown;
      more.hidden = left === 0;
      more.textContent = `Show ${Math.min(PAGE, left)} more of ${Report.count(left)}`;
    }
    grow();
    const titles = ["token", "text", ...(withIds ? ["id"] : []), ...columns.map(({title}) => title)];
    const heads = titles.map((title) => el("th", {scope: "col"}, title));
    return el(
      "div",
      {class: "scroll tall"},
      el("table", {}, el("thead", {}, el("tr", {}, heads)), body),
      more,
    );
  }

  function table(row) {
    const box = el("details", {class: "ro-table"}, el("summary", {}, "Tokens as a table"));
    box.addEventListener("toggle", () => {
      if (box.open && box.children.length === 1) box.append(filled(row));
    });
    return box;
  }

  return {table};
})();
