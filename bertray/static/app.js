// The page: texts or a file in, a head's answers out. What people wrote reaches the document as text alone, never as HTML.
const MAX_ROWS = 5000, CHUNK = 64, IN_FLIGHT = 2, TRIES = 30, SHOWN = 6, STORED = "bertray-key";
const $ = (id) => document.getElementById(id);
const state = { heads: [], head: null, limits: {}, key: recall(), table: null, job: null, asking: null };

const make = (tag, properties = {}, ...children) => {
  const { dataset, ...rest } = properties;
  const element = Object.assign(document.createElement(tag), rest);
  Object.assign(element.dataset, dataset);
  element.append(...children.filter((child) => child !== null));
  return element;
};
const count = (n, noun, nouns = `${noun}s`) => `${n.toLocaleString("en")} ${n === 1 ? noun : nouns}`;
const percent = (p) => `${(100 * p).toFixed(1)} %`;
const signed = (x) => `${x < 0 ? "−" : "+"}${Math.abs(x).toFixed(3)}`;
const say = (element, text, bad = false) => {
  element.textContent = text;
  element.classList.toggle("bad", bad);
};
const isQuestion = (head) => head.task === "question-answering";

// --- the service ---

class Failure extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

function recall() {
  try {
    return sessionStorage.getItem(STORED) || "";
  } catch {
    return ""; // storage is forbidden: the key lives as long as the page
  }
}

const pause = (seconds, signal) => new Promise((resolve, reject) => {
  const timer = setTimeout(resolve, 1000 * seconds);
  signal?.addEventListener("abort", () => {
    clearTimeout(timer);
    reject(signal.reason);
  }, { once: true });
});

/** JSON of a path. A service that is busy or not ready says when to come again, and we do. */
async function call(path, { body, signal, waiting = () => {} } = {}) {
  const headers = { Accept: "application/json" };
  if (state.key) headers.Authorization = `Bearer ${state.key}`;
  if (body) headers["Content-Type"] = "application/json";
  const request = { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal, cache: "no-store" };
  for (let tries = 1; ; tries++) {
    let response;
    try {
      response = await fetch(path, request);
    } catch (error) {
      if (signal?.aborted) throw error;
      throw new Failure("The service cannot be reached. Is it still running?");
    }
    const content = await response.json().catch((error) => {
      if (signal?.aborted) throw error;
      return null;
    });
    if (response.ok && content) return content;
    const message = String(content?.error ?? content?.detail ?? `The service answered with status ${response.status}.`);
    if ((response.status === 429 || response.status === 503) && tries < TRIES) {
      const seconds = Math.min(30, Math.max(0.2, Number(response.headers.get("Retry-After")) || 1));
      waiting(`${response.status === 429 ? "The service is busy" : "The service is not ready"}: trying again in ${seconds} s.`);
      await pause(seconds, signal);
      continue;
    }
    if (response.status === 401) askKey(state.key ? "That key was refused." : "This service needs a key.");
    throw new Failure(message, response.status);
  }
}

const urlOf = (head, action) => `v1/heads/${encodeURIComponent(head.name)}/${action}`;
const wire = (head, [text, pair]) => isQuestion(head) ? { question: text, context: pair } : head.pairs ? [text, pair] : text;

/** Inputs cut where a request would hold too many texts or characters. */
function chunksOf(inputs, places) {
  const most = Math.min(CHUNK, state.limits.texts || CHUNK), room = state.limits.characters || Infinity;
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

/** done(place, prediction, response) for each place of inputs; {error} is the prediction of one that is refused.
 * What stops everything (no key, no service, cancelled) is thrown once the requests under way have ended. */
async function answerAll(head, inputs, places, done, { signal, waiting }) {
  const queue = chunksOf(inputs, places);
  const send = async (chunk) => {
    const body = { inputs: chunk.map((place) => wire(head, inputs[place])), ood: Boolean(head.ood) };
    try {
      const response = await call(urlOf(head, "predict"), { body, signal, waiting });
      if (response.predictions?.length !== chunk.length) throw new Failure("The service answered for another number of texts.");
      chunk.forEach((place, i) => done(place, response.predictions[i], response));
    } catch (error) {
      if (![400, 408, 413, 422].includes(error.status)) throw error;
      if (chunk.length === 1) return done(chunk[0], { error: error.message }, null);
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
    state.limits = info.limits || {};
    $("key").hidden = !info.keys || Boolean(state.key);
    const encoder = info.encoder?.model ?? info.encoder;
    $("made").textContent = `${encoder ? `${encoder} · ` : ""}bertray ${info.version ?? ""}`;
    $("links").hidden = Boolean(info.keys); // a browser follows a link without the key
    take(listed);
    if (!$("key").hidden) askKey("This service needs a key.");
  } catch (error) {
    if (error.status !== 401) say($("about"), error.message);
  }
}

function take({ heads, default: first }) {
  state.heads = heads;
  const named = (name) => heads.find((head) => head.name === name);
  const head = named(state.head?.name) || named(first) || heads[0];
  $("head").replaceChildren(...heads.map(({ name, version }) => make("option", { value: name, textContent: `${name} (version ${version})` })));
  $("head").hidden = heads.length < 2;
  $("only").textContent = heads.length === 1 ? `${head.name}, version ${head.version}` : "";
  $("predict").disabled = !head;
  if (!head) return say($("about"), "No head is being served.");
  $("head").value = head.name;
  show(head);
}

/** What a head is and takes. */
function show(head) {
  state.head = head;
  say($("about"), told(head));
  const two = head.pairs || isQuestion(head);
  const [first, second] = isQuestion(head) ? ["Question", "Context"] : ["First text", "Second text"];
  $("first-label").textContent = two ? first : "Texts, one a line";
  $("second-label").textContent = second;
  $("column-label").textContent = `Column of the ${two ? first.toLowerCase() : "text"}`;
  $("column-pair-label").textContent = `Column of the ${second.toLowerCase()}`;
  $("second-field").hidden = $("column-pair-field").hidden = !two;
}

function choose(head) {
  show(head);
  state.asking?.abort();
  $("results").replaceChildren();
  say($("said"), "");
  if (state.table) prepare();
}

/** Another version answered than the one that is told: someone changed it meanwhile. */
const notice = (head, response) => {
  if (response && response.version !== head.version) call("v1/heads").then(take).catch(() => {});
};

function told(head) {
  const kinds = head.task === "token-classification" ? kindsOf(head) : head.labels || [];
  const some = kinds.slice(0, 8).join(", ") + (kinds.length > 8 ? ` and ${kinds.length - 8} more` : "");
  if (isQuestion(head)) return "Answers a question with a part of a context.";
  if (head.task === "token-classification") return `Finds names in a text, of ${count(kinds.length, "kind")}: ${some}.`;
  if (head.problem === "regression") return `Answers with a number${kinds[0] ? `: ${kinds[0]}` : ""}.`;
  if (head.problem === "multi_label") return `Any of ${count(kinds.length, "label")}: ${some}.`;
  const sure = head.threshold > 0 ? ` Less than ${percent(head.threshold)} is “not sure enough”.` : "";
  return `One of ${count(kinds.length, "label")}: ${some}.${sure}`;
}

const kindsOf = (head) => [...new Set((head.labels || []).filter((tag) => tag !== "O").map((tag) => tag.replace(/^[BIES]-/, "")))];

function askKey(why) {
  $("key").hidden = false;
  say($("key-note"), why);
  $("key-value").focus();
}

$("key").addEventListener("submit", async (event) => {
  event.preventDefault();
  const key = $("key-value").value.trim();
  if (!/^[\x21-\x7e]+$/.test(key)) return say($("key-note"), "A key is made of letters, digits and signs without spaces.");
  state.key = key;
  try {
    sessionStorage.setItem(STORED, key);
  } catch {
    // see recall
  }
  await start();
  if (!$("key").hidden) return;
  $("key-value").value = "";
  $("first").focus();
});
$("head").addEventListener("change", () => choose(state.heads.find(({ name }) => name === $("head").value)));

// --- tabs ---

const tabs = [$("tab-texts"), $("tab-file")];
const open = (tab) => {
  for (const each of tabs) {
    each.setAttribute("aria-selected", each === tab);
    each.tabIndex = each === tab ? 0 : -1;
    $(each.getAttribute("aria-controls")).hidden = each !== tab;
  }
};
for (const tab of tabs) {
  tab.addEventListener("click", () => open(tab));
  tab.addEventListener("keydown", ({ key }) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[key];
    if (!step) return;
    const next = tabs[(tabs.indexOf(tab) + step + tabs.length) % tabs.length];
    open(next);
    next.focus();
  });
}

// --- an answer as people see it ---

const plain = (text) => text === "" ? [make("span", { className: "empty", textContent: "(empty)" })] : [text];
const paragraph = (parts) => make("p", { className: "text", dir: "auto" }, ...parts);

/** A text's pieces, those of spans made by a function. Places count code points, as Python does; JavaScript's do not. */
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

function bar(name, share, value, on, detail = null) {
  const fill = make("i");
  fill.style.setProperty("--p", Math.min(1, Math.max(0, share)));
  const label = make("span", {}, make("bdi", { textContent: name }), detail && make("span", { className: "kind", textContent: detail }));
  const drawn = make("span", { className: "bar" }, fill);
  drawn.setAttribute("aria-hidden", "true");
  return make("li", { className: on ? "on" : "", dataset: { value: share } }, label, drawn, make("span", { textContent: value }));
}

function bars(scores, chosen) {
  const lines = scores.map(({ label, score }) => bar(label, score, percent(score), chosen.includes(label)));
  const list = (some) => make("ul", { className: "bars" }, ...some);
  if (lines.length <= SHOWN + 2) return [list(lines)];
  const rest = make("details", {}, make("summary", { textContent: `${lines.length - SHOWN} more labels` }), list(lines.slice(SHOWN)));
  return [list(lines.slice(0, SHOWN)), rest];
}

const heading = (text, unsure = false, detail = "") => make("p", { className: unsure ? "named unsure" : "named" },
  make("bdi", { textContent: text }), detail && make("span", { className: "small", textContent: ` ${detail}` }));

/** {short: in a word or two, shown: elements beside the text} of a prediction. */
function described(head, found) {
  if ("error" in found) return { short: "failed", shown: [heading("failed", true), make("p", { className: "small", textContent: found.error })] };
  if (found.entities) {
    const lines = found.entities.map(({ word, entity_group: kind, score }) => bar(word, score, percent(score), true, kind));
    const short = count(lines.length, "name");
    return { short, shown: [heading(lines.length ? short : "no names", !lines.length), make("ul", { className: "bars" }, ...lines)] };
  }
  if ("answer" in found) {
    const short = found.answer || "no answer";
    const sure = found.score >= 0 && found.score <= 1;
    const line = sure ? bar("score", found.score, percent(found.score), true) : make("li", { textContent: `score ${found.score}` });
    return { short, shown: [heading(short, !found.answer), make("ul", { className: "bars" }, line)] };
  }
  if ("value" in found) return { short: number(found.value), shown: [heading(number(found.value), false, head.labels?.[0] ?? "")] };
  if ("labels" in found) {
    const short = found.labels.join(", ") || "none";
    return { short, shown: [heading(found.labels.length ? short : "none of the labels", !found.labels.length), ...bars(found.scores, found.labels)] };
  }
  const short = found.label ?? "not sure enough";
  return { short, shown: [heading(short, found.label === null), ...bars(found.scores, [found.label])] };
}

const number = (x) => Number.isFinite(x) ? String(Number(x.toPrecision(4))) : "no number";

function notesOf(found) {
  const notes = [];
  if (found.truncated) notes.push("Longer than the model reads: its end was left out.");
  if (found.ood?.outlier) notes.push(`Unlike the training texts (distance ${number(found.ood.distance)}, usual is up to ${number(found.ood.threshold)}).`);
  return notes.length ? make("ul", { className: "notes small" }, ...notes.map((textContent) => make("li", { textContent }))) : null;
}

function marked(head, [text, pair], found) {
  if (found.entities?.length) {
    const kinds = [...new Set([...kindsOf(head), ...found.entities.map((entity) => entity.entity_group)])];
    return [paragraph(pieces(text, found.entities, (part, { entity_group: kind }) =>
      make("mark", { className: `k${kinds.indexOf(kind) % 9}` }, part, make("span", { className: "kind", textContent: kind }))))];
  }
  const second = found.answer ? pieces(pair, [found], (part) => make("mark", {}, part)) : plain(pair ?? "");
  return [paragraph(plain(text)), ...(pair === undefined ? [] : [paragraph(second)])];
}

function result(head, input, found) {
  const side = make("div", {}, ...marked(head, input, found), notesOf(found));
  const box = make("li", { className: "result" }, side, make("div", {}, ...described(head, found).shown));
  if (head.explain && !("error" in found) && input[0].trim()) side.append(whyButton(head, input, side.firstElementChild));
  return box;
}

// --- why: words by how much they counted ---

function whyButton(head, input, line) {
  const button = make("button", { type: "button", className: "why", textContent: "Why?" });
  button.setAttribute("aria-expanded", "false");
  let reason = null, told = null;
  const close = () => {
    reason?.remove();
    told?.remove();
    reason = told = null;
    line.replaceChildren(...plain(input[0]));
    button.setAttribute("aria-expanded", "false");
  };
  button.addEventListener("click", async () => {
    if (reason) return close();
    reason = make("p", { className: "reason", textContent: "Leaving out each word once …" });
    reason.setAttribute("role", "status");
    button.setAttribute("aria-expanded", "true");
    button.before(reason);
    const own = reason;
    try {
      const found = await call(urlOf(head, "explain"), { body: { inputs: wire(head, input) }, waiting: (text) => say(own, text) });
      if (reason !== own) return; // closed meanwhile
      const label = found.label ?? "the answer";
      line.replaceChildren(...weighed(input[0], found, label, own));
      say(own, "Point at a word, or tab to it and use the arrow keys.");
      told = legend(found.method, label);
      own.before(told);
    } catch (error) {
      say(own, error.message);
    }
  });
  return button;
}

function weighed(text, { words, score }, label, reason) {
  const strongest = Math.max(0.01, ...words.map(({ weight }) => Math.abs(weight)));
  const drawn = [];
  const parts = pieces(text, words, (part, { weight }) => {
    const word = make("span", { className: weight < 0 ? "w against" : "w", textContent: part, tabIndex: drawn.length ? -1 : 0, dataset: { weight } });
    word.style.setProperty("--s", Math.abs(weight) / strongest);
    const rest = Math.min(1, Math.max(0, score - weight));
    const meaning = `${weight < 0 ? "against" : "for"} ${label}, ${signed(weight)}`;
    word.setAttribute("role", "img"); // so that its weight is read along with it
    word.setAttribute("aria-label", `${part}: ${meaning}`);
    const tell = () => say(reason, `“${part}” ${signed(weight)}: without it “${label}” goes from ${percent(score)} to ${percent(rest)}.`);
    word.addEventListener("pointerenter", tell);
    word.addEventListener("focus", tell);
    word.addEventListener("keydown", (event) => {
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
  return parts;
}

function legend(method, label) {
  const example = (className, text) => {
    const word = make("span", { className, textContent: text });
    word.style.setProperty("--s", 0.7);
    return word;
  };
  const how = method === "occlusion" ? "occlusion: each word left out once" : method;
  return make("p", { className: "small key" }, example("w", `for ${label}`), example("w against", `against ${label}`), make("span", { textContent: how }));
}

// --- texts ---

function typed(head) {
  if (head.pairs || isQuestion(head)) return [[$("first").value, $("second").value]];
  return $("first").value.split("\n").filter((line) => line.trim()).map((line) => [line]);
}

async function predict() {
  const head = state.head;
  if (!head) return;
  const inputs = typed(head);
  state.asking?.abort();
  const asking = state.asking = new AbortController();
  if (!inputs.some((input) => input.some((text) => text.trim()))) {
    $("results").replaceChildren();
    return say($("said"), "There is no text yet.");
  }
  const found = [], versions = new Set(), since = performance.now();
  let failure = null, last = null, answered = 0;
  const done = (place, prediction, response) => {
    found[place] = prediction;
    last = response || last;
    if (response) versions.add(response.version);
    if (++answered < inputs.length && answered % CHUNK === 0) say($("said"), `${answered.toLocaleString("en")} of ${count(inputs.length, "text")} …`);
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
  const seconds = ((performance.now() - since) / 1000).toFixed(2);
  if (failure) say($("said"), answered ? `${what} by ${by}, then: ${failure.message}` : failure.message, true);
  else say($("said"), versions.size ? `${what} · ${by} · ${seconds} s` : what, !versions.size);
  notice(head, last);
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  predict();
});
$("ask").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey) || event.isComposing) return;
  event.preventDefault();
  predict();
});
if (/Mac|iP(hone|ad)/.test(navigator.platform)) document.querySelector(".shortcut").textContent = "or ⌘ Enter";

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

/** The delimiter under which the first records have the same number of cells, more than one. */
function delimiterOf(text, name) {
  if (/\.(tsv|tab)$/i.test(name)) return "\t";
  const head = text.slice(0, 100_000);
  let best = ",", most = 0;
  for (const delimiter of [",", ";", "\t"]) {
    const { records } = parse(head, delimiter);
    const widths = (records.length > 1 && head.length < text.length ? records.slice(0, -1) : records).slice(0, 50).map(({ length }) => length);
    const alike = widths[0] > 1 ? widths.filter((width) => width === widths[0]).length / widths.length : 0;
    if (alike > most) [best, most] = [delimiter, alike];
  }
  return best;
}

function decoded(bytes) {
  const [a, b] = bytes;
  const bom = (a === 0xff && b === 0xfe) || (a === 0xfe && b === 0xff) || (a === 0xef && b === 0xbb);
  const named = a === 0xff && b === 0xfe ? "utf-16le" : a === 0xfe && b === 0xff ? "utf-16be" : "utf-8";
  try {
    return { text: new TextDecoder(named, { fatal: true }).decode(bytes), bom, encoding: named };
  } catch {
    return { text: new TextDecoder("windows-1252").decode(bytes), bom, encoding: "windows-1252" };
  }
}

async function read(file) {
  if (file.size > 1e8) throw new Failure(`${file.name} is larger than 100 MB. For so much there is “bertray predict”.`);
  const { text, bom, encoding } = decoded(new Uint8Array(await file.arrayBuffer()));
  const delimiter = delimiterOf(text, file.name);
  const { records, unclosed } = parse(text, delimiter);
  if (unclosed) throw new Failure(`${file.name}: the quote that opens in row ${unclosed} is never closed.`);
  if (!records.length) throw new Failure(`${file.name} has no rows.`);
  const width = records.reduce((most, { length }) => Math.max(most, length), 0);
  return { name: file.name, records, width, delimiter, bom, encoding, newline: /\r\n/.test(text) ? "\r\n" : "\n" };
}

const rowsOf = (table) => $("header").checked ? table.records.slice(1) : table.records;
const namesOf = (table) => Array.from({ length: table.width }, (_, i) => ($("header").checked && table.records[0][i]) || `column ${i + 1}`);

const TEXTS = /^(text|sentence|sentence1|text1|content|body|message|review|tweet|comment|document|utterance|question|premise|query)$/i;
const SECONDS = /^(text_?pair|pair|text_?2|sentence_?2|second|context|hypothesis|passage|answer)$/i;

function guess(table, pattern, but) {
  const names = namesOf(table);
  const named = names.findIndex((name, i) => i !== but && pattern.test(name.trim()));
  if (named >= 0) return named;
  const length = (i) => rowsOf(table).slice(0, 50).reduce((total, row) => total + (row[i] || "").length, 0);
  return names.map((_, i) => i).filter((i) => i !== but).sort((a, b) => length(b) - length(a) || a - b)[0] ?? 0;
}

/** The form for a file, anew: another file, another header or another head. */
function prepare() {
  const { table, head } = state;
  const names = namesOf(table);
  for (const id of ["column", "column-pair"]) {
    $(id).replaceChildren(...names.map((name, i) => make("option", { value: i, textContent: name })));
  }
  const first = guess(table, TEXTS, -1);
  $("column").value = first;
  $("column-pair").value = guess(table, SECONDS, first);
  $("job").hidden = !head;
  fresh();
}

/** Nothing is labelled yet. */
function fresh() {
  const { table } = state, rows = rowsOf(table);
  state.job?.abort();
  state.job = null;
  state.found = [];
  state.versions = new Set();
  const many = rows.length > MAX_ROWS;
  const text = rows[0]?.[$("column").value] ?? "";
  $("sample").textContent = rows.length ? `First row: ${text.slice(0, 200) || "(empty)"}` : "";
  $("label").disabled = many || !rows.length;
  $("progress").value = 0;
  $("progress").max = Math.max(1, rows.length);
  $("counts").replaceChildren();
  buttons();
  const between = { ",": "commas", ";": "semicolons", "\t": "tabs" }[table.delimiter];
  const read = `${count(rows.length, "row")}, ${count(table.width, "column")}${table.width > 1 ? ` between ${between}` : ""}, ${table.encoding}.`;
  say($("told"), many ? `${read} This page takes up to ${MAX_ROWS.toLocaleString("en")}; for more there is “bertray predict”.` : read, many);
}

/** Which buttons there are; the focus goes on where its button gives way to another. */
function buttons() {
  const rows = rowsOf(state.table).length, left = rows - Object.keys(state.found).length, running = Boolean(state.job);
  const focused = document.activeElement;
  $("label").textContent = left < rows && left ? `Go on with ${count(left, "row")}` : `Label ${count(rows, "row")}`;
  $("label").hidden = running || !left;
  $("cancel").hidden = !running;
  for (const id of ["column", "column-pair", "header"]) $(id).disabled = running;
  $("download").hidden = running || left === rows;
  if (!$("download").hidden) offer();
  if (focused?.hidden) [$("cancel"), $("download"), $("label")].find(({ hidden }) => !hidden)?.focus();
}

async function work() {
  const { head, table } = state, rows = rowsOf(table), found = state.found;
  const columns = [$("column").value, ...(head.pairs || isQuestion(head) ? [$("column-pair").value] : [])];
  const inputs = rows.map((row) => columns.map((column) => row[column] ?? ""));
  const job = state.job = new AbortController();
  let finished = Object.keys(found).length, last = null, failure = null;
  const label = () => say($("told"), `${finished.toLocaleString("en")} of ${count(rows.length, "row")} …`);
  $("told").setAttribute("aria-live", "off"); // the progress bar tells
  buttons();
  label();
  const done = (place, prediction, response) => {
    found[place] = prediction;
    if (response) state.versions.add(response.version);
    last = response || last;
    $("progress").value = ++finished;
    label();
  };
  try {
    await answerAll(head, inputs, [...inputs.keys()].filter((place) => !found[place]), done, { signal: job.signal, waiting: (text) => say($("told"), text) });
  } catch (error) {
    failure = error;
  }
  if (state.found !== found) return; // another file or head meanwhile
  state.job = null;
  buttons();
  $("told").setAttribute("aria-live", "polite");
  tally(head, found, rows.length, job.signal.aborted ? "Cancelled. " : failure ? `${failure.message} ` : "");
  notice(head, last);
}

function tally(head, found, rows, first) {
  const all = Object.values(found), good = all.filter((one) => !("error" in one));
  const parts = [`${first}${good.length.toLocaleString("en")} of ${count(rows, "row")} labelled by ${head.name}, version ${[...state.versions].join(" and ") || head.version}`];
  const failed = all.length - good.length, cut = good.filter((one) => one.truncated).length, odd = good.filter((one) => one.ood?.outlier).length;
  if (failed) parts.push(`${failed} failed (see the column “error”)`);
  if (cut) parts.push(`${cut} longer than the model reads`);
  if (odd) parts.push(`${odd} unlike the training texts`);
  say($("told"), `${parts.join(", ")}.`, Boolean(first && !first.startsWith("Cancelled")) || failed > 0);
  const counts = new Map();
  for (const one of good) {
    const names = one.entities ? one.entities.map((entity) => entity.entity_group) : one.labels ?? ("scores" in one ? [one.label ?? "not sure enough"] : []);
    for (const name of names) counts.set(name, (counts.get(name) || 0) + 1);
  }
  const sorted = [...counts].sort((a, b) => b[1] - a[1]), most = sorted[0]?.[1];
  $("counts").replaceChildren(...sorted.slice(0, 20).map(([name, n]) => bar(name, n / most, n.toLocaleString("en"), true)));
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
  const { table, head, found } = state, { delimiter } = table;
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
  const { name, delimiter } = state.table, link = $("download");
  if (link.href) URL.revokeObjectURL(link.href);
  link.href = URL.createObjectURL(new Blob([written()], { type: "text/csv;charset=utf-8" }));
  link.download = `${name.replace(/\.[^.]*$/, "")}-${state.head.name}.${delimiter === "\t" ? "tsv" : "csv"}`;
  link.textContent = `Download ${link.download}`;
}

$("upload").addEventListener("change", async () => {
  const [file] = $("upload").files;
  if (!file) return;
  state.job?.abort();
  state.job = state.table = null;
  $("job").hidden = true;
  $("counts").replaceChildren();
  try {
    const table = await read(file);
    if ($("upload").files[0] !== file) return;
    state.table = table;
    if (state.head) prepare();
  } catch (error) {
    say($("told"), error instanceof Failure ? error.message : `${file.name} cannot be read.`, true);
  }
});
$("header").addEventListener("change", prepare);
for (const id of ["column", "column-pair"]) $(id).addEventListener("change", fresh);
$("job").addEventListener("submit", (event) => {
  event.preventDefault();
  work();
});
$("cancel").addEventListener("click", () => state.job?.abort());

start();
