// The page: texts or a file in, a head's answers out. What people wrote is shown as text alone.
import { bar, make, percent, signed, whole } from "./make.js";

const MAX_ROWS = 5000, CHUNK = 64, IN_FLIGHT = 2, TRIES = 30, SHOWN = 6;
const $ = (id) => document.getElementById(id);
const stored = (use) => {
  try {
    return use(sessionStorage);
  } catch {
    return null; // forbidden: a key lives as long as the page
  }
};
const now = { heads: [], head: null, limits: {}, key: stored((storage) => storage.getItem("bertray-key")), table: null, job: null, asking: null };

const count = (n, noun) => `${whole(n)} ${noun}${n === 1 ? "" : "s"}`;
const say = (element, text, bad = false) => {
  element.textContent = text;
  element.classList.toggle("bad", bad);
};
const on = (element, type, listener) => element.addEventListener(type, listener);
const submitted = (form, listener) => on(form, "submit", (event) => {
  event.preventDefault();
  listener();
});
const options = (select, names) => select.replaceChildren(...names.map(([value, text]) => make("option", text, { value })));
const isQuestion = (head) => head.task === "question-answering";

// --- the service ---

const refusal = (message, status = 0) => Object.assign(new Error(message), { status });

const pause = (seconds, signal) => new Promise((resolve, reject) => {
  const timer = setTimeout(resolve, 1000 * seconds);
  signal?.addEventListener("abort", () => {
    clearTimeout(timer);
    reject(signal.reason);
  }, { once: true });
});

/** JSON of a path. A service that is busy or not ready is asked again when it says. */
export async function call(path, { body, signal, waiting = () => {} } = {}) {
  const headers = { Accept: "application/json" };
  if (now.key) headers.Authorization = `Bearer ${now.key}`;
  if (body) headers["Content-Type"] = "application/json";
  const request = { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal, cache: "no-store" };
  for (let tries = 1; ; tries++) {
    let response;
    try {
      response = await fetch(path, request);
    } catch (error) {
      if (signal?.aborted) throw error;
      throw refusal("The service cannot be reached. Is it still running?");
    }
    const content = await response.json().catch((error) => {
      if (signal?.aborted) throw error;
      return null;
    });
    if (response.ok && content) return content;
    const message = String(content?.error ?? `The service answered with status ${response.status}.`);
    if ((response.status === 429 || response.status === 503) && tries < TRIES) {
          const seconds = Math.min(30, Math.max(0.2, Number(response.headers.get("Retry-After")) || 1));
      waiting(`${response.status === 429 ? "The service is busy" : "The service is not ready"}: trying again in ${seconds} s.`);
      await pause(seconds, signal);
      continue;
    }
    if (response.status === 401) askKey(now.key ? "That key was refused." : "This service needs a key.");
    throw refusal(message, response.status);
  }
}

const urlOf = (head, action) => `v1/heads/${encodeURIComponent(head.name)}/${action}`;
const wire = (head, [text, pair]) => isQuestion(head) ? { question: text, context: pair } : head.pairs ? [text, pair] : text;

/** Inputs cut where a request would hold too many texts or characters. */
function chunksOf(inputs, places) {
  const most = Math.min(CHUNK, now.limits.texts || CHUNK), room = now.limits.characters || Infinity;
  const chunks = [];
  let chunk = [], held = 0;
  for (const place of places) {
    const size = inputs[place].reduce((total, text) => total + text.length, 0);
    if (chunk.length && (chunk.length === most || held + size > room)) {
      chunks.push(chunk);
      [chunk, held] = [[], 0];
    }
    chunk.push(place);
    held += size;
  }
  return chunk.length ? [...chunks, chunk] : chunks;
}

/** done(place, prediction, version) for each place of inputs; {error} is the prediction of one that is refused.
 * What stops everything (no key, no service, cancelled) is thrown once the requests under way have ended. */
async function answerAll(head, inputs, places, done, { signal, waiting }) {
  const queue = chunksOf(inputs, places);
  const send = async (chunk) => {
    const body = { inputs: chunk.map((place) => wire(head, inputs[place])), ood: !!head.ood };
    try {
      const response = await call(urlOf(head, "predict"), { body, signal, waiting });
      if (response.predictions?.length !== chunk.length) throw refusal("The service answered another number of texts.");
      chunk.forEach((place, i) => done(place, response.predictions[i], response.version));
    } catch (error) {
      if (![400, 408, 413, 422].includes(error.status)) throw error;
      if (chunk.length === 1) return done(chunk[0], { error: error.message });
      const half = chunk.length >> 1; // one bad row does not fail its neighbours
      await send(chunk.slice(0, half));
      await send(chunk.slice(half));
    }
  };
  const work = async () => {
    try {
      while (queue.length) await send(queue.shift());
    } catch (error) {
      queue.length = 0;
      throw error;
    }
  };
  const ended = await Promise.allSettled(Array.from({ length: IN_FLIGHT }, work));
  const failed = ended.find((end) => end.status === "rejected");
  if (failed) throw failed.reason;
}

// --- heads and keys ---

async function start() {
  say($("about"), "");
  try {
    const waiting = (text) => say($("about"), text);
    const [listed, info] = await Promise.all([call("v1/heads", { waiting }), call("info", { waiting })]);
    now.limits = info.limits;
    $("key").hidden = !info.keys || !!now.key;
    $("made").textContent = `${info.encoder.model} · bertray ${info.version}`;
    $("links").hidden = !!info.keys; // a browser follows a link without the key
    take(listed);
    if (!$("key").hidden) askKey("This service needs a key.");
  } catch (error) {
    if (error.status !== 401) say($("about"), error.message);
  }
}

function take({ heads, default: first }) {
  now.heads = heads;
  const named = (name) => heads.find((head) => head.name === name);
  const head = named(now.head?.name) || named(first) || heads[0];
  options($("head"), heads.map(({ name, version }) => [name, `${name} (version ${version})`]));
  $("head").hidden = heads.length < 2;
  $("only").textContent = heads.length === 1 ? `${head.name}, version ${head.version}` : "";
  $("predict").disabled = !head;
  if (!head) return say($("about"), "No head is being served.");
  $("head").value = head.name;
  show(head);
}

/** What a head is and takes. */
function show(head) {
  now.head = head;
  say($("about"), told(head));
  const two = head.pairs || isQuestion(head);
  const [first, second] = isQuestion(head) ? ["Question", "Context"] : ["First text", "Second text"];
  $("first-label").textContent = two ? first : "Texts, one a line";
  $("second-label").textContent = second;
  $("column-label").textContent = `Column of the ${two ? first.toLowerCase() : "text"}`;
  $("pair-label").textContent = `Column of the ${second.toLowerCase()}`;
  $("second-field").hidden = $("pair-field").hidden = !two;
}

function choose(head) {
  show(head);
  now.asking?.abort();
  $("results").replaceChildren();
  say($("said"), "");
  if (now.table) prepare();
}

/** Another version answered than is told: someone changed it meanwhile. */
const notice = (head, versions) => {
  if (versions.size && [...versions].at(-1) !== head.version) call("v1/heads").then(take).catch(() => {});
};

function told(head) {
  const entities = head.task === "token-classification", kinds = entities ? kindsOf(head) : head.labels;
  const listed = kinds.join(", "), some = count(kinds.length, entities ? "kind" : "label") + (listed.length < 120 ? `: ${listed}.` : ".");
  if (isQuestion(head)) return "Answers a question with a part of a context.";
  if (entities) return `Finds names in a text, of ${some}`;
  if (head.problem === "regression") return `Answers with a number${listed && `: ${listed}`}.`;
  if (head.problem === "multi_label") return `Any of ${some}`;
  return `One of ${some}${head.threshold > 0 ? ` Below ${percent(head.threshold)} it is “not sure enough”.` : ""}`;
}

const kindsOf = (head) => [...new Set(head.labels.filter((tag) => tag !== "O").map((tag) => tag.replace(/^[BIES]-/, "")))];

function askKey(why) {
  $("key").hidden = false;
  say($("key-note"), why);
  $("key-value").focus();
}

submitted($("key"), async () => {
  const key = $("key-value").value.trim();
  if (!/^[\x21-\x7e]+$/.test(key)) return say($("key-note"), "A key has no spaces or letters beyond ASCII.");
  now.key = key;
  stored((storage) => storage.setItem("bertray-key", key));
  await start();
  if (!$("key").hidden) return;
  $("key-value").value = "";
  [$("first"), $("label"), $("upload")].find((element) => element.offsetParent)?.focus(); // what is to be seen
});
on($("head"), "change", () => choose(now.heads.find(({ name }) => name === $("head").value)));

// --- an answer as people see it ---

const plain = (text) => text === "" ? [make("span.empty", "(empty)")] : [text];
const paragraph = (parts) => make("p.text", { dir: "auto" }, ...parts);

/** A text's pieces, those of spans made by a function. Places count code points, as in Python. */
function pieces(text, spans, draw) {
  const points = Array.from(text), parts = [];
  let at = 0;
  for (const span of [...spans].sort((a, b) => a.start - b.start)) {
    if (span.start < at || span.end <= span.start) continue;
    parts.push(points.slice(at, span.start).join(""), draw(points.slice(span.start, span.end).join(""), span));
    at = span.end;
  }
  return [...parts, points.slice(at).join("")].filter((part) => part !== "");
}

function bars(scores, chosen) {
  const lines = scores.map(({ label, score }) => bar(label, score, percent(score), chosen.includes(label)));
  const list = (some) => make("ul.bars", ...some);
  if (lines.length <= SHOWN + 2) return [list(lines)];
  const rest = make("details", make("summary", `${lines.length - SHOWN} more labels`), list(lines.slice(SHOWN)));
  return [list(lines.slice(0, SHOWN)), rest];
}

const heading = (text, unsure, detail) => make(unsure ? "p.named.unsure" : "p.named",
  make("bdi", text), detail ? make("span.small", ` ${detail}`) : "");

/** The labels or kinds that a prediction says, or what it says instead of one. */
function namesIn(found) {
  if (found.entities) return found.entities.map((entity) => entity.entity_group);
  if (found.labels) return found.labels.length ? found.labels : ["none of the labels"];
  return "scores" in found ? [found.label ?? "not sure enough"] : [];
}

/** What is told in a word or two, and the elements beside the text. */
function described(head, found) {
  const one = (short, unsure, detail, ...below) => ({ short, shown: [heading(short, unsure, detail), ...below] });
  if ("error" in found) return one("failed", true, "", make("p.small", found.error));
  if ("answer" in found) return one(found.answer || "no answer", !found.answer, `score ${number(found.score)}`);
  if ("value" in found) return one(number(found.value), false, head.labels?.[0]);
  const names = namesIn(found);
  if (found.entities) {
    const lines = found.entities.map(({ word, entity_group: kind, score }) => bar(word, score, percent(score), true, kind));
    return one(names.length ? count(names.length, "name") : "no names", !names.length, "", make("ul.bars", ...lines));
  }
  return one(names.join(", "), found.label === null || found.labels?.length === 0, "", ...bars(found.scores, names));
}

const number = (x) => Number.isFinite(x) ? String(Number(x.toPrecision(4))) : "no number";

function notesOf(found) {
  const notes = [];
  if (found.truncated) notes.push("Longer than the model reads: its end was left out.");
  if (found.ood?.outlier) notes.push(`Unlike the training texts (distance ${number(found.ood.distance)}, usually up to ${number(found.ood.threshold)}).`);
  return notes.length ? make("ul.notes.small", ...notes.map((note) => make("li", note))) : "";
}

function marked(head, [text, pair], found) {
  if (found.entities?.length) {
    const kinds = [...new Set([...kindsOf(head), ...found.entities.map((entity) => entity.entity_group)])];
    return [paragraph(pieces(text, found.entities, (part, { entity_group: kind }) =>
      make(`mark.k${kinds.indexOf(kind) % 6}`, part, make("span.kind", kind))))];
  }
  const second = found.answer ? pieces(pair, [found], (part) => make("mark", part)) : plain(pair ?? "");
  return [paragraph(plain(text)), ...(pair === undefined ? [] : [paragraph(second)])];
}

function result(head, input, found) {
  const side = make("div", ...marked(head, input, found), notesOf(found));
  const box = make("li.result", side, make("div", ...described(head, found).shown));
  if (head.explain && !("error" in found) && input[0].trim()) side.append(whyButton(head, input, side.firstElementChild));
  return box;
}

// --- why: words by how much they counted ---

function whyButton(head, input, line) {
  const button = make("button.why", "Why?", { type: "button", ariaExpanded: false, ariaLabel: `Why? ${input[0].slice(0, 60)}` });
  let shown = null;
  on(button, "click", async () => {
    button.ariaExpanded = !shown;
    if (shown) {
      shown.remove();
      shown = null;
      return line.replaceChildren(...plain(input[0]));
    }
    const reason = make("p.reason", "Leaving out each word once …", { role: "status" }), own = make("div", reason);
    button.before(shown = own);
    try {
      const found = await call(urlOf(head, "explain"), { body: { inputs: wire(head, input) }, waiting: (text) => say(reason, text) });
      if (shown !== own) return; // closed meanwhile
      const label = found.label ?? "the answer";
      line.replaceChildren(...weighed(input[0], found, label, reason));
      say(reason, "Point at a word, or tab to it and use the arrow keys.");
      own.prepend(legend(found.method, label));
    } catch (error) {
      say(reason, error.message);
    }
  });
  return button;
}

function weighed(text, { words, score }, label, reason) {
  const strongest = Math.max(0.01, ...words.map(({ weight }) => Math.abs(weight)));
  const drawn = [];
  return pieces(text, words, (part, { weight }) => {
    // as an image's, the weight is read too
    const ariaLabel = `${part}: ${weight < 0 ? "against" : "for"} ${label}, ${signed(weight)}`;
    const word = make(weight < 0 ? "span.w.against" : "span.w", part, { role: "img", ariaLabel, tabIndex: drawn.length ? -1 : 0 });
    word.style.setProperty("--s", Math.abs(weight) / strongest);
    const rest = Math.min(1, Math.max(0, score - weight));
    const tell = () => say(reason, `“${part}” ${signed(weight)}: without it “${label}” goes from ${percent(score)} to ${percent(rest)}.`);
    on(word, "pointerenter", tell);
    on(word, "focus", tell);
    on(word, "keydown", (event) => {
      const to = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -Infinity, End: Infinity }[event.key];
      if (!to) return;
      event.preventDefault();
      const next = drawn[Math.min(drawn.length - 1, Math.max(0, drawn.indexOf(word) + to))];
      word.tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
    });
    drawn.push(word);
    return word;
  });
}

function legend(method, label) {
  const example = (kind, text) => {
    const word = make(kind, text);
    word.style.setProperty("--s", 0.7);
    return word;
  };
  const how = method === "occlusion" ? "occlusion: each word left out once" : method;
  return make("p.small.key", example("span.w", `for ${label}`), example("span.w.against", `against ${label}`), make("span", how));
}

// --- texts ---

function typed(head) {
  if (head.pairs || isQuestion(head)) return [[$("first").value, $("second").value]];
  return $("first").value.split("\n").filter((line) => line.trim()).map((line) => [line]);
}

async function predict() {
  const head = now.head;
  if (!head) return;
  const inputs = typed(head);
  now.asking?.abort();
  const asking = now.asking = new AbortController();
  if (!inputs.some((input) => input.some((text) => text.trim()))) {
    $("results").replaceChildren();
    return say($("said"), "There is no text yet.");
  }
  const found = [], versions = new Set();
  let failure = null, answered = 0;
  const done = (place, prediction, version) => {
    found[place] = prediction;
    if (version) versions.add(version);
    if (++answered < inputs.length && answered % CHUNK === 0) say($("said"), `${whole(answered)} of ${count(inputs.length, "text")} …`);
  };
  try {
    await answerAll(head, inputs, inputs.keys(), done, { signal: asking.signal, waiting: (text) => say($("said"), text) });
  } catch (error) {
    if (asking.signal.aborted) return;
    failure = error;
  }
  if (asking.signal.aborted) return;
  $("results").replaceChildren(...Object.keys(found).map((place) => result(head, inputs[place], found[place])));
  const by = `${head.name}, version ${[...versions].join(" and ")}`;
  const what = inputs.length === 1 && found[0] ? described(head, found[0]).short : count(answered, inputs[0].length > 1 ? "pair" : "text");
  if (failure) say($("said"), answered ? `${what} by ${by}, then: ${failure.message}` : failure.message, true);
  else say($("said"), versions.size ? `${what} · ${by}` : what, !versions.size);
  notice(head, versions);
}

submitted($("ask"), predict);
on($("ask"), "keydown", (event) => {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey) || event.isComposing) return;
  event.preventDefault();
  predict();
});

// --- files: RFC 4180, and what spreadsheets make of it ---

/** Records of a text. A line with nothing at all on it is none; `""` is one of an empty cell. */
function parse(text, delimiter) {
  const records = [], end = text.length;
  let at = 0, unclosed = 0;
  while (at < end) {
    const record = [], from = at;
    for (;;) {
      let cell = "";
      if (text[at] === '"') {
        for (at++; ; at++) {
          const close = text.indexOf('"', at);
          cell += text.slice(at, close < 0 ? end : close);
          at = close < 0 ? end : close + 1;
          if (close < 0) unclosed = records.length + 1;
          if (text[at] !== '"') break;
          cell += '"';
        }
      }
      const stop = at;
      while (at < end && text[at] !== delimiter && text[at] !== "\n" && text[at] !== "\r") at++;
      record.push(cell + text.slice(stop, at));
      if (text[at] !== delimiter) break;
      at++;
    }
    if (at > from) records.push(record);
    if (text[at] === "\r") at++;
    if (text[at] === "\n") at++;
  }
  return { records, unclosed };
}

/** The delimiter under which the first records have one number of cells, over one; none if all are one text. */
function delimiterOf(text, name) {
  if (/\.(tsv|tab)$/i.test(name)) return "\t";
  const head = text.slice(0, 100_000);
  let best = "", most = 0;
  for (const delimiter of [",", ";", "\t"]) {
    const widths = parse(head, delimiter).records.slice(0, 50).map(({ length }) => length);
    const alike = widths[0] > 1 ? widths.filter((width) => width === widths[0]).length / widths.length : 0;
    if (alike > most) [best, most] = [delimiter, alike];
  }
  return best;
}

/** UTF-8, UTF-16 with its mark, else what Windows wrote. */
function decoded(bytes) {
  const [a, b] = bytes, wide = a + b === 0x1fd; // FF FE or FE FF
  const encoding = wide ? `utf-16${a > b ? "le" : "be"}` : "utf-8", bom = wide || (a === 0xef && b === 0xbb);
  try {
    return { text: new TextDecoder(encoding, { fatal: true }).decode(bytes), bom, encoding };
  } catch {
    return { text: new TextDecoder("windows-1252").decode(bytes), bom: false, encoding: "windows-1252" };
  }
}

async function read(file) {
  if (file.size > 1e8) throw refusal(`${file.name} is larger than 100 MB.`);
  const { text, bom, encoding } = decoded(new Uint8Array(await file.arrayBuffer()));
  const delimiter = delimiterOf(text, file.name);
  const { records, unclosed } = parse(text, delimiter);
  if (unclosed) throw refusal(`${file.name}: the quote that opens in row ${unclosed} is never closed.`);
  if (!records.length) throw refusal(`${file.name} has no rows.`);
  const width = records.reduce((most, { length }) => Math.max(most, length), 0);
  return { name: file.name, records, width, delimiter, bom, encoding, newline: /\r\n/.test(text) ? "\r\n" : "\n" };
}

const rowsOf = (table) => $("header").checked ? table.records.slice(1) : table.records;
const namesOf = (table) => Array.from({ length: table.width }, (_, i) => ($("header").checked && table.records[0][i]) || `column ${i + 1}`);

const TEXTS = /^(text|sentence|content|body|message|review|tweet|comment|question|premise)[_ ]?1?$/i;

/** The column that is named like a text, else the one of the longest cells. */
function guess(table, but) {
  const length = (i) => rowsOf(table).slice(0, 50).reduce((total, row) => total + (row[i] || "").length, 0);
  const ranked = namesOf(table).map((name, i) => ({ i, rank: TEXTS.test(name.trim()) ? Infinity : length(i) })).filter(({ i }) => i !== but);
  return ranked.reduce((best, one) => one.rank > best.rank ? one : best, ranked[0] ?? { i: 0 }).i;
}

/** The form for a file, anew: another file, another header or another head. */
function prepare() {
  const { table, head } = now;
  for (const id of ["column", "pair"]) options($(id), namesOf(table).map((name, i) => [i, name]));
  $("column").value = guess(table);
  $("pair").value = guess(table, Number($("column").value));
  $("job").hidden = !head;
  fresh();
}

/** Nothing is labelled yet. */
function fresh() {
  const { table } = now, rows = rowsOf(table);
  now.job?.abort();
  now.job = null;
  now.found = [];
  now.versions = new Set();
  const many = rows.length > MAX_ROWS;
  const text = rows[0]?.[$("column").value] || "(empty)";
  $("sample").textContent = rows.length ? `First row: ${text.slice(0, 200)}` : "";
  $("label").disabled = many || !rows.length;
  $("progress").value = 0;
  $("progress").max = Math.max(1, rows.length);
  $("counts").replaceChildren();
  buttons();
  const between = { ",": "commas", ";": "semicolons", "\t": "tabs" }[table.delimiter];
  const read = `${count(rows.length, "row")}, ${count(table.width, "column")}${table.width > 1 ? ` between ${between}` : ""}, ${table.encoding}.`;
  say($("told"), many ? `${read} This page takes up to ${whole(MAX_ROWS)}; “bertray predict” takes more.` : read, many);
}

/** Which buttons there are; the focus goes on where its button goes. */
function buttons() {
  const rows = rowsOf(now.table).length, left = rows - Object.keys(now.found).length, running = !!now.job;
  const focused = document.activeElement;
  $("label").textContent = left < rows && left ? `Go on with ${count(left, "row")}` : `Label ${count(rows, "row")}`;
  $("label").hidden = running || !left;
  $("cancel").hidden = !running;
  for (const id of ["column", "pair", "header"]) $(id).disabled = running;
  $("download").hidden = running || left === rows;
  if (!$("download").hidden) offer();
  if (focused?.hidden) [$("cancel"), $("download"), $("label")].find(({ hidden }) => !hidden)?.focus();
}

async function work() {
  const { head, table } = now, rows = rowsOf(table), found = now.found;
  const columns = [$("column").value, ...(head.pairs || isQuestion(head) ? [$("pair").value] : [])];
  const inputs = rows.map((row) => columns.map((column) => row[column] ?? ""));
  const job = now.job = new AbortController();
  let finished = Object.keys(found).length, failure = null;
  const label = () => say($("told"), `${whole(finished)} of ${count(rows.length, "row")} …`);
  $("told").ariaLive = "off"; // the progress bar tells
  buttons();
  label();
  const done = (place, prediction, version) => {
    found[place] = prediction;
    if (version) now.versions.add(version);
    $("progress").value = ++finished;
    label();
  };
  try {
    await answerAll(head, inputs, [...inputs.keys()].filter((place) => !found[place]), done, { signal: job.signal, waiting: (text) => say($("told"), text) });
  } catch (error) {
    failure = error;
  }
  if (now.found !== found) return; // another file or head meanwhile
  now.job = null;
  buttons();
  $("told").ariaLive = "polite";
  tally(head, found, rows.length, job.signal.aborted ? "Cancelled. " : failure ? `${failure.message} ` : "");
  notice(head, now.versions);
}

function tally(head, found, rows, first) {
  const all = Object.values(found), good = all.filter((one) => !("error" in one));
  const parts = [`${first}${whole(good.length)} of ${count(rows, "row")} labelled by ${head.name}, version ${[...now.versions].join(" and ") || head.version}`];
  const failed = all.length - good.length, cut = good.filter((one) => one.truncated).length, odd = good.filter((one) => one.ood?.outlier).length;
  if (failed) parts.push(`${failed} failed (see the column “error”)`);
  if (cut) parts.push(`${cut} longer than the model reads`);
  if (odd) parts.push(`${odd} unlike the training texts`);
  say($("told"), `${parts.join(", ")}.`, Boolean(first && !first.startsWith("Cancelled")) || failed > 0);
  const counts = new Map();
  for (const one of good) {
    for (const name of namesIn(one)) counts.set(name, (counts.get(name) || 0) + 1);
  }
  const sorted = [...counts].sort((a, b) => b[1] - a[1]), most = sorted[0]?.[1];
  $("counts").replaceChildren(...sorted.slice(0, 20).map(([name, n]) => bar(name, n / most, whole(n), true)));
}

/** The columns that a head adds, and a row's cells in them. */
function added(head) {
  if (isQuestion(head)) return [["answer", "start", "stop", "score"], (found) => [found.answer, found.start, found.end, found.score]];
  if (head.task === "token-classification") return [["entities"], (found) => [JSON.stringify(found.entities)]];
  if (head.problem === "regression") return [["value"], (found) => [found.value]];
  if (head.problem === "multi_label") {
    const scores = (found) => found.labels.map((name) => found.scores.find(({ label }) => label === name)?.score ?? null);
    return [["label", "score"], (found) => [JSON.stringify(found.labels), JSON.stringify(scores(found))]];
  }
  return [["label", "score"], (found) => [found.label, found.scores[0]?.score]];
}

/** A cell of ours: text that a spreadsheet would run as a formula gets an apostrophe before it. */
const harmless = (value) => typeof value === "string" && /^[=+\-@\t\r]/.test(value) ? `'${value}` : String(value ?? "");

function written() {
  const { table, head, found } = now, delimiter = table.delimiter || ",";
  const [columns, cells] = added(head);
  const withErrors = Object.values(found).some((one) => "error" in one);
  const taken = new Set($("header").checked ? table.records[0] : []);
  const names = [...columns, ...(withErrors ? ["error"] : [])].map((name) => {
    for (let i = 1; taken.has(name); i++) name = i === 1 ? `predicted_${name}` : `${name}_${i}`;
    taken.add(name);
    return name;
  });
  const width = table.width, full = (row) => [...row, ...Array(width - row.length).fill("")];
  const lines = $("header").checked ? [[...full(table.records[0]), ...names]] : [];
  rowsOf(table).forEach((row, i) => {
    const one = found[i] ?? null, good = one && !("error" in one);
    const own = good ? cells(one) : columns.map(() => "");
    lines.push([...full(row), ...own.map(harmless), ...(withErrors ? [harmless(one?.error)] : [])]);
  });
  const special = new RegExp(`["\\r\\n${delimiter}]|^\\s|\\s$`);
  const quoted = (cell) => special.test(cell) ? `"${cell.replaceAll('"', '""')}"` : cell;
  const text = lines.map((line) => line.map(quoted).join(delimiter) + table.newline).join("");
  return (table.bom ? "\ufeff" : "") + text;
}

function offer() {
  const { name, delimiter } = now.table, link = $("download");
  if (link.href) URL.revokeObjectURL(link.href);
  link.href = URL.createObjectURL(new Blob([written()], { type: "text/csv;charset=utf-8" }));
  link.download = `${name.replace(/\.[^.]*$/, "")}-${now.head.name}.${delimiter === "\t" ? "tsv" : "csv"}`;
  link.textContent = `Download ${link.download}`;
}

on($("upload"), "change", async () => {
  const [file] = $("upload").files;
  if (!file) return;
  now.job?.abort();
  now.job = now.table = null;
  $("job").hidden = true;
  $("counts").replaceChildren();
  try {
    const table = await read(file);
    if ($("upload").files[0] !== file) return;
    now.table = table;
    if (now.head) prepare();
  } catch (error) {
    say($("told"), error.status === 0 ? error.message : `${file.name} cannot be read.`, true);
  }
});
on($("header"), "change", prepare);
for (const id of ["column", "pair"]) on($(id), "change", fresh);
submitted($("job"), work);
on($("cancel"), "click", () => now.job?.abort());

start();
