// One run on the page: where it stands, its loss, its blocks, the block looked at, what happened, what it costs.

import { BlockPanel } from "./block.js";
import { MODEL } from "./data.js";
import { chip, h, setText, width } from "./dom.js";
import { HeatMap } from "./heat.js";
import { LossChart } from "./loss.js";
import { compact, integer, nats } from "./scale.js";
import { Cost, Events } from "./side.js";

const STATUS = {
  running: "running", finished: "finished", failed: "ended with an error", interrupted: "was interrupted",
};

export class RunView {
  constructor(data, { words, onSelect, onChoose }) {
    Object.assign(this, { data, words, onSelect });
    const onHover = (step) => this.#hover(step);
    this.loss = new LossChart({ words, onHover, onChoose });
    this.heat = new HeatMap({ words, onHover, onChoose, onSelect });
    this.block = new BlockPanel({ words });
    this.events = new Events({ onSelect });
    this.cost = new Cost();
    this.title = h("h2", { id: `run-${data.key}` }, data.facts.name);
    this.facts = h("p", { class: "facts" });
    this.first = h("p", { class: "first" });
    this.number = h("p", { class: "number" });
    this.what = h("p", { class: "what" });
    this.trend = h("p", { class: "range" });
    this.counts = new Map(words.map((word) => [word.letter, h("strong", {}, "0")]));
    this.strip = h("div", {
      class: "strip", role: "radiogroup", "aria-label": "Block to show", onkeydown: (event) => this.#key(event),
    });
    this.root = h(
      "article",
      { class: "run", "aria-labelledby": `run-${data.key}`, "data-run": data.key },
      h("header", {}, this.title, this.facts),
      h(
        "section",
        { class: "card", "aria-label": "Where it stands" },
        this.first,
        h(
          "div",
          { class: "hero" },
          h("div", {}, this.number, this.trend, this.what),
          h("ul", { class: "tally" }, words.map((word) => h("li", {}, this.counts.get(word.letter), chip(word)))),
        ),
        this.strip,
      ),
      h(
        "div",
        { class: "panels" },
        h("div", { class: "main" }, this.loss.root, this.heat.root, this.block.root),
        h("div", { class: "side" }, this.events.root, this.cost.root),
      ),
    );
    this.#buildStrip();
  }

  render({ x, y, selected, statistic }) {
    const { data } = this;
    this.selected = selected;
    this.#head();
    this.#tiles();
    this.loss.render(data, { x, y });
    this.heat.render(data, { x, selected, statistic });
    this.block.render(data, { x, selected });
    this.events.render(data);
    this.cost.render(data, { x });
  }

  #head() {
    const { facts, now } = this.data;
    const known = [
      STATUS[facts.status] ?? facts.status,
      `${compact(facts.parameters)} parameters`,
      `${facts.blocks.length} blocks`,
      facts.architecture,
      `run ${facts.id} of ${facts.file}`,
      `since ${new Date(facts.started).toLocaleString()}`,
    ];
    if (this.facts.dataset.of !== known.join()) {
      this.facts.dataset.of = known.join();
      this.facts.replaceChildren(...known.map((text, i) => h("span", { class: i ? null : `status ${facts.status}` }, text)));
    }
    const [alarm, sentence] = firstSentence(this.data);
    this.first.className = alarm ? "first alarm" : "first";
    setText(this.first, sentence);
    const loss = this.data.loss.items.findLast((bin) => bin.mean !== null);
    const value = now.look ? now.look.probe_loss : (now.step?.[1] ?? loss?.mean ?? null);
    const shown = value === null || value === undefined ? "–" : nats(value);
    if (this.number.dataset.of !== shown) {
      this.number.dataset.of = shown;
      this.number.replaceChildren(shown, h("small", {}, ` ${facts.unit}`));
    }
    setText(this.trend, slopeWords(now.look, now.step?.[1] ?? null));
    const at = now.step ? ` Training is at step ${integer(now.step[0])}${now.step[1] === null ? "" : `, loss ${nats(now.step[1])}`}.` : "";
    setText(this.what, now.look ? `on the probe, at step ${integer(now.look.step)}${this.#since(now.look)}.${at}` : `No measurement yet: the first comes when the budget allows.${at}`);
  }

  // How the probe's own loss has moved since the measurement before: the slope beside it is training's.
  #since(look) {
    const before = this.data.looks.items.findLast((each) => each.last < look.step && each.loss !== null);
    if (!before) return "";
    const moved = look.probe_loss - before.loss;
    return `, ${nats(Math.abs(moved))} ${moved > 0 ? "above" : "below"} that of step ${integer(before.last)}`;
  }

  #buildStrip() {
    const button = (index, label) => h(
      "button",
      {
        type: "button", role: "radio", "data-block": index, class: "pick",
        onclick: () => this.onSelect(index),
      },
      label,
    );
    this.tiles = this.data.facts.blocks.map((_, b) =>
      button(b, [h("b", { class: "tile grey", "aria-hidden": "true" }, "?"), h("i", { "aria-hidden": "true" }, String(b))]));
    this.whole = button(MODEL, [h("b", { class: "tile whole", "aria-hidden": "true" }, "all"), h("i", { "aria-hidden": "true" }, "\u2211")]);
    this.whole.setAttribute("aria-label", "The whole model");
    this.strip.replaceChildren(...this.tiles, this.whole);
  }

  // Rows of equal length, so that no last row of two blocks hangs below thirty.
  #arrangeStrip() {
    const count = this.tiles.length + 1;
    const rows = Math.ceil(count / Math.max(1, Math.floor(width(this.strip) / 27)));
    const columns = String(Math.ceil(count / rows));
    if (this.strip.style.getPropertyValue("--columns") !== columns) this.strip.style.setProperty("--columns", columns);
  }

  #tiles() {
    this.#arrangeStrip();
    const letters = this.data.now.look?.letters ?? "";
    for (const word of this.words) {
      const count = letters.split(word.letter).length - 1;
      setText(this.counts.get(word.letter), String(count));
      // Most runs have no frozen block, and need no line on them.
      this.counts.get(word.letter).parentElement.style.display = word.letter === "F" && !count ? "none" : "";
    }
    this.tiles.forEach((button, b) => {
      const word = this.words.find((each) => each.letter === (letters[b] ?? "?"));
      const mark = button.firstChild;
      if (mark.textContent !== word.letter || !button.hasAttribute("aria-label")) {
        mark.className = `tile ${word.colour}`;
        mark.textContent = word.letter;
        button.setAttribute("aria-label", `Block ${b}, ${this.data.facts.blocks[b]}: ${word.words}`);
        button.title = button.getAttribute("aria-label");
      }
    });
    for (const button of [...this.tiles, this.whole]) {
      const chosen = Number(button.dataset.block) === this.selected;
      button.setAttribute("aria-checked", String(chosen));
      button.tabIndex = chosen ? 0 : -1;
    }
  }

  #key(event) {
    const all = [...this.tiles, this.whole];
    const here = all.indexOf(document.activeElement);
    const moves = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -here, End: all.length - 1 - here };
    if (here < 0 || !(event.key in moves)) return;
    event.preventDefault();
    const next = all[(here + moves[event.key] + all.length) % all.length];
    this.onSelect(Number(next.dataset.block));
    next.focus();
  }

  #hover(step) {
    for (const each of [this.loss, this.heat, this.block, this.cost]) each.showCursor(step);
  }
}

// What to look at first: the newest alert that still holds, or that nothing was seen, and on how much that rests.
function firstSentence({ events, now }) {
  const letters = now.look?.letters ?? "";
  const holds = (each) => {
    if (each.kind === "unlike-scales") return letters[each.block] === "?"; // until that block has a verdict
    if (each.kind === "red") return each.block === null ? letters.includes("R") : letters[each.block] === "R";
    return each.level === "alert";
  };
  const alert = events.findLast(holds);
  if (alert) return [true, `Look here, because: ${alert.text}`];
  if (!letters) return [false, "Nothing measured yet, and no alert so far."];
  const red = letters.split("R").length - 1;
  const decided = [...letters].filter((letter) => "RYG".includes(letter)).length;
  const asked = [...letters].filter((letter) => letter !== "F").length;
  if (red) return [true, `Look at the red ${red === 1 ? "block" : "blocks"}: no event names a cause.`];
  if (!decided) return [false, "No block is decided yet, and no alert so far."];
  return [false, `Healthy as far as was seen: no alert holds, ${decided} of ${asked} blocks are decided and none is red.`];
}

// The number above is the probe's, the slope is training's: says whose it is, and where the two losses are far apart.
function slopeWords(look, training) {
  if (!look || look.slope === null) return "";
  const per = `${look.slope > 0 ? "+" : ""}${(1000 * look.slope).toFixed(3).replace("-", "\u2212")} per 1,000 steps`;
  const not = look.slope > 0 ? "not falling" : "not shown to be falling";
  const slope = look.still_falling ? `falling: ${per}` : `${not} (${per})`;
  const gap = training === null ? 0 : look.probe_loss - training;
  const apart = Math.abs(gap) > Math.max(0.2 * look.probe_loss, 0.3);
  const words = apart ? ` It is ${nats(Math.abs(gap))} ${gap > 0 ? "below" : "above"} the probe's.` : "";
  return `Training loss ${slope}${apart ? "." : ""}${words}`;
}
