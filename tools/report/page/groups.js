// Rollouts as groups and questions: pure functions of the rows of a run.
"use strict";

Report.groups = (() => {
  const CUT = {
    length: "cut at the most new tokens",
    context: "cut: the context is full",
    tokens: "cut at the most tokens of a rollout",
  };
  const LEAST_LOOP = 48; // characters that a repeated end must have
  const LEAST_REPEATS = 4;
  const LONGEST_PERIOD = 200;

  const isTruncated = (row) => Object.hasOwn(CUT, row.finish_reason);
  const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
  const text = (value) => (value === null || value === undefined ? "" : String(value));
  const splitOf = (row) => row.split || "train";

  function mean(values) {
    const known = values.filter(isNumber);
    return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : null;
  }

  function spread(values) {
    const middle = mean(values);
    return middle === null ? null : Math.sqrt(mean(values.map((value) => (value - middle) ** 2)));
  }

  function largest(values) {
    return values.reduce((most, value) => (isNumber(value) && value > most ? value : most), -Infinity);
  }

  // A message's content is a text or a list of parts; whatever else it has is shown as JSON.
  function contentOf(message) {
    const content = message.content;
    const shown = Array.isArray(content)
      ? content.map((part) => (typeof part.text === "string" ? part.text : JSON.stringify(part))).join("\n")
      : typeof content === "string"
        ? content
        : content === undefined || content === null
          ? ""
          : JSON.stringify(content);
    const rest = Object.entries(message).filter(([name]) => name !== "role" && name !== "content");
    const more = rest.map(
      ([name, value]) => name + ": " + (typeof value === "string" ? value : JSON.stringify(value)),
    );
    return [shown, ...more].filter(Boolean).join("\n");
  }

  function messagesOf(row) {
    if (Array.isArray(row.messages) && row.messages.length) {
      return row.messages.map((message) => ({
        role: text(message.role) || "message",
        text: contentOf(message),
      }));
    }
    return [{role: "prompt", text: text(row.prompt)}];
  }

  function questionOf(row) {
    const messages = messagesOf(row);
    const asked = messages.filter((message) => message.role === "user");
    return (asked.length ? asked : messages).at(-1).text;
  }

  // All that the text filter looks into.
  function haystack(row) {
    const said = messagesOf(row).map((message) => message.text);
    const turns = Array.isArray(row.turns) ? row.turns.map((turn) => text(turn.text)) : [];
    return [...said, text(row.prompt), text(row.response), ...turns, text(row.answer)].join("\n");
  }

  // The shortest piece whose repetition ends the text, or null: {period, times}.
  function loopOf(whole) {
    const end = whole.trimEnd().slice(-4 * LONGEST_PERIOD);
    for (let period = 1; period <= Math.min(LONGEST_PERIOD, end.length / LEAST_REPEATS); period++) {
      let same = 0;
      while (same + period < end.length && end[end.length - 1 - same] === end[end.length - 1 - same - period])
        same++;
      const covered = same + period;
      if (covered >= Math.max(LEAST_LOOP, LEAST_REPEATS * period))
        return {period, times: Math.floor(covered / period)};
    }
    return null;
  }

  function saidIn(row) {
    if (!Array.isArray(row.turns) || !row.turns.length) return text(row.response);
    return row.turns
      .filter((turn) => turn.sampled)
      .map((turn) => text(turn.text))
      .join("");
  }

  const largestDifference = (row) =>
    Array.isArray(row.logprob_diffs) ? largest(row.logprob_diffs.map((value) => Math.abs(value))) : -Infinity;

  // What a reader of rollouts looks for: each a test of one row.
  const SIGNS = {
    truncated: ["Truncated", "The rollout was cut before its end", isTruncated],
    loop: [
      "Repeats itself",
      "The end of the answer is one piece, repeated four times or more",
      (row) => loopOf(saidIn(row)) !== null,
    ],
    hack: [
      "Rewarded but wrong",
      "The reward is above 0, yet the answer is not correct: partial credit, or a reward that is gamed",
      (row) => row.correct === false && row.reward > 0,
    ],
    unpaid: [
      "Correct, no reward",
      "The answer is correct, yet the reward is 0 or less",
      (row) => row.correct === true && row.reward <= 0,
    ],
    empty: ["Empty answer", "The answer has no visible character", (row) => !saidIn(row).trim()],
    mismatch: [
      "Trainer differs",
      "A token's logprob differs between trainer and generator",
      (row) => largestDifference(row) > 0,
    ],
    dropped: ["Not trained on", "The group was left out of the update", (row) => Boolean(row.left_out)],
  };

  const SORTS = {
    step: ["step, first to last", (group) => [group.step]],
    "-step": ["step, last to first", (group) => [-group.step]],
    "-reward": ["mean reward, high to low", (group) => [-(group.reward ?? -Infinity), group.step]],
    reward: ["mean reward, low to high", (group) => [group.reward ?? Infinity, group.step]],
    spread: ["spread of rewards, wide to narrow", (group) => [-(group.spread ?? -1), group.step]],
    length: ["length, long to short", (group) => [-(group.length ?? -1), group.step]],
    difference: ["largest difference", (group) => [-group.difference, group.step]],
  };

  function groupOf(id, rows) {
    const first = rows[0];
    const sorted = [...rows].sort((a, b) => a.sample_id - b.sample_id);
    const sampled = sorted.filter((row) => row.sample_id >= 0);
    const counted = sampled.length ? sampled : sorted;
    const rewards = counted.map((row) => row.reward);
    return {
      id,
      rows: sorted,
      first,
      step: first.step,
      split: splitOf(first),
      set: text(first.set),
      chosen: first.chosen || (splitOf(first) === "eval" ? "fixed" : "first"),
      question: questionOf(first),
      reward: mean(rewards),
      spread: spread(rewards),
      length: mean(counted.map((row) => row.length)),
      counted,
      difference: largest(sorted.map(largestDifference)),
    };
  }

  function idOf(row) {
    const place = [splitOf(row), row.step, row.prompt_id].join("-");
    return row.set ? place + "-" + row.set : place;
  }

  function gathered(rows, keyOf) {
    const found = new Map();
    for (const row of rows) {
      const key = keyOf(row);
      if (found.has(key)) found.get(key).push(row);
      else found.set(key, [row]);
    }
    return found;
  }

  function groupsOf(rows) {
    const groups = [...gathered(rows, idOf)].map(([id, members]) => groupOf(id, members));
    const nearest = (a, b) => a.step - b.step || a.split.localeCompare(b.split) || a.set.localeCompare(b.set);
    return groups.sort((a, b) => nearest(a, b) || a.first.prompt_id - b.first.prompt_id);
  }

  // Best, typical and worst of a step: as the run chose them, else by the means of the groups that are there.
  function stepOf(step, groups) {
    const ranked = groups.filter((group) => group.reward !== null).sort((a, b) => b.reward - a.reward);
    const of = (chosen) => groups.find((group) => group.chosen === chosen);
    const best = of("best") || (of("worst") ? undefined : ranked[0]);
    const worst = of("worst") || (ranked.length > 1 ? ranked.at(-1) : undefined);
    const others = ranked.filter((group) => group !== best && group !== worst);
    return {
      step,
      groups,
      best,
      worst: worst === best ? undefined : worst,
      typical: others[Math.floor(others.length / 2)],
    };
  }

  function stepsOf(groups) {
    const training = groups.filter((group) => group.split === "train");
    return [...gathered(training, (group) => group.step)].map(([step, members]) => stepOf(step, members));
  }

  // The same prompt at every evaluation of a set.
  function questionsOf(groups) {
    const evaluated = groups.filter((group) => group.split === "eval");
    const found = gathered(evaluated, (group) =>
      JSON.stringify([group.set, group.first.prompt_id, group.first.prompt]),
    );
    const taken = new Map();
    return [...found.values()].map((members) => {
      const [{set, first, question}] = members;
      const name = set ? first.prompt_id + "-" + set : String(first.prompt_id);
      const count = (taken.get(name) || 0) + 1;
      taken.set(name, count);
      return {id: count > 1 ? name + "~" + count : name, set, question, first, evaluations: members};
    });
  }

  const TEXTS = [
    "prompt",
    "prompt_text",
    "response",
    "answer",
    "split",
    "set",
    "chosen",
    "finish_reason",
    "left_out",
  ];
  const NUMBERS = [
    "step",
    "prompt_id",
    "sample_id",
    "reward",
    "advantage",
    "length",
    "cut",
    "task_prompt_id",
  ];
  const LISTS = ["token_texts", "tokens", "logprobs", "logprob_diffs", "entropies", "token_advantages"];
  const RECORDS = ["messages", "turns"];
  const isRecord = (value) => value !== null && typeof value === "object" && !Array.isArray(value);
  const asText = (value) => (typeof value === "string" ? value : JSON.stringify(value));

  // A row with the fields of its format, each of the type that it has there; what is damaged is left out.
  function cleaned(row) {
    const there = (names, test, as) =>
      names.filter((name) => test(row[name] ?? null)).map((name) => [name, as ? as(row[name]) : row[name]]);
    const fields = [
      ...there(TEXTS, (value) => value !== null, asText),
      ...there(NUMBERS, isNumber),
      ...there(LISTS, Array.isArray),
      ...there(RECORDS, Array.isArray, (list) => list.filter(isRecord)),
      ...there(["parts"], isRecord),
      ...there(["correct"], (value) => typeof value === "boolean"),
    ];
    return {prompt_id: 0, sample_id: 0, ...Object.fromEntries(fields)};
  }

  function modelOf(rows) {
    const whole = rows.filter((row) => isRecord(row) && isNumber(row.step)).map(cleaned);
    const groups = groupsOf(whole);
    return {rows: whole, groups, steps: stepsOf(groups), questions: questionsOf(groups)};
  }

  return {
    CUT,
    SIGNS,
    SORTS,
    contentOf,
    haystack,
    isNumber,
    isTruncated,
    largest,
    largestDifference,
    loopOf,
    mean,
    messagesOf,
    modelOf,
    saidIn,
    splitOf,
    text,
  };
})();
