// The page: what is shown is in the address behind #, so that any view is a link; news come by one stream.

import { ask, MODEL, RunData, Stream } from "./data.js";
import { h, setText, whenRecoloured, whenResized } from "./dom.js";
import { RunView } from "./run.js";

const UPDATE = "peelwise update";
const page = { files: [], words: [], views: new Map(), stream: null, due: false, loading: 0 };
const element = (id) => document.getElementById(id);

// -- the address ------------------------------------------------------------------------------------------------

function wanted() {
  const found = new URLSearchParams(location.hash.slice(1));
  const range = /^(\d+)-(\d+)$/.exec(found.get("steps") ?? "");
  const block = found.get("block");
  return {
    runs: (found.get("runs") ?? "").split(",").filter(Boolean),
    block: block === "all" ? MODEL : /^\d+$/.test(block ?? "") ? Number(block) : null,
    statistic: found.get("show") ?? "",
    range: range && Number(range[1]) < Number(range[2]) ? [Number(range[1]), Number(range[2])] : null,
  };
}

function go(changes, { replace = false } = {}) {
  const next = { ...wanted(), ...changes };
  const parts = [];
  if (next.runs.length) parts.push(`runs=${next.runs.join(",")}`);
  if (next.block !== null) parts.push(`block=${next.block === MODEL ? "all" : next.block}`);
  if (next.statistic) parts.push(`show=${encodeURIComponent(next.statistic)}`);
  if (next.range) parts.push(`steps=${next.range.join("-")}`);
  const hash = `#${parts.join("&")}`;
  if (hash === location.hash) return;
  history[replace ? "replaceState" : "pushState"](null, "", hash);
  follow();
}

// The token has done its work once the cookie is there: it does not stay in the address or the history.
function forgetToken() {
  const address = new URL(location.href);
  if (!address.searchParams.has("token")) return;
  address.searchParams.delete("token");
  history.replaceState(null, "", `${address.pathname}${address.search}${address.hash}`);
}

// -- what is shown ----------------------------------------------------------------------------------------------

const allRuns = () => page.files.flatMap((file) => file.runs);

function chosenRuns() {
  const known = allRuns();
  const named = wanted().runs.map((key) => known.find((run) => run.key === key)).filter(Boolean);
  if (named.length) return named;
  const newest = [...known].sort((a, b) => a.started.localeCompare(b.started) || a.id - b.id).at(-1);
  return newest ? [newest] : [];
}

// Load what is missing for the view that the address asks for, then draw it.
async function follow() {
  const turn = (page.loading += 1);
  element("runs-shown").setAttribute("aria-busy", "true");
  const state = wanted();
  const range = String(state.range);
  const views = new Map();
  for (const facts of chosenRuns()) {
    const kept = page.views.get(facts.key);
    const same = kept && kept.range === range;
    views.set(facts.key, same ? kept : { data: new RunData(facts, state.range), range });
  }
  const again = [...views.values()].filter((entry) => entry.stale);
  // What would come meanwhile is in the new data too: it must not be counted twice.
  if (again.length) hush();
  try {
    await Promise.all([...views.values()].map(async (entry) => {
      if (!entry.view || entry.stale) await entry.data.load();
      const { data } = entry;
      const block = blockOf(state, data);
      await Promise.all([
        data.block?.block === block ? null : data.loadBlock(block),
        (data.heat?.name ?? "") === state.statistic ? null : data.loadHeat(data.statistics.has(state.statistic) && state.statistic),
      ]);
    }));
  } catch (error) {
    if (turn === page.loading) showProblem(error);
    element("runs-shown").setAttribute("aria-busy", "false");
    return;
  }
  if (turn !== page.loading) return; // the address has changed meanwhile
  element("runs-shown").setAttribute("aria-busy", "false");
  for (const entry of views.values()) {
    entry.view ??= new RunView(entry.data, {
      words: page.words, onSelect: (block) => go({ block }), onChoose: (steps) => go({ range: steps }),
    });
  }
  const before = [...page.views.values()];
  for (const entry of again) {
    entry.stale = false;
    announce(entry.data);
  }
  page.views = views;
  const shown = [...views.values()].map((entry) => entry.view.root);
  if (shown.some((root, i) => element("runs-shown").children[i] !== root) || before.length !== shown.length) {
    element("runs-shown").replaceChildren(...shown);
    element("runs-shown").classList.toggle("several", shown.length > 1);
    listen();
  } else if (again.length) listen();
  showControls();
  render();
}

function blockOf(state, data) {
  if (state.block === MODEL) return MODEL;
  if (state.block !== null) return Math.min(state.block, data.facts.blocks.length - 1);
  if (data.firstBlock === undefined) {
    const letters = data.now.look?.letters ?? "";
    // Nobody has chosen a block: the first of the worst.
    data.firstBlock = Math.max(0, ["R", "Y", "?"].map((letter) => letters.indexOf(letter)).find((at) => at >= 0) ?? 0);
  }
  return data.firstBlock;
}

function showProblem(error) {
  setText(element("connection"), "no data");
  element("connection").className = "connection problem";
  element("runs-shown").replaceChildren(h("p", { class: "warning", role: "alert" }, error.message));
  page.views = new Map();
}

// Draw at most once a frame, however many messages came.
function render() {
  if (page.due) return;
  page.due = true;
  requestAnimationFrame(() => {
    page.due = false;
    const began = performance.now();
    const state = wanted();
    const entries = [...page.views.values()];
    if (!entries.length) return;
    // The same scales for all runs, or they could not be compared.
    const spans = entries.map(({ data }) => data.span);
    const x = [Math.min(...spans.map(([first]) => first)), Math.max(...spans.map(([, last]) => last))];
    const extents = entries.map(({ view, data }) => view.loss.extent(data)).filter(Boolean);
    const y = extents.length ? [Math.min(...extents.map((e) => e[0])), Math.max(...extents.map((e) => e[1]))] : null;
    for (const { view, data } of entries) {
      view.render({ x, y, selected: blockOf(state, data), statistic: state.statistic });
    }
    document.title = `${entries.map(({ data }) => data.facts.name).join(", ")} – peelwise`;
    performance.clearMeasures(UPDATE);
    performance.measure(UPDATE, { start: began, end: performance.now() });
    document.documentElement.dataset.ready = "true";
  });
}

// -- controls ---------------------------------------------------------------------------------------------------

function showControls() {
  const state = wanted();
  const statistics = new Map();
  for (const { data } of page.views.values()) {
    for (const each of data.statistics.values()) if (each.of_blocks) statistics.set(each.name, each.title);
  }
  const key = JSON.stringify([state, [...statistics], page.files, [...page.views.keys()]]);
  if (page.controls === key) return;
  page.controls = key;
  const active = document.activeElement?.id;
  element("controls").replaceChildren(runPicker(), colourPicker(state, statistics), ...stepPicker(state));
  if (active) element(active)?.focus();
}

function runPicker() {
  const open = document.querySelector(".picker")?.open;
  const boxes = page.files.map((file, number) => h(
    "fieldset", {},
    h("legend", {}, file.name),
    file.error ? h("p", { class: "problem" }, file.error) : null,
    !file.error && !file.runs.length ? h("p", { class: "muted" }, "no run yet") : null,
    file.runs.map((run) => h(
      "label", {},
      h("input", {
        type: "checkbox", id: `show-${run.key}`, checked: page.views.has(run.key),
        onchange: (event) => choose(run.key, event.target.checked),
      }),
      ` ${run.name} `, h("span", { class: "muted" }, `run ${run.id}, ${run.status}`),
    )),
  ));
  const count = allRuns().length;
  return h("details", { class: "picker", open }, h("summary", {}, `Runs (${page.views.size} of ${count})`), h("div", {}, boxes));
}

function choose(key, on) {
  const shown = [...page.views.keys()].filter((each) => each !== key);
  go({ runs: on ? [...shown, key] : shown });
}

function colourPicker(state, statistics) {
  const option = (value, text) => h("option", { value, selected: value === state.statistic }, text);
  return h(
    "label", {},
    "Colour by ",
    h(
      "select", { id: "colour-by", onchange: (event) => go({ statistic: event.target.value }) },
      option("", "verdict"), [...statistics].map(([name, title]) => option(name, `${title}, against its median`)),
    ),
  );
}

function stepPicker(state) {
  const box = (id, label, value) => h("input", { id, type: "number", min: 0, "aria-label": label, placeholder: label, value });
  const first = box("first-step", "first step", state.range?.[0]);
  const last = box("last-step", "last step", state.range?.[1]);
  const show = () => {
    const ends = [Number(first.value), Number(last.value)];
    if (first.value !== "" && ends[0] < ends[1]) go({ range: ends });
  };
  return [
    h("span", { class: "steps", role: "group", "aria-label": "Steps shown" }, "Steps ", first, " to ", last, " ",
      h("button", { type: "button", id: "show-steps", onclick: show }, "Show"),
      h("button", { type: "button", id: "all-steps", disabled: !state.range, onclick: () => go({ range: null }) }, "All")),
  ];
}

// -- news -------------------------------------------------------------------------------------------------------

function hush() {
  page.stream?.close();
  page.stream = null;
}

function listen() {
  hush();
  const places = [...page.views.values()].map(({ data }) => data.place);
  if (!places.length || document.hidden) return;
  page.stream = new Stream(places.join(","), { onMessage, onState: showState });
}

function onMessage(kind, content) {
  if (kind === "runs") {
    onRuns(content);
    return;
  }
  const entry = page.views.get(content.run);
  if (!entry) return;
  if (kind === "reload") {
    entry.stale = true;
    follow();
    return;
  }
  const { data } = entry;
  if (kind === "steps") data.steps(content.rows);
  if (kind === "probe") data.probe(content);
  if (kind === "events") {
    data.happened(content.rows);
    announce(data);
  }
  data.place = page.stream.places.split(",").find((place) => place.startsWith(`${data.key}@`)) ?? data.place;
  if (data.unknown) {
    entry.stale = true;
    follow();
    return;
  }
  render();
}

function announce(data) {
  const alert = data.newAlert();
  if (alert) setText(element("spoken"), `Alert at step ${alert.step}: ${alert.text}`);
}

function onRuns(content) {
  page.files = content.files;
  const known = new Map(allRuns().map((run) => [run.key, run]));
  for (const { data } of page.views.values()) data.facts = known.get(data.key) ?? data.facts;
  showState();
  follow(); // where no run was chosen, the newest one is shown
}

function showState(state = page.state ?? "live") {
  page.state = state;
  const running = [...page.views.values()].some(({ data }) => data.facts.status === "running");
  const words = { live: running ? "live" : "at rest", waiting: "no connection, trying again" };
  setText(element("connection"), words[state]);
  element("connection").className = `connection ${state === "live" ? (running ? "on" : "rest") : "problem"}`;
}

// A hidden page needs no news; it catches up when it is looked at again. Browsers allow few connections.
document.addEventListener("visibilitychange", () => {
  if (!document.hidden) {
    listen();
    return;
  }
  hush();
});
window.addEventListener("hashchange", () => follow());
window.addEventListener("popstate", () => follow());
window.addEventListener("resize", () => render());
whenResized(render);
whenRecoloured(render);
element("skip").addEventListener("click", (event) => {
  event.preventDefault(); // the part behind # says what is shown
  element("runs-shown").focus();
});

async function start() {
  forgetToken();
  try {
    const found = await ask("runs");
    Object.assign(page, { files: found.files, words: found.words });
  } catch (error) {
    showProblem(error);
    return;
  }
  if (!allRuns().length) {
    showProblem(new Error(page.files.map((file) => file.error ?? `${file.name} holds no run yet.`).join(" ")));
    setTimeout(start, 2000);
    return;
  }
  await follow();
  showState();
}

start();
