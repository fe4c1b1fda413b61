// The tab "Look inside": a text, or two, as the encoder sees them. A tab of its own, loaded behind the others.
import { call } from "./app.js";
import { show } from "./explore.js";
import { make } from "./make.js";

const field = (id, label, rows) => {
  const area = make("textarea", { id, rows, dir: "auto" });
  return [area, make("div", make("label", label, { htmlFor: id }), area)];
};
const [first, firstField] = field("inside-first", "A text; [MASK] stands for a word to be guessed", 3);
const [second, secondField] = field("inside-second", "A second text, if you like", 3);
const button = make("button.main", "Look inside", { id: "look" });
const said = make("p.status", { role: "status" }), found = make("div", { id: "explored" });
const form = make("form", make("div.fields", firstField, secondField), make("div.row", button), said);
const section = make("section", form, found, { id: "inside", ariaLabel: "Look inside", hidden: true });
const tab = make("input", { type: "radio", name: "tab", id: "tab-inside" });
let asking = null;

async function look() {
  asking?.abort();
  const { signal } = asking = new AbortController();
  said.classList.remove("bad");
  said.textContent = "Looking …";
  try {
    const inputs = second.value ? [first.value, second.value] : first.value;
    const answer = await call("v1/explore", { body: { inputs }, signal, waiting: (text) => said.textContent = text });
    show(found, answer);
    said.textContent = `${answer.tokens.kept} tokens, as ${answer.model} sees them`;
  } catch (error) {
    if (signal.aborted) return;
    said.textContent = error.message;
    said.classList.add("bad");
  }
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  look();
});
form.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey) || event.isComposing) return;
  event.preventDefault();
  look();
});
const tabs = document.querySelector(".tabs"), others = document.querySelectorAll("#texts, #file");
const choose = () => {
  section.hidden = !tab.checked;
  for (const other of others) other.hidden = tab.checked;
};
document.head.append(make("link", { rel: "stylesheet", href: "static/explore.css" }));
tabs.append(make("label", tab, "Look inside"));
tabs.addEventListener("change", choose);
others[others.length - 1].after(section);
choose();
