// What happened, and what the monitor costs.

import { h, s, setText, Table, thinned } from "./dom.js";
import { path, Plot } from "./plot.js";
import { duration, integer, percent } from "./scale.js";

const MARKS = { alert: "!", warning: "▲", info: "i" };
const FEW = 6;

export class Events {
  constructor({ onSelect }) {
    this.onSelect = onSelect;
    this.list = h("ol", { class: "events", reversed: true });
    this.empty = h("p", { class: "missing" }, "Nothing so far.");
    this.more = h("button", { type: "button", class: "quiet", onclick: () => this.#toggle() });
    this.root = h("section", { class: "panel happened" }, h("h3", {}, "What happened"), this.empty, this.list, this.more);
    this.all = false;
  }

  render(data) {
    const { events } = data;
    this.data = data;
    this.empty.hidden = events.length > 0;
    this.more.hidden = events.length <= FEW;
    setText(this.more, this.all ? "Show the latest only" : `Show all ${events.length}`);
    const state = `${events.at(-1)?.id} ${events.length} ${this.all}`;
    if (this.list.dataset.of === state) return;
    this.list.dataset.of = state;
    this.list.replaceChildren(...(this.all ? events : events.slice(-FEW)).map((each) => this.#item(each)).reverse());
  }

  #item(each) {
    const where = each.block === null ? null : h(
      "button", { type: "button", class: "quiet", onclick: () => this.onSelect(each.block) }, `see block ${each.block}`);
    return h(
      "li",
      { class: `event ${each.level}` },
      h("b", { class: "level", title: each.level, "aria-hidden": "true" }, MARKS[each.level] ?? "i"),
      h(
        "div", {},
        h("p", {}, h("span", { class: "spoken" }, `${each.level}: `), h("span", { class: "muted" }, `step ${integer(each.step)} `), each.text),
        each.suggestion ? h("p", { class: "advice" }, each.suggestion) : null,
        where,
      ),
    );
  }

  #toggle() {
    this.all = !this.all;
    this.render(this.data);
  }
}

export class Cost {
  constructor() {
    this.words = h("p", { class: "value" });
    this.plot = new Plot({ height: 130, label: "Share of time", top: 12, format: (v) => percent(v) });
    this.table = new Table("Share of time", ["steps", "share"]);
    this.table.rows = () => thinned(this.data.loss.items, 50).reverse().map((bin) => [
      bin.first === bin.last ? integer(bin.first) : `${integer(bin.first)}–${integer(bin.last)}`, percent(bin.share),
    ]);
    this.root = h(
      "section", { class: "panel cost" },
      h("h3", {}, "What the monitor takes"), this.words, h("figure", {}, this.plot.root), this.table.root);
  }

  render(data, { x }) {
    this.data = data;
    const { budget } = data.facts;
    const { step, look } = data.now;
    const asked = budget === null ? "without a budget" : `${percent(budget)} asked for`;
    const words = step ? [`${percent(step[2])} of the wall time so far, ${asked}`] : [asked];
    if (look) words.push(`the last look (${look.kind}) took ${duration(look.seconds)}`);
    setText(this.words, words.join("; "));
    const bins = data.loss.items;
    const high = Math.max(budget ?? 0, ...bins.map((bin) => bin.share), 1e-4) * 1.15;
    const frame = this.plot.frame({ x, y: [0, high] });
    if (!frame) return;
    const { X, Y } = frame;
    this.plot.paint(
      budget !== null && s("line", { class: "budget", x1: frame.left, x2: frame.right, y1: Y(budget), y2: Y(budget) }),
      budget !== null && s("text", { class: "tick", x: frame.right, y: Y(budget) - 5, "text-anchor": "end" }, "asked for"),
      path(bins.map((bin) => [X(bin.last), Y(bin.share)]), "line"),
    );
    this.plot.svg.setAttribute("aria-label", `Share of wall time over steps. ${this.words.textContent}`);
    this.table.update();
  }

  showCursor(step) {
    this.plot.showCursor(step);
  }
}
