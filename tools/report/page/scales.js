// Ranges, ticks, and the way from values to pixels.
"use strict";

Report.scales = (() => {
  // The smallest of 1, 2, 5 times a power of ten that cuts `span` into at most `count` pieces.
  function stepSize(span, count) {
    const power = 10 ** Math.floor(Math.log10(span / count));
    return [1, 2, 5, 10].map((digit) => digit * power).find((size) => span / size <= count);
  }

  function ticks(low, high, count) {
    const size = stepSize(high - low, count);
    const first = Math.ceil(low / size - 1e-9);
    const last = Math.floor(high / size + 1e-9);
    const clean = (value) => Number(value.toPrecision(12));
    return Array.from({length: last - first + 1}, (_, k) => clean((first + k) * size));
  }

  // Whole steps alone.
  function stepTicks(low, high, count) {
    if (high <= low) return [low];
    return ticks(low, high, count).filter((tick) => Number.isInteger(tick));
  }

  // Powers of ten, thinned to about six, and the digits between them where there is room.
  function logTicks(low, high) {
    const decades = Math.log10(high / low);
    const first = Math.floor(Math.log10(low));
    const last = Math.ceil(Math.log10(high));
    const digits = decades < 2 ? [1, 2, 5] : decades < 3.5 ? [1, 3] : [1];
    const every = Math.ceil(decades / 7);
    const found = [];
    for (let power = first; power <= last; power += every)
      for (const digit of digits) found.push(Number((digit * 10 ** power).toPrecision(3)));
    return found.filter((tick) => tick >= low * 0.999 && tick <= high * 1.001);
  }

  function extent(lists) {
    let low = Infinity;
    let high = -Infinity;
    for (const list of lists)
      for (const value of list) {
        if (value === null || !Number.isFinite(value)) continue;
        if (value < low) low = value;
        if (value > high) high = value;
      }
    return low <= high ? [low, high] : null;
  }

  // The range of an axis: from zero where zero is near, shares up to one, never empty.
  function roomy([low, high], percent) {
    if (low >= 0 && low < 0.4 * high) low = 0;
    if (percent && high > 0.8 && high <= 1) high = 1;
    if (low === high) {
      const room = Math.abs(low) * 0.1 || (percent ? 0.1 : 1);
      if (low === 0) return [0, percent ? 1 : room];
      return [low - room, high + room];
    }
    const room = 0.04 * (high - low);
    return [low === 0 ? 0 : low - room, percent && high === 1 ? 1 : high + room];
  }

  function linear(low, high, from, to) {
    const factor = (to - from) / (high - low || 1);
    const scale = (value) => from + (value - low) * factor;
    scale.invert = (place) => low + (place - from) / factor;
    return scale;
  }

  function logarithmic(low, high, from, to) {
    const inner = linear(Math.log10(low), Math.log10(high), from, to);
    return (value) => inner(Math.log10(value));
  }

  // Positive everywhere, with the largest at least twenty times the smallest.
  function spansDecades(lists) {
    const range = extent(lists);
    return range !== null && range[0] > 0 && range[1] / range[0] >= 20;
  }

  // The place in sorted `steps` that is nearest to `step`.
  function nearest(steps, step) {
    let low = 0;
    let high = steps.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (steps[middle] < step) low = middle + 1;
      else high = middle;
    }
    if (low > 0 && step - steps[low - 1] <= steps[low] - step) return low - 1;
    return low;
  }

  return {ticks, stepTicks, logTicks, extent, roomy, linear, logarithmic, spansDecades, nearest};
})();
