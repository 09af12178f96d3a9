// Numbers as text: short, with the digits that matter.
"use strict";

(() => {
  const SIZES = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];

  const signed = (text) => text.replaceAll("-", "\u2212");
  const plain = (value) => String(Number(value));

  // Four significant digits, or three with a unit or an exponent; k, M, G from ten thousand; powers of ten below a ten thousandth.
  Report.number = (value, digits = 4) => {
    if (value === null || value === undefined || !Number.isFinite(value)) return "\u2013";
    const size = Math.abs(value);
    if (size >= 1e15 || (size > 0 && size < 1e-4)) {
      const [head, power] = value.toExponential(digits - 2).split("e");
      return signed(plain(head) + "e" + Number(power));
    }
    const unit = size >= 1e4 ? SIZES.find(([least]) => size >= least) : null;
    if (unit) return signed(plain((value / unit[0]).toPrecision(digits - 1)) + unit[1]);
    return signed(plain(value.toPrecision(digits)));
  };

  Report.percent = (value, digits = 3) => {
    if (value === null || value === undefined || !Number.isFinite(value)) return "\u2013";
    return signed(plain((100 * value).toPrecision(Math.abs(value) >= 1 ? digits + 1 : digits))) + "%";
  };

  Report.seconds = (value) => {
    if (value === null || value === undefined || !Number.isFinite(value)) return "\u2013";
    if (value < 0.0995) return Number((1000 * value).toPrecision(2)) + " ms";
    if (value < 120) return Number(value.toPrecision(3)) + " s";
    const whole = Math.round(value < 7200 ? value : value / 60);
    const units = value < 7200 ? [" min ", " s"] : [" h ", " min"];
    return Math.floor(whole / 60) + units[0] + (whole % 60) + units[1];
  };

  // A whole number in full, in groups of three digits.
  Report.count = (value) => String(value).replace(/\B(?=(\d{3})+$)/g, ",");
})();
