// Small pieces of page. Text is always set as text: nothing that a history holds is ever taken for markup.

const SVG = "http://www.w3.org/2000/svg";

export function h(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

export function s(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

// The style sheet's classes give every verdict its colour and pattern; the letter tells it without either.
export function tile(word) {
  return h("b", { class: `tile ${word.colour}`, "aria-hidden": "true" }, word.letter);
}

export function chip(word, text = word.words) {
  return h("span", { class: "chip" }, tile(word), h("span", {}, text));
}

// Only touches the page where something changed, so that a reader's place and selection stay.
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

// A chart's numbers as a table, made when it is opened and kept up while it is open.
export class Table {
  constructor(title, headers) {
    this.body = h("tbody");
    this.rows = () => [];
    this.root = h(
      "details",
      { class: "numbers", ontoggle: () => this.update() },
      h("summary", {}, `${title} as a table`),
      h(
        "div",
        { class: "scroll", tabindex: 0, role: "region", "aria-label": title },
        h(
          "table",
          {},
          h("caption", {}, title),
          h("thead", {}, h("tr", {}, headers.map((text) => h("th", { scope: "col" }, text)))),
          this.body,
        ),
      ),
    );
  }

  update() {
    if (!this.root.open) return;
    const cells = (row) => row.map((cell, i) => (i ? h("td", {}, cell) : h("th", { scope: "row" }, cell)));
    this.body.replaceChildren(...this.rows().map((row) => h("tr", {}, cells(row))));
  }
}

// At most `most` of the items, evenly, the last one always among them.
export function thinned(items, most) {
  const stride = Math.max(1, Math.ceil(items.length / most));
  return items.filter((_, i) => (items.length - 1 - i) % stride === 0);
}

// Asking for a width right after something was drawn costs a layout each time: it is asked once, and kept up.
const widths = new WeakMap();
let onResize = () => {};
const observer = new ResizeObserver((entries) => {
  const changed = entries.filter(({ target }) => widths.get(target) !== target.clientWidth);
  changed.forEach(({ target }) => widths.set(target, target.clientWidth));
  if (changed.length) onResize();
});

export function width(element) {
  if (!widths.get(element)) {
    widths.set(element, element.clientWidth);
    observer.observe(element);
  }
  return widths.get(element);
}

export function whenResized(callback) {
  onResize = callback;
}

// A colour of the style sheet, asked for once for each of the system's two settings.
const colours = new Map();

export function colour(name) {
  if (!colours.has(name)) colours.set(name, getComputedStyle(document.documentElement).getPropertyValue(name).trim());
  return colours.get(name);
}

export function whenRecoloured(callback) {
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    colours.clear();
    callback();
  });
}
