// Elements. What comes from a run becomes text nodes and attribute values, and never markup.
"use strict";

(() => {
  const SVG = "http://www.w3.org/2000/svg";

  function fill(node, attributes, children) {
    for (const [name, value] of Object.entries(attributes || {})) {
      if (value === null || value === undefined || value === false) continue;
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (name === "value") node.value = value;
      else node.setAttribute(name, value === true ? "" : String(value));
    }
    for (const child of children.flat(Infinity)) {
      if (child === null || child === undefined || child === false) continue;
      node.append(child instanceof Node ? child : document.createTextNode(String(child)));
    }
    return node;
  }

  Report.el = (tag, attributes, ...children) =>
    fill(document.createElement(tag), attributes, children);
  Report.svg = (tag, attributes, ...children) =>
    fill(document.createElementNS(SVG, tag), attributes, children);

  // A text that may go to the next line behind the signs of names and paths, rather than inside a word.
  Report.breakable = (text) => String(text).split(/(?<=[_/:=])(?=\S\S)|(?<=[.,])(?=[a-z])/iu)
    .flatMap((part, k) => (k ? [Report.el("wbr"), part] : [part]));

  Report.empty = (sentence) => Report.el("p", {class: "empty"}, sentence);
})();
