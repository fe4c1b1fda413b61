// The map of rows: what lies under the pointer, the finger or the arrow keys is told in full.
(() => {
  const map = document.querySelector(".map");
  if (!map) return;
  const svg = map.querySelector("svg"), tip = map.querySelector(".tip");
  const points = [...svg.querySelectorAll("circle")].map((circle) => {
    const title = circle.querySelector("title");
    title.remove(); // the browser's own tip would cover ours
    return { circle, x: +circle.getAttribute("cx"), y: +circle.getAttribute("cy"), lines: title.textContent.split("\n") };
  });
  let shown = null;

  const visible = (point) => point.circle.getClientRects().length > 0;
  const hide = () => {
    if (shown) shown.circle.classList.remove("at");
    shown = null;
    tip.hidden = true;
  };
  const show = (point) => {
    if (point === shown) return;
    hide();
    shown = point;
    point.circle.classList.add("at");
    tip.replaceChildren(...point.lines.map((line) => {
      const div = document.createElement("div");
      div.dir = "auto";
      div.textContent = line;
      return div;
    }));
    tip.hidden = false;
    tip.style.left = tip.style.top = "0";
    const frame = map.getBoundingClientRect(), box = point.circle.getBoundingClientRect();
    const below = box.bottom - frame.top + 8, above = box.top - frame.top - tip.offsetHeight - 8;
    const left = (box.left + box.right) / 2 - frame.left - tip.offsetWidth / 2;
    tip.style.left = `${Math.max(0, Math.min(left, frame.width - tip.offsetWidth))}px`;
    tip.style.top = `${above < 0 ? below : above}px`;
  };
  const nearest = (event, reach) => {
    const toPicture = svg.getScreenCTM().inverse();
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(toPicture);
    let best = null, least = (reach * toPicture.a) ** 2;
    for (const point of points) {
      const far = (point.x - at.x) ** 2 + (point.y - at.y) ** 2;
      if (far < least && visible(point)) [best, least] = [point, far];
    }
    return best;
  };
  const under = (reach) => (event) => {
    const point = nearest(event, reach);
    if (point) show(point);
    else hide();
  };

  svg.addEventListener("pointermove", (event) => event.pointerType !== "touch" && under(14)(event));
  svg.addEventListener("pointerdown", under(28));
  svg.addEventListener("pointerleave", (event) => event.pointerType !== "touch" && hide());
  map.addEventListener("change", hide); // of what is shown at all
  svg.addEventListener("keydown", (event) => {
    if (event.key === "Escape") return hide();
    const [axis, sign] = { ArrowLeft: ["x", -1], ArrowRight: ["x", 1], ArrowUp: ["y", -1], ArrowDown: ["y", 1] }[event.key] || [];
    if (!axis) return;
    event.preventDefault();
    const order = points.filter(visible).sort((a, b) => a[axis] - b[axis] || a.x - b.x || a.y - b.y);
    const next = order[shown ? order.indexOf(shown) + sign : 0];
    if (next) show(next);
  });
})();
