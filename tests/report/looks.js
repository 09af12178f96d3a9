// Words of a page that stand on two lines though the place has room for them on one. A function body:
// arguments[0] selects the elements; a word ends at a space and where the page lets a line end (<wbr>).
const broken = [];
let looked = 0;
for (const node of document.querySelectorAll(arguments[0])) {
  const walker = document.createTreeWalker(node, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode;
    for (const {0: word, index} of text.data.matchAll(/\S+/g)) {
      const range = document.createRange();
      range.setStart(text, index);
      range.setEnd(text, index + word.length);
      const lines = new Set([...range.getClientRects()].map((box) => Math.round(box.top)));
      looked++;
      if (lines.size > 1) broken.push(word);
    }
  }
}
return {looked, broken};
