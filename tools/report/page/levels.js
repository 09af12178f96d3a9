// What a token can be coloured by: its values in a row, their levels on a fixed scale, and the same in words.
"use strict";

Report.levels = (() => {
  const {isNumber, largest, mean, splitOf, text} = Report.groups;
  const LEVELS = 8; // 0: no colour
  const PROBABILITIES = [0.99, 0.9, 0.75, 0.5, 0.25, 0.1, 0.01, 0.001];
  const SIZES = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1];
  const SHARE = 0.99; // of the run's tokens lie below the end of a linear scale

  const number = (value) => Report.number(value, 3);
  const signed = (value) => (value > 0 ? "+" : "") + number(value);
  const unknown = (values) => values.filter((value) => !isNumber(value)).length; // NaN of the run is null
  const tokens = (count) => Report.count(count) + (count === 1 ? " token" : " tokens");

  function sampledOf(row, total) {
    const turns = Array.isArray(row.turns) ? row.turns : [];
    const sizes = turns.map((turn) => turn.num_tokens);
    if (!turns.length || sizes.some((size) => !Number.isInteger(size) || size < 0)) return null;
    if (sizes.reduce((sum, size) => sum + size, 0) !== total) return null;
    return turns.flatMap((turn) => Array(turn.num_tokens).fill(Boolean(turn.sampled)));
  }

  const known = new WeakMap(); // tokens by row

  // One entry a token: its text, whether it was sampled, and its place among the sampled tokens.
  function tokensOf(row) {
    if (!known.has(row)) known.set(row, readTokens(row));
    return known.get(row);
  }

  function readTokens(row) {
    if (!Array.isArray(row.token_texts) || !row.token_texts.length) return null;
    const sampled = sampledOf(row, row.token_texts.length);
    let place = 0;
    return row.token_texts.map((said, at) => {
      const own = sampled === null || sampled[at];
      return {at, text: text(said), sampled: own, place: own ? place++ : -1};
    });
  }

  // The turns of an answer with their tokens; a conversation whose turns do not say how many is one turn.
  function turnsOf(row) {
    const list = tokensOf(row);
    const turns = Array.isArray(row.turns) ? row.turns : [];
    if (!turns.length) return [{sampled: true, text: text(row.response), tokens: list}];
    if (list && !sampledOf(row, list.length))
      return [{sampled: true, text: text(row.response), tokens: list}];
    let from = 0;
    return turns.map((turn) => {
      const own = list && list.slice(from, from + turn.num_tokens);
      from += turn.num_tokens || 0;
      return {sampled: Boolean(turn.sampled), text: text(turn.text), tokens: own};
    });
  }

  function listed(row, field, absent) {
    const list = tokensOf(row);
    const values = row[field];
    if (!list || !Array.isArray(values)) return {why: absent(row)};
    const count = list.filter((token) => token.sampled).length;
    if (values.length !== count)
      return {why: `The row has ${values.length} values for ${tokens(count)}: it is damaged.`};
    return {values};
  }

  function advantagesOf(row) {
    if (Array.isArray(row.token_advantages)) return listed(row, "token_advantages", () => "");
    if (!isNumber(row.advantage))
      return {
        why: splitOf(row) === "eval" ? "An evaluation has no advantages." : "The row has no advantage.",
      };
    const list = tokensOf(row) || [];
    return {values: list.filter((token) => token.sampled).map(() => row.advantage), uniform: row.advantage};
  }

  const ofTraining = (what) => (row) =>
    splitOf(row) === "eval" ? `${what} is known for training rollouts only.` : `${what} is not in this row.`;

  function linear(value, top) {
    return top > 0 ? Math.min(LEVELS, Math.ceil((LEVELS * Math.abs(value)) / top - 1e-9)) : 0;
  }

  function place(values, pick) {
    return values.reduce(
      (best, value, at) => (isNumber(value) && (best < 0 || pick(value, values[best])) ? at : best),
      -1,
    );
  }

  function namedToken(row, at) {
    const token = tokensOf(row).find((other) => other.place === at);
    return {
      at: token.at,
      words: `token ${token.at + 1} \u201c${Report.printable.visible(Report.rolloutTokens.shown(token.text.slice(0, 40)))}\u201d`,
    };
  }

  const MEASURES = {
    logprob: {
      title: "logprob",
      unit: "probability of the token when it was sampled",
      of: (row) => listed(row, "logprobs", () => "The row has no logprobs."),
      level: (value) => PROBABILITIES.filter((bound) => Math.exp(value) < bound).length,
      scale: () =>
        PROBABILITIES.map((bound, at) => ({level: at, label: "\u2265 " + bound})).concat({
          level: LEVELS,
          label: "less",
        }),
      words(row, values) {
        const least = place(values, (a, b) => a < b);
        const {at, words} = namedToken(row, least);
        return [
          `${tokens(values.length)}: mean logprob ${number(mean(values))}; the least likely is `,
          at,
          words,
          `, probability ${number(Math.exp(values[least]))}`,
        ];
      },
    },
    advantage: {
      title: "advantage",
      unit: "advantage: orange below 0, blue above",
      diverging: true,
      of: advantagesOf,
      level: linear,
      scale: (top) => diverging((at) => signed((at * top) / LEVELS), [0, LEVELS / 2, LEVELS]),
      words(row, values) {
        if (new Set(values).size === 1)
          return [`all ${tokens(values.length)}: advantage ${signed(values[0])}`];
        const most = place(values, (a, b) => Math.abs(a) > Math.abs(b));
        const {at, words} = namedToken(row, most);
        return [
          `${tokens(values.length)}: mean advantage ${signed(mean(values))}; the largest is `,
          at,
          words,
          `, ${signed(values[most])}`,
        ];
      },
    },
    entropy: {
      title: "entropy",
      unit: "entropy of the trainer\u2019s distribution at the token [nats]",
      of: (row) => listed(row, "entropies", ofTraining("Entropy")),
      level: linear,
      scale: (top) =>
        Array.from({length: LEVELS + 1}, (_, at) => ({
          level: at,
          label: at % 2 ? "" : (at === LEVELS ? "\u2265 " : "") + number((at * top) / LEVELS),
        })),
      words(row, values) {
        const most = place(values, (a, b) => a > b);
        const {at, words} = namedToken(row, most);
        return [
          `${tokens(values.length)}: mean entropy ${number(mean(values))}; the highest is at `,
          at,
          words,
          `, ${number(values[most])}`,
        ];
      },
    },
    difference: {
      title: "trainer \u2212 generator",
      unit: "trainer\u2019s logprob minus the generator\u2019s: orange below 0, blue above",
      diverging: true,
      of: (row) => listed(row, "logprob_diffs", ofTraining("The difference")),
      level: (value) => (value === 0 ? 0 : 1 + SIZES.filter((bound) => Math.abs(value) >= bound).length),
      scale: () =>
        diverging(
          (at) => (at ? (at < 0 ? "\u2212" : "+") + number(SIZES[Math.abs(at) - 2]) : "0"),
          [0, 2, 5, 8],
        ),
      words(row, values) {
        const differing = values.filter((value) => isNumber(value) && value !== 0).length;
        if (!differing) return [`all ${tokens(values.length - unknown(values))}: difference 0`];
        const most = place(values, (a, b) => Math.abs(a) > Math.abs(b));
        const {at, words} = namedToken(row, most);
        return [
          `${Report.count(differing)} of ${tokens(values.length)} differ; the largest is at `,
          at,
          words,
          `, ${signed(values[most])}`,
        ];
      },
    },
  };

  // Swatches from the lowest level below 0 to the highest above; labels at some of them.
  function diverging(label, labelled) {
    return Array.from({length: 2 * LEVELS + 1}, (_, index) => index - LEVELS).map((at) => ({
      level: Math.abs(at),
      above: at > 0,
      label: labelled.includes(Math.abs(at)) ? label(at) : "",
    }));
  }

  function topOf(rows, measure) {
    const all = rows.flatMap((row) => {
      const {values, uniform} = MEASURES[measure].of(row);
      return uniform !== undefined ? [Math.abs(uniform)] : (values || []).filter(isNumber).map(Math.abs);
    });
    if (!all.length) return 1;
    all.sort((a, b) => a - b);
    const end = all[Math.min(all.length - 1, Math.floor(SHARE * all.length))] || largest(all) || 1;
    return Number(end.toPrecision(2));
  }

  // Ends of the linear scales, the same for all rollouts of a run.
  function scalesOf(rows) {
    const tops = new Map();
    return (measure) => {
      if (!tops.has(measure))
        tops.set(measure, ["advantage", "entropy"].includes(measure) ? topOf(rows, measure) : 0);
      return tops.get(measure);
    };
  }

  function classOf(measure, value, top) {
    if (!isNumber(value)) return "";
    const level = MEASURES[measure].level(value, top);
    return level ? `l${level}` + (MEASURES[measure].diverging && value > 0 ? " above" : "") : "";
  }

  // What a measure says of a row: texts around the index and the name of a token, if it names one.
  function wordsOf(measure, row) {
    const {title, of, words} = MEASURES[measure];
    const {values, why} = of(row);
    if (!values) return [`${title}: ${why}`];
    if (!values.length) return [`${title}: no token was sampled.`];
    const lost = unknown(values);
    if (lost === values.length) return [`${title}: none of ${tokens(lost)} has a finite value.`];
    const [begin, at, named, end] = words(row, values);
    return [lost ? `${tokens(lost)} without a finite value; ${begin}` : begin, at, named, end];
  }

  return {MEASURES, classOf, scalesOf, signed, tokensOf, turnsOf, wordsOf};
})();
