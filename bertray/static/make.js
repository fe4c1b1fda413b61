/** An element `p.small` of its children and properties. Text stays text. */
export function make(kind, ...parts) {
  const [tag, ...classes] = kind.split(".");
  const element = document.createElement(tag);
  element.className = classes.join(" ");
  for (const part of parts) {
    if (typeof part === "string" || part instanceof Node) element.append(part);
    else Object.assign(element, part);
  }
  return element;
}
export const whole = (n) => n.toLocaleString("en");
export const percent = (p) => `${(100 * p).toFixed(1)} %`;
export const signed = (x) => `${x < 0 ? "−" : "+"}${Math.abs(x).toFixed(3)}`;

export function bar(name, share, value, chosen, detail) {
  const fill = make("i");
  fill.style.setProperty("--p", Math.min(1, Math.max(0, share)));
  const label = make("span", make("bdi", name), detail ? make("span.kind", detail) : "");
  return make(chosen ? "li.on" : "li", label, make("span.bar", { ariaHidden: true }, fill), make("span", value));
}
