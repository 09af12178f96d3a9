// Texts of a page whose contrast with their background is under arguments[0] (WCAG 2.2, 1.4.3), and how
// many texts were looked at. Disabled controls are exempt. The body of a function.
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
  const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  const [r, g, b] = color.map((c) => linear(c / 255));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function contrast(one, other) {
  const [high, low] = [luminance(one), luminance(other)].sort((a, b) => b - a);
  return (high + 0.05) / (low + 0.05);
}
function below(node) {
  const bar = node.classList.contains("inside") && node.parentElement.querySelector(".bar");
  return bar ? over(rgba(getComputedStyle(bar).fill), ground(node)) : ground(node);
}
const UNSEEN = "script, style, noscript, [hidden], :disabled";
const least = arguments[0];
const found = new Map();
let looked = 0;
const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walk.nextNode()) {
  const node = walk.currentNode.parentElement;
  const text = walk.currentNode.data.trim();
  if (!text || node.closest(UNSEEN) || !node.checkVisibility()) continue;
  const box = node.getBoundingClientRect();
  if (box.width < 2 || box.height < 2) continue;
  const style = getComputedStyle(node);
  const drawn = node.namespaceURI.endsWith("svg") ? style.fill : style.color;
  const color = rgba(drawn);
  const back = below(node);
  color[3] *= opacity(node);
  looked++;
  const ratio = contrast(over(color, back), back);
  const where = `${node.tagName}.${node.getAttribute("class")} ${drawn} on ${back.map(Math.round)}`;
  if (ratio < least) found.set(where, `${ratio.toFixed(2)} ${text.slice(0, 40)}`);
}
return {looked, found: [...found].map((pair) => pair.join(": "))};
