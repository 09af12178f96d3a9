"""Reading a report page without a browser, and what a browser is asked about one."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """The elements of a page: (tag, attributes) in order, and the texts of scripts and styles."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, dict[str, str | None], str]] = []
        self.open: list[str] = []
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> ends {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        tag, attributes = self.elements[-1] if self.elements else ("", {})
        if self.open and self.open[-1] in ("script", "style", "title"):
            self.texts.append((tag, attributes, data))

    @property
    def data(self) -> dict[str, Any]:
        """What the page holds of its runs."""
        texts = [text for _, attributes, text in self.texts if attributes.get("id") == "data"]
        return json.loads("".join(texts))


LOW_CONTRAST = """
const pixel = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
function rgba(color) {
  pixel.clearRect(0, 0, 1, 1);
  pixel.fillStyle = color;
  pixel.fillRect(0, 0, 1, 1);
  const [r, g, b, a] = pixel.getImageData(0, 0, 1, 1).data;
  return [r, g, b, a / 255];
}
const over = ([r, g, b, a], below) => [r, g, b].map((c, k) => a * c + (1 - a) * below[k]);
function ground(node) {
  if (!node) return [255, 255, 255];
  const color = rgba(getComputedStyle(node).backgroundColor);
  return color[3] === 1 ? color.slice(0, 3) : over(color, ground(node.parentElement));
}
function opacity(node) {
  return node ? Number(getComputedStyle(node).opacity) * opacity(node.parentElement) : 1;
}
function luminance(color) {
  const linear = color.map((c) => c / 255).map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
}
function contrast(one, other) {
  const [high, low] = [luminance(one), luminance(other)].sort((a, b) => b - a);
  return (high + 0.05) / (low + 0.05);
}
function below(node) {
  const bar = node.classList.contains("inside") && node.parentElement.querySelector(".bar");
  return bar ? over(rgba(getComputedStyle(bar).fill), ground(node)) : ground(node);
}
const least = arguments[0], found = new Map();
let looked = 0;
const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walk.nextNode()) {
  const node = walk.currentNode.parentElement, text = walk.currentNode.data.trim();
  if (!text || node.closest("script, style, noscript, [hidden], :disabled") || !node.checkVisibility()) continue;
  const box = node.getBoundingClientRect();
  if (box.width < 2 || box.height < 2) continue;
  const style = getComputedStyle(node), drawn = node.namespaceURI.endsWith("svg") ? style.fill : style.color;
  const color = rgba(drawn), back = below(node);
  color[3] *= opacity(node);
  looked++;
  const ratio = contrast(over(color, back), back);
  if (ratio < least) found.set(`${node.tagName}.${node.getAttribute("class")} ${drawn} on ${back.map(Math.round)}`, `${ratio.toFixed(2)} ${text.slice(0, 40)}`);
}
return {looked, found: [...found].map((pair) => pair.join(": "))};
"""
"""Function body for a browser: texts whose contrast with their background is under
arguments[0] (WCAG 2.2, 1.4.3), and how many texts were looked at. Disabled controls are exempt."""
