// Draws what BERT sees (POST /v1/explore, or `bertray explore --html`). What people wrote is shown as text alone.
import { bar, make, percent, signed, whole } from "./make.js";

const SVG = "http://www.w3.org/2000/svg", CELL = 18, LABELS = 96;
const TITLES = {
  tokens: "Tokens", tables: "Embedding tables", architecture: "Architecture",
  outputs: "Outputs", pretraining: "Pretraining tasks", prediction: "The prediction, explained",
};
const KINDS = ["token", "position", "type"];

const drawn = (tag, attributes, ...parts) => {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...parts);
  return element;
};
const visible = (text) => text.replace(/[\p{Cc}\p{Cf}\u2028\u2029]/gu, (char) => `\\u{${char.codePointAt(0).toString(16)}}`);
const shaped = (shape) => `[${shape.join(", ")}]`;
const named = (text) => make("bdi", visible(text));
const mean = (maps) => maps[0].map((row, i) => row.map((_, j) => maps.reduce((sum, one) => sum + one[i][j], 0) / maps.length));

// --- parts ---

const scrolled = (label, ...parts) => make("div.scroll", { tabIndex: 0, role: "region", ariaLabel: label }, ...parts);
const cell = (tag, part, kind = "") => make(kind ? `${tag}.${kind}` : tag, part);

function listing(label, columns, rows) {
  const head = make("tr", ...columns.map((column) => column instanceof Node ? column : make("th", column, { scope: "col" })));
  const body = rows.map((row) => make("tr", ...row.map((part) => part instanceof HTMLTableCellElement ? part : cell("td", part))));
  return scrolled(label, make("table", make("thead", head), make("tbody", ...body)));
}

/** Numbers in cells, the darker the larger (of all, or of each row alone), negative ones in another colour. */
function numbers(label, names, columns, values, digits = 2, alone = false) {
  const largest = (row) => Math.max(1e-9, ...row.map(Math.abs)), most = Math.max(...values.map(largest));
  const rows = values.map((row, i) => [cell("th", named(names[i])), ...row.map((value) => {
    const one = cell("td", value.toFixed(digits).replace("-", "−"), value < 0 ? "n.below" : "n");
    one.style.setProperty("--s", Math.abs(value) / (alone ? largest(row) : most));
    return one;
  })]);
  return listing(label, ["", ...columns.map((column) => make("th.amount", column, { scope: "col" }))], rows);
}

const bars = (scores) => make("ul.bars", ...scores.map(([name, share, value]) => bar(visible(name), share, value)));

/** A square map with names on both sides. Pointing at a cell, or the arrow keys, tell its value. */
function map(label, names, tell) {
  const size = CELL * names.length, told = make("p.told.small", { role: "status" });
  const marker = drawn("rect", { width: CELL, height: CELL, class: "marker", visibility: "hidden" });
  const cells = drawn("g", {});
  const picture = drawn("svg", {
    viewBox: `${-LABELS} ${-LABELS} ${LABELS + size} ${LABELS + size}`, width: LABELS + size, tabindex: 0, role: "img", class: "map",
  }, cells, marker);
  names.forEach((name, place) => {
    const short = visible(name).length > 11 ? `${visible(name).slice(0, 10)}…` : visible(name);
    const middle = CELL * (place + 0.5);
    picture.append(
      drawn("text", { x: -6, y: middle, class: "row" }, short),
      drawn("text", { transform: `translate(${middle} -6) rotate(-90)`, class: "column" }, short),
    );
  });
  let values = [], at = null;
  const point = (i, j) => {
    if (values[i]?.[j] === undefined) return;
    at = [i, j];
    marker.setAttribute("x", CELL * j);
    marker.setAttribute("y", CELL * i);
    marker.setAttribute("visibility", "visible");
    told.textContent = tell(visible(names[i]), visible(names[j]), values[i][j]);
  };
  const follow = (event) => {
    const { x, y } = new DOMPoint(event.clientX, event.clientY).matrixTransform(picture.getScreenCTM().inverse());
    point(Math.floor(y / CELL), Math.floor(x / CELL));
  };
  picture.addEventListener("pointermove", follow);
  picture.addEventListener("pointerdown", follow);
  picture.addEventListener("keydown", (event) => {
    const step = { ArrowDown: [1, 0], ArrowUp: [-1, 0], ArrowRight: [0, 1], ArrowLeft: [0, -1] }[event.key];
    if (!step) return;
    event.preventDefault();
    if (at) point(at[0] + step[0], at[1] + step[1]);
    else point(0, 0);
    marker.scrollIntoView({ block: "nearest", inline: "nearest" });
  });
  const fill = (next, title) => {
    values = next;
    picture.setAttribute("aria-label", title);
    cells.replaceChildren(...values.flatMap((row, i) => row.map((value, j) => drawn("rect", {
      x: CELL * j, y: CELL * i, width: CELL, height: CELL, class: value < 0 ? "below" : "above",
      "fill-opacity": Math.min(1, Math.abs(value)).toFixed(3),
    }))));
    if (at) point(...at);
    else told.textContent = "Point at a cell, or move with the arrow keys.";
  };
  return { shown: make("div", scrolled(label, picture), told), fill };
}

/** A slider over layers. */
function slider(name, first, last, change) {
  const value = make("output"), input = make("input", { type: "range", min: first, max: last, value: last });
  const set = (to) => {
    input.value = to;
    value.textContent = to;
    change(to);
  };
  input.addEventListener("input", () => set(Number(input.value)));
  return { shown: make("label.slider", `${name} `, input, value), set, last: () => set(last) };
}

const caption = (text) => make("h3", text);
const note = (text) => make("p.small", text);

// --- sections ---

function tokens(found) {
  const own = found.tokens;
  const chips = make("p.chips", ...own.tokens.map((token) => {
    const kind = token.special ? "special" : token.unknown ? "unknown" : token.of ? "second" : "first";
    return make(`span.chip.${kind}`, named(token.token), make("small", String(token.id)));
  }));
  const rows = own.tokens.map((token) => [
    String(token.place), named(token.token), String(token.id), String(token.type), String(token.mask), String(token.position),
    token.start === null ? "" : `${token.start}–${token.stop}`,
  ]);
  const joined = own.words.filter((word) => word.pieces.length > 1);
  const lists = [
    ["In pieces", joined.map((word) => `${word.read_as} = ${word.pieces.join(" ")}`)],
    ["Read otherwise", own.changed.map((word) => `${word.text} as ${word.read_as}`)],
    ["Not in the vocabulary", own.unknown.map((word) => word.text)],
    ["Dropped", own.dropped.map((run) => `${run.text} at ${run.start}`)],
  ].filter(([, items]) => items.length);
  return [
    chips,
    listing("Tokens", ["place", "token", "id", "type", "mask", "position", "characters"], rows),
    ...lists.map(([title, items]) => make("p", make("b", `${title}: `), named([...new Set(items)].join("; ")))),
  ];
}

function tables({ tables: own, tokens: read }) {
  const names = read?.tokens.map(({ token }) => token) ?? own.input.sum.map((_, place) => String(place));
  const parts = KINDS.filter((kind) => own[kind]).flatMap((kind) => [
    caption(`${kind[0].toUpperCase()}${kind.slice(1)} table ${shaped(own[kind].shape)}`),
    numbers(`${kind} table`, own[kind].values.map((_, row) => `row ${row}`), own[kind].values[0].map((_, i) => String(i)), own[kind].values, 4),
  ]);
  const kinds = [...KINDS, "sum", "normalized"].filter((kind) => own.input[kind]);
  const sum = make("div");
  const choice = make("select", ...names.map((name, place) => make("option", `${place} ${visible(name)}`, { value: String(place) })));
  const draw = () => {
    const values = kinds.map((kind) => own.input[kind][choice.value]);
    sum.replaceChildren(numbers("What adds up", kinds, values[0].map((_, i) => String(i)), values, 4, true));
  };
  choice.value = String(Math.min(1, names.length - 1));
  choice.addEventListener("change", draw);
  draw();
  parts.push(
    caption("How they add up to what the first layer is given"), make("label", "Token ", choice), sum,
    caption("Lengths (norms) of those vectors"),
    numbers("Norms", names, kinds, names.map((_, place) => kinds.map((kind) => own.input.norms[kind][place])), 2),
  );
  if (own.neighbours.length) {
    const rows = own.neighbours.map(({ token, nearest }) => [
      cell("th", named(token)), ...nearest.map((other) => make("td", named(other.token), " ", make("small", other.cosine.toFixed(2)))),
    ]);
    parts.push(caption("Nearest in the token table, by cosine"), listing("Nearest tokens", ["token", "1", "2", "3", "4", "5"], rows));
  }
  if (own.positions) {
    const { places, cosine } = own.positions;
    parts.push(
      caption(`Positions ${places[0]} to ${places.at(-1)} of their table beside one another`),
      pixels(cosine, "positions", `Cosines between positions: the darker, the more alike`),
      note("Cosine: white 0 or less, full colour 1. Positions near each other tend to be alike, so that order can be felt."),
    );
  }
  return parts;
}

/** Values as pixels. */
function pixels(values, kind, label) {
  const size = values.length, canvas = make(`canvas.${kind}`, { width: size, height: size, role: "img", ariaLabel: label });
  const context = canvas.getContext("2d"), data = context.createImageData(size, size);
  values.flat().forEach((value, i) => data.data.set([43, 127, 212, 255 * Math.min(1, Math.max(0, value))], 4 * i));
  context.putImageData(data, 0, 0);
  return canvas;
}

function architecture({ architecture: own }) {
  const rows = own.tree.map((line) => {
    const name = make("td.tree", line.name);
    name.style.setProperty("--depth", line.depth);
    const shapes = Object.entries(line.shapes).map(([part, shape]) => `${part} ${shaped(shape)}`.trim()).join("  ");
    return [name, cell("td", shapes, "shapes"), cell("td", whole(line.parameters), "amount")];
  });
  const total = (name, amount) => [cell("th", name), "", cell("td", whole(amount), "amount")];
  rows.push(total("frozen", own.frozen));
  rows.push(total(own.trained ? `trained: a head ${shaped(own.trained.shape)} and its bias` : "trained: nothing before a head is fitted", own.trained?.parameters ?? 0));
  return [
    make("p", `${own.type}: ${own.layers} layers, ${own.width} wide (${whole(own.inner)} inside), with ${own.heads} attention heads each; a vocabulary of ${whole(own.vocabulary)} tokens; numbers in ${own.kind}.`),
    listing("Architecture", ["part", "shapes", make("th.amount", "parameters", { scope: "col" })], rows),
  ];
}

function outputs({ outputs: own, tokens: read }) {
  const states = own.last_hidden_state.values;
  const names = read?.tokens.map(({ token }) => token) ?? states.map((_, place) => String(place));
  const columns = states[0].map((_, i) => String(i)), layers = own.movement.norm.length - 1;
  const parts = [caption(`last_hidden_state ${shaped(own.last_hidden_state.shape)}`), numbers("last_hidden_state", names, columns, states)];
  if (own.pooler_output) {
    const { shape, values } = own.pooler_output;
    parts.push(caption(`pooler_output ${shaped(shape)}`), numbers("pooler_output", ["tanh(dense)"], columns, [values], 4));
  }
  parts.push(
    caption("The text as one vector, by every pooling"),
    numbers("Poolings", own.poolings.map(({ name }) => name), columns, own.poolings.map(({ values }) => values), 3),
    note(own.poolings.map(({ name, norm }) => `norm of ${name}: ${norm.toFixed(2)}`).join(" · ")),
  );
  if (own.cosine) {
    const cosines = map("Cosines of tokens", names, (a, b, value) => `${a} and ${b}: ${value.toFixed(3)}`);
    const layer = slider("Layer", 0, layers, (to) => cosines.fill(own.cosine[to], `Cosines of tokens behind layer ${to}`));
    parts.push(caption("How alike tokens are"), note("Cosines of their vectors; layer 0 is what the first layer is given."), layer.shown, cosines.shown);
    layer.last();
  }
  if (own.attention) parts.push(...attention(own.attention, names));
  const steps = own.movement.norm.map((_, layer) => String(layer));
  const turned = (rows) => rows[0].map((_, place) => rows.map((row) => row[place]));
  parts.push(
    caption("How far each token moves"), note("Cosine of its vector behind each layer to what the first layer was given."),
    numbers("Movement", names, steps, turned(own.movement.from_first)),
    note("Cosine of its vector behind each layer to the one before."),
    numbers("Steps", names, steps.slice(1), turned(own.movement.from_previous)),
  );
  if (own.same_words.length) {
    parts.push(
      caption("The same word in both texts"), note("Cosine of its two vectors behind each layer, each text read by itself: one row of the token table, then its place, then its context."),
      numbers("Same words", own.same_words.map(({ word }) => word), steps, own.same_words.map(({ cosine }) => cosine)),
    );
  }
  return parts;
}

function attention(maps, names) {
  const large = map("Attention", names, (from, to, value) => `${from} looks at ${to}: ${percent(value)}`);
  const heads = maps[0].length;
  const head = make("select", make("option", "mean of all", { value: "" }), ...maps[0].map((_, place) => make("option", String(place), { value: String(place) })));
  let at = maps.length;
  const fill = () => {
    const one = head.value === "" ? mean(maps[at - 1]) : maps[at - 1][head.value];
    large.fill(one, `Attention in layer ${at}, ${head.value === "" ? "mean of its heads" : `head ${head.value}`}`);
    small.querySelectorAll("[aria-pressed]").forEach((button) => button.ariaPressed = button.value === `${at} ${head.value}`);
  };
  const small = make("div.maps");
  small.style.setProperty("--heads", heads);
  const layer = slider("Layer", 1, maps.length, (to) => {
    at = to;
    fill();
  });
  maps.forEach((own, depth) => own.forEach((one, place) => {
    const button = make("button.small-map", { type: "button", value: `${depth + 1} ${place}`, ariaPressed: false, title: `layer ${depth + 1}, head ${place}`, ariaLabel: `layer ${depth + 1}, head ${place}` }, pixels(one, "tiny", ""));
    button.addEventListener("click", () => {
      head.value = String(place);
      layer.set(depth + 1);
    });
    small.append(button);
  }));
  head.addEventListener("change", fill);
  layer.last();
  return [
    caption("Attention"), note("How much of each token (column) goes into which (row)."),
    make("div.row", layer.shown, make("label", "Head ", head)), large.shown,
    note("All of it: a row a layer, a column a head. Choose one to see it above."), small,
  ];
}

function pretraining({ pretraining: own, tokens: read }) {
  const { masked, follows } = own;
  const parts = [caption("Masked words")];
  if (masked.why_not) parts.push(note(masked.why_not));
  for (const { place, candidates } of masked.fills) {
    const around = read?.tokens.slice(Math.max(0, place - 3), place + 4).map(({ token }) => token).join(" ");
    parts.push(make("p", `Token ${place} `, around ? named(`(${around})`) : "", " is probably:"));
    parts.push(bars(candidates.map(({ token, probability }) => [token, probability, percent(probability)])));
  }
  parts.push(caption("Next sentence"));
  parts.push(follows.why_not ? note(follows.why_not) : bars([["the second text follows", follows.probability, percent(follows.probability)]]));
  return parts;
}

function prediction({ prediction: own }) {
  const parts = [make("p.named", named(own.told))];
  if (own.why_not) return [...parts, note(own.why_not)];
  parts.push(own.problem === "regression"
    ? note(own.scores.map(({ label, score }) => `${label} ${score.toFixed(4)}`).join(" · "))
    : bars(own.scores.map(({ label, score }) => [label, score, percent(score)])));
  const label = visible(own.explained);
  parts.push(
    caption(`Words for and against ${label}, by leaving each out (occlusion)`), weighed(own.words.map(({ text, weight }) => [text, weight])),
    caption(`Tokens for and against ${label}, by gradient times input`), weighed(own.tokens.map(({ token, weight }) => [token, weight])),
    caption("Nearest training texts"),
  );
  if (own.why_no_nearest) return [...parts, note(own.why_no_nearest)];
  const rows = own.nearest.map((row) => [row.cosine.toFixed(3), named(String(row.label)), named([row.text, row.text_pair].filter(Boolean).join(" / "))]);
  return [...parts, listing("Nearest training texts", ["cosine", "label", "text"], rows)];
}

/** Words or tokens with their weights, the darker the more they count. */
function weighed(parts) {
  const most = Math.max(1e-9, ...parts.map(([, weight]) => Math.abs(weight)));
  return make("p.chips", ...parts.map(([text, weight]) => {
    const chip = make(weight < 0 ? "span.chip.w.against" : "span.chip.w", named(text), make("small", signed(weight)));
    chip.style.setProperty("--s", Math.abs(weight) / most);
    return chip;
  }));
}

const SECTIONS = { tokens, tables, architecture, outputs, pretraining, prediction };

/** Fill an element with what was found. */
export function show(into, found) {
  const parts = found.notes.map((text) => make("p.note", text));
  for (const [name, draw] of Object.entries(SECTIONS)) {
    if (found[name]) parts.push(make("section.part", make("h2", TITLES[name], { id: `part-${name}` }), make("p.about", found.about[name]), ...draw(found)));
  }
  into.replaceChildren(...parts);
}
