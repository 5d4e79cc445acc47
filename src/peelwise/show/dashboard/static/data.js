// One run as the page knows it: loaded thinned, then kept up record by record without asking again.

import { WORST } from "./shades.js";

const MOST_LOSS = 1000;
const MOST_LOOKS = 1200;
const MOST_POINTS = 400;
const MOST_EVENTS = 300;
export const MODEL = -1;

export async function ask(address, parameters = {}) {
  const query = new URLSearchParams(parameters);
  const answer = await fetch(`/api/${address}?${query}`, { credentials: "same-origin" });
  if (!answer.ok) throw new Error((await answer.text()).trim() || `error ${answer.status}`);
  return answer.json();
}

// Consecutive records that share a place on screen; twice as many share one when there are too many places.
export class Bins {
  constructor(most, merge, stride, items) {
    Object.assign(this, { most, merge, stride, items });
  }

  add(item) {
    const last = this.items.at(-1);
    if (last && last.rows < this.stride) this.#into(last, item);
    else this.items.push(item);
    if (this.items.length > 2 * this.most) {
      const halved = [];
      for (let i = 0; i < this.items.length; i += 2) {
        if (i + 1 < this.items.length) this.#into(this.items[i], this.items[i + 1]);
        halved.push(this.items[i]);
      }
      this.items = halved;
      this.stride *= 2;
    }
  }

  #into(target, item) {
    this.merge(target, item);
    target.last = item.last;
    target.rows += item.rows;
  }
}

function columns(content, make) {
  return content.first.map((first, i) => ({ first, last: content.last[i], rows: content.rows[i], ...make(i) }));
}

function mergeLoss(one, other) {
  one.share = other.share;
  if (other.mean === null) return;
  if (one.mean === null) {
    Object.assign(one, { mean: other.mean, low: other.low, high: other.high });
    return;
  }
  one.mean += ((other.mean - one.mean) * other.rows) / (one.rows + other.rows);
  one.low = Math.min(one.low, other.low);
  one.high = Math.max(one.high, other.high);
}

export function worst(one, other) {
  let found = "";
  for (let i = 0; i < one.length; i += 1) {
    found += WORST.indexOf(one[i]) >= WORST.indexOf(other[i]) ? one[i] : other[i];
  }
  return found;
}

function mergeLook(one, other) {
  one.letters = worst(one.letters, other.letters);
  one.loss += ((other.loss - one.loss) * other.rows) / (one.rows + other.rows);
}

function mergeHeat(quotient) {
  const size = (value) => (Number.isNaN(value) ? -1 : Math.abs(quotient ? Math.log(value) : value));
  return (one, other) => {
    for (let b = 0; b < one.values.length; b += 1) {
      if (size(other.values[b]) > size(one.values[b])) one.values[b] = other.values[b];
    }
    one.strengths = null;
  };
}

// The lowest and highest value of the looks that share a row of a series; a row of one look is both.
export const extremes = ([, , value, , , , lowest = value, highest = value]) => [lowest, highest];

// Every second row, the last one always there, with the lowest and highest of both.
export function halved(rows) {
  return rows.flatMap((row, i) => {
    if ((rows.length - 1 - i) % 2 !== 0) return [];
    const both = [row, rows[i - 1] ?? row].map(extremes);
    const finite = (place) => both.map((each) => each[place]).filter((value) => value !== null);
    const ends = [Math.min(...finite(0)), Math.max(...finite(1))];
    return [[...row.slice(0, 6), ...ends.map((value) => (Number.isFinite(value) ? value : null))]];
  });
}

export class RunData {
  constructor(facts, range) {
    this.facts = facts;
    this.range = range; // [first, last] step, or null for all
    this.block = null;
    this.heat = null;
    this.missed = []; // the latest looks: some may come while an answer is on its way
  }

  get key() {
    return this.facts.key;
  }

  get #between() {
    return this.range ? { first: this.range[0], last: this.range[1] } : {};
  }

  async load() {
    const found = await ask("overview", { run: this.key, ...this.#between });
    Object.assign(this, { unknown: false, block: null, heat: null, statistics: new Map() });
    found.statistics.sort((a, b) => a.place - b.place).forEach((each) => this.statistics.set(each.name, each));
    const { loss, looks } = found;
    this.loss = new Bins(MOST_LOSS, mergeLoss, loss.stride, columns(loss, (i) => ({
      mean: loss.mean[i], low: loss.low[i], high: loss.high[i], share: loss.share[i],
    })));
    this.looks = new Bins(MOST_LOOKS, mergeLook, looks.stride, columns(looks, (i) => ({
      letters: looks.letters[i], loss: looks.loss[i],
    })));
    this.bounds = found.bounds;
    this.now = found.now;
    this.verdicts = new Map(found.verdicts.map((verdict) => [verdict.block, verdict]));
    this.events = found.events;
    this.told ??= found.events.at(-1)?.id ?? 0; // nobody needs to hear of what happened before they came
    this.place = `${this.key}@${found.cursor.join(".")}`;
  }

  async loadBlock(block) {
    this.block = null;
    const found = await ask("block", { run: this.key, block: block === MODEL ? "model" : block, ...this.#between });
    this.block = { ...found, series: new Map(Object.entries(found.series)) };
    this.missed.forEach((record) => this.#addToBlock(record));
  }

  async loadHeat(name) {
    this.heat = null;
    if (!name) return;
    const found = await ask("heat", { run: this.key, statistic: name, ...this.#between });
    const items = columns(found, (i) => {
      const values = this.#blank();
      found.values[i].forEach((value, b) => {
        if (value !== null) values[b] = value;
      });
      return { values };
    });
    const bins = new Bins(MOST_LOOKS, mergeHeat(found.quotient), found.stride, items);
    this.heat = { name, quotient: found.quotient, bins };
    this.missed.forEach((record) => this.#addHeat(record));
  }

  #shown(step) {
    return !this.range || (step >= this.range[0] && step <= this.range[1]);
  }

  steps(rows) {
    this.now.step = rows.at(-1);
    for (const [step, loss, share] of rows) {
      if (this.#shown(step)) {
        this.loss.add({ first: step, last: step, rows: 1, mean: loss, low: loss, high: loss, share });
      }
    }
  }

  // Everything one look found, at once.
  probe(record) {
    const { look, statistics, verdicts } = record;
    const step = look.step;
    this.now.look = look;
    verdicts.forEach((verdict) => this.verdicts.set(verdict.block, verdict));
    for (const [name] of statistics) {
      if (!this.statistics.has(name)) this.unknown = true; // a statistic that was not there before
    }
    if (!this.#shown(step)) return;
    this.looks.add({ first: step, last: step, rows: 1, letters: look.letters, loss: look.probe_loss });
    for (const [edge, value] of Object.entries(record.bounds)) this.bounds[edge].push([step, value]);
    this.missed.push(record);
    if (this.heat) this.#addHeat(record);
    if (this.block) this.#addToBlock(record);
    if (this.missed.length > 100) this.missed.shift();
  }

  #blank() {
    return new Float64Array(this.facts.blocks.length).fill(NaN);
  }

  #addHeat({ look: { step }, statistics }) {
    if (step <= (this.heat.bins.items.at(-1)?.last ?? -1)) return;
    const values = this.#blank();
    for (const [name, , block, , , , toMedian] of statistics) {
      if (name === this.heat.name && block >= 0 && toMedian !== null) values[block] = toMedian;
    }
    this.heat.bins.add({ first: step, last: step, rows: 1, values });
  }

  #addToBlock({ look: { step }, statistics, matrices, verdicts }) {
    const { block, series } = this.block;
    const known = Math.max(-1, ...[...series.values()].map((rows) => rows.at(-1)?.[0] ?? -1));
    if (step <= known) return;
    for (const [name, ...row] of statistics) {
      if (row[1] !== block) continue;
      if (!series.has(name)) series.set(name, []);
      const rows = series.get(name);
      rows.push(row);
      if (rows.length > 2 * MOST_POINTS) series.set(name, halved(rows));
    }
    const own = matrices.filter((each) => each[0] === block);
    if (own.length) {
      const medians = new Map(this.block.matrices.map((each) => [each.name, each.median]));
      this.block.matrices = own.map(([, name, share]) => ({ name, share, step, median: medians.get(name) ?? share }));
    }
    this.block.verdicts.push(...verdicts.filter((each) => each.block === block));
  }

  happened(rows) {
    this.events = [...this.events, ...rows].slice(-MOST_EVENTS);
  }

  // The latest alert that was not announced yet, if there is one.
  newAlert() {
    const found = this.events.findLast((each) => each.level === "alert" && each.id > this.told);
    this.told = Math.max(this.told, this.events.at(-1)?.id ?? 0);
    return found;
  }

  // The steps that the charts of this run span.
  get span() {
    if (this.range) return this.range;
    const starts = [this.loss.items[0]?.first, this.looks.items[0]?.first].filter((step) => step !== undefined);
    return [Math.min(0, ...starts), Math.max(this.now.step?.[0] ?? 0, this.now.look?.step ?? 0, 1)];
  }
}

// News of all runs on screen through one connection, which goes on where it was after a break.
export class Stream {
  constructor(places, { onMessage, onState }) {
    Object.assign(this, { places, onMessage, onState, source: null, timer: null });
    this.open();
  }

  open() {
    this.source = new EventSource(`/api/stream?from=${encodeURIComponent(this.places)}`);
    this.source.onopen = () => this.onState("live");
    for (const kind of ["steps", "probe", "events", "runs", "reload"]) {
      this.source.addEventListener(kind, (message) => {
        if (message.lastEventId) this.places = message.lastEventId;
        this.onMessage(kind, JSON.parse(message.data));
      });
    }
    this.source.onerror = () => {
      this.onState("waiting");
      // The browser tries again by itself, but not after an answer that was an error.
      if (this.source.readyState === EventSource.CLOSED) this.timer = setTimeout(() => this.open(), 3000);
    };
  }

  close() {
    clearTimeout(this.timer);
    this.source.close();
  }
}
