// What is new in an answer beside an earlier one: the tokens outside a longest common subsequence.
"use strict";

Report.newTokens = (() => {
  const MOST = 4e6; // cells of the table: beyond, only a common beginning and end are recognized

  function common(before, after) {
    const most = Math.min(before.length, after.length);
    let head = 0;
    while (head < most && before[head] === after[head]) head++;
    let tail = 0;
    while (tail < most - head && before[before.length - 1 - tail] === after[after.length - 1 - tail]) tail++;
    return [head, tail];
  }

  // lengths[i][j]: of the longest common subsequence of before[i:] and after[j:].
  function lengthsOf(before, after) {
    const lengths = Array.from({length: before.length + 1}, () => new Uint32Array(after.length + 1));
    for (let i = before.length - 1; i >= 0; i--)
      for (let j = after.length - 1; j >= 0; j--)
        lengths[i][j] =
          before[i] === after[j] ? lengths[i + 1][j + 1] + 1 : Math.max(lengths[i + 1][j], lengths[i][j + 1]);
    return lengths;
  }

  function outside(before, after) {
    if (before.length * after.length > MOST) return after.map((_, j) => j);
    const lengths = lengthsOf(before, after);
    const fresh = [];
    let i = 0;
    for (let j = 0; j < after.length; ) {
      if (i < before.length && before[i] === after[j]) {
        i++;
        j++;
      } else if (i < before.length && lengths[i + 1][j] >= lengths[i][j + 1]) i++;
      else fresh.push(j++);
    }
    return fresh;
  }

  // Indices into `after` of the texts that are new.
  function freshIn(before, after) {
    const [head, tail] = common(before, after);
    const middle = (texts) => texts.slice(head, texts.length - tail);
    return outside(middle(before), middle(after)).map((at) => at + head);
  }

  return {freshIn};
})();
