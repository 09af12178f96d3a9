// Numbers as text: short, with the digits that matter.
"use strict";

(() => {
  const SIZES = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];

  const signed = (text) => text.replace("-", "\u2212");
  const plain = (value) => String(Number(value));

  // Four significant digits; k, M, G from ten thousand; powers of ten below a ten thousandth.
  Report.number = (value, digits = 4) => {
    if (value === null || value === undefined || !Number.isFinite(value)) return "\u2013";
    const size = Math.abs(value);
    if (size >= 1e15 || (size > 0 && size < 1e-4)) {
      const [head, power] = value.toExponential(Math.min(digits - 1, 2)).split("e");
      return signed(plain(head) + "e" + Number(power));
    }
    const unit = size >= 1e4 ? SIZES.find(([least]) => size >= least) : null;
    if (unit) return signed(plain((value / unit[0]).toPrecision(Math.min(digits, 3))) + unit[1]);
    return signed(plain(value.toPrecision(digits)));
  };

  Report.percent = (value, digits = 3) => {
    if (value === null || value === undefined || !Number.isFinite(value)) return "\u2013";
    const text = plain((100 * value).toPrecision(digits));
    return signed(Math.abs(value) >= 1 ? plain((100 * value).toFixed(1)) : text) + "%";
  };

  Report.seconds = (value) => {
    if (value === null || value === undefined || !Number.isFinite(value)) return "\u2013";
    if (value < 0.0995) return Number((1000 * value).toPrecision(2)) + " ms";
    if (value < 120) return Number(value.toPrecision(3)) + " s";
    if (value < 7200) return Math.floor(value / 60) + " min " + Math.round(value % 60) + " s";
    return Math.floor(value / 3600) + " h " + Math.round((value % 3600) / 60) + " min";
  };

  // A whole number in full, in groups of three digits.
  Report.count = (value) => String(value).replace(/\B(?=(\d{3})+$)/g, ",");
})();
