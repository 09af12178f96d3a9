// Texts of a run as a reader has to see them: newlines kept, and characters that no font draws made
// visible. Bidirectional controls are named instead of obeyed, so a text cannot rearrange the page.
"use strict";

Report.printable = (() => {
  const HEAD = 3000; // characters of a long text that are shown before it is asked for
  const TAIL = 600; // and of its end: truncation and loops are seen there
  const PIECE = 20000; // characters a text node

  const EMOJI =
    String.raw`\u{1F3F4}[\u{E0020}-\u{E007E}]{1,8}\u{E007F}|[0-9#*]\uFE0F\u20E3|` +
    String.raw`\p{Extended_Pictographic}[\u{1F3FB}-\u{1F3FF}]?\uFE0F?(?:\u200D\p{Extended_Pictographic}[\u{1F3FB}-\u{1F3FF}]?\uFE0F?)*`;
  const DRAWN = String.raw`[\n\t\u0600-\u0605\u06DD\u070F\u08E2]`; // controls and formats that have a shape
  const HIDDEN = String.raw`[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Cn}\p{Zl}\p{Zp}\u034F\u115F\u1160\u17B4\u17B5\u180B-\u180F\u2800\u3164\uFFA0\uFE00-\uFE0F\u{E0100}-\u{E01EF}]`;
  const SPECIAL = new RegExp(`(${EMOJI})|(${DRAWN})|(${HIDDEN})`, "gu");
  const JOINERS = {"\u200C": "zero width non-joiner", "\u200D": "zero width joiner"};
  const NAMES = {
    0x00: "null",
    0x07: "bell",
    0x08: "backspace",
    0x0b: "vertical tab",
    0x0c: "form feed",
    0x0d: "carriage return",
    0x1b: "escape",
    0x7f: "delete",
    0x85: "next line",
    0xad: "soft hyphen",
    0x34f: "combining grapheme joiner",
    0x61c: "Arabic letter mark",
    0x200b: "zero width space",
    0x200c: "zero width non-joiner",
    0x200d: "zero width joiner",
    0x200e: "left-to-right mark",
    0x200f: "right-to-left mark",
    0x2028: "line separator",
    0x2029: "paragraph separator",
    0x202a: "left-to-right embedding",
    0x202b: "right-to-left embedding",
    0x202c: "pop directional formatting",
    0x202d: "left-to-right override",
    0x202e: "right-to-left override",
    0x2060: "word joiner",
    0x2066: "left-to-right isolate",
    0x2067: "right-to-left isolate",
    0x2068: "first strong isolate",
    0x2069: "pop directional isolate",
    0x2800: "blank Braille pattern",
    0x3164: "Hangul filler",
    0xfeff: "byte order mark",
  };
  const SHORT = {
    0xad: "SHY",
    0x200b: "ZWSP",
    0x200e: "LRM",
    0x200f: "RLM",
    0x2028: "LS",
    0x2029: "PS",
    0x202a: "LRE",
    0x202b: "RLE",
    0x202c: "PDF",
    0x202d: "LRO",
    0x202e: "RLO",
    0x2060: "WJ",
    0x2066: "LRI",
    0x2067: "RLI",
    0x2068: "FSI",
    0x2069: "PDI",
    0xfeff: "BOM",
    0x61c: "ALM",
    0x200c: "ZWNJ",
    0x200d: "ZWJ",
  };

  const hex = (code) => "U+" + code.toString(16).toUpperCase().padStart(4, "0");
  const isSurrogate = (code) => code >= 0xd800 && code <= 0xdfff;

  function nameOf(code) {
    const name =
      NAMES[code] ||
      (isSurrogate(code) ? "lone surrogate" : code < 0xa0 ? "control character" : "invisible character");
    return hex(code) + " " + name;
  }

  function sign(code) {
    if (code < 0x20) return String.fromCharCode(0x2400 + code);
    if (code === 0x7f) return "\u2421";
    if (isSurrogate(code)) return "\uFFFD" + code.toString(16).toUpperCase();
    return SHORT[code] || hex(code);
  }

  // A character that is not drawn. Joiners stay in place, for letters beside them take their shape from them.
  function mark(character) {
    const code = character.codePointAt(0);
    const joiner = Object.hasOwn(JOINERS, character);
    const shown = joiner ? character : sign(code);
    const kind = joiner ? " ro-joiner" : shown.length === 1 ? " ro-picture" : "";
    return Report.el("span", {class: "ro-mark" + kind, title: nameOf(code), "data-code": hex(code)}, shown);
  }

  function append(node, text) {
    let from = 0;
    for (const found of text.matchAll(SPECIAL)) {
      if (found[3] === undefined) continue;
      if (found.index > from) node.append(text.slice(from, found.index));
      node.append(mark(found[3]));
      from = found.index + found[3].length;
    }
    if (from < text.length) node.append(text.slice(from));
  }

  // The same as one text without elements, for attributes and single lines.
  function visible(text) {
    return text.replace(SPECIAL, (all, emoji, drawn, hidden) => {
      if (hidden === undefined) return all;
      const shown = sign(all.codePointAt(0));
      return shown.length === 1 ? shown : `\u2039${shown}\u203a`;
    });
  }

  const escaped = (text) => text.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&");
  const matcher = (query, flags = "") => new RegExp(escaped(query), "iu" + flags);

  function rangesOf(text, query) {
    return query
      ? [...text.matchAll(matcher(query, "g"))].map((found) => [found.index, found.index + found[0].length])
      : [];
  }

  // Appends the text with every match of the query in a mark.
  function appendMatching(node, text, query) {
    let from = 0;
    for (const [begin, end] of rangesOf(text, query)) {
      append(node, text.slice(from, begin));
      const hit = Report.el("mark", {class: "ro-hit"});
      append(hit, text.slice(begin, end));
      node.append(hit);
      from = end;
    }
    append(node, text.slice(from));
  }

  const breaksPair = (text, at) =>
    at > 0 && at < text.length && isSurrogate(text.codePointAt(at)) && text.codePointAt(at - 1) > 0xffff;
  const whole = (text, at) => (breaksPair(text, at) ? at + 1 : at);

  function fold(text) {
    if (text.length <= HEAD + 2 * TAIL) return null;
    return [whole(text, HEAD), whole(text, text.length - TAIL)];
  }

  // Pieces of a long text go into the page one after the other, so that it stays alive meanwhile.
  function inPieces(total, size, add) {
    let done = 0;
    function next() {
      const upTo = Math.min(done + size, total);
      add(done, upTo);
      done = upTo;
      if (done < total) setTimeout(next, 0);
    }
    next();
  }

  function moreButton(sentence, show) {
    return Report.el("button", {type: "button", class: "ro-more", onclick: show}, sentence);
  }

  function fill(node, text, query) {
    inPieces(text.length, PIECE, (from, to) =>
      appendMatching(node, text.slice(whole(text, from), whole(text, to)), query),
    );
  }

  // A block of text; a long one shows its head and its end, and the rest when it is asked for.
  function block(text, query = "", className = "ro-text") {
    const node = Report.el("div", {class: className, dir: "auto"});
    const cut = fold(text);
    if (!cut) {
      fill(node, text, query);
      return node;
    }
    appendMatching(node, text.slice(0, cut[0]), query);
    const hits = rangesOf(text.slice(...cut), query).length;
    const found = hits ? ` (${Report.count(hits)} of the matches are there)` : "";
    node.append(
      moreButton(`\u2026 show all ${Report.count(text.length)} characters${found} \u2026`, () => {
        node.replaceChildren();
        fill(node, text, query);
      }),
    );
    appendMatching(node, text.slice(cut[1]), query);
    return node;
  }

  // One line for lists: white space is one space, and the end is cut.
  function excerpt(text, most = 160) {
    const line = text
      .slice(0, 4 * most)
      .replace(/\s+/g, " ")
      .trim();
    const cut = whole(line, most);
    return visible(line.length > cut ? line.slice(0, cut) + "\u2026" : line);
  }

  return {
    append,
    appendMatching,
    block,
    excerpt,
    hex,
    inPieces,
    matcher,
    moreButton,
    nameOf,
    rangesOf,
    visible,
  };
})();
