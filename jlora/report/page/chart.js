// The values of each chart under a cursor, which the pointer moves over the drawing and the arrow keys on the slider.
"use strict";

for (const figure of document.querySelectorAll("figure.chart")) {
  const { x, x_range, y_range, plot, series } = JSON.parse(figure.querySelector("script").textContent);
  const [left, top, right, bottom] = plot;
  const drawing = figure.querySelector("svg[role=img]");
  const slider = figure.querySelector("input");
  const output = figure.querySelector("output");
  const places = [...new Set(series.flatMap((s) => s.points.map(([at]) => at)))].sort((a, b) => a - b);
  const values = series.map((s) => new Map(s.points));
  const across = (at) => left + ((at - x_range[0]) / (x_range[1] - x_range[0])) * (right - left);
  const up = (value) => bottom - ((value - y_range[0]) / (y_range[1] - y_range[0])) * (bottom - top);
  const digits = new Intl.NumberFormat("en", { maximumSignificantDigits: 4 });
  const label = (value) => (value !== 0 && Math.abs(value) < 1e-3 ? value.toExponential(3) : digits.format(value));
  const svg = (name, attributes) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    return element;
  };
  const cursor = svg("path", { class: "cursor" });
  const dots = series.map(({ colour }) => svg("circle", { class: `series-${colour}`, r: 3.5, visibility: "hidden" }));
  drawing.append(cursor, ...dots);

  const show = (index) => {
    const at = places[index];
    slider.value = index;
    cursor.setAttribute("d", `M${across(at)} ${top}V${bottom}`);
    const words = [`${x} ${at.toLocaleString("en")}`];
    series.forEach(({ name }, n) => {
      const value = values[n].get(at);
      dots[n].setAttribute("visibility", value == null ? "hidden" : "visible");
      if (value === undefined) return;
      words.push(`${series.length > 1 ? `${name} ` : ""}${value === null ? "not finite" : label(value)}`);
      if (value === null) return;
      dots[n].setAttribute("cx", across(at));
      dots[n].setAttribute("cy", up(value));
    });
    output.textContent = words.join(" \u00b7 ");
    slider.setAttribute("aria-valuetext", output.textContent);
  };

  slider.min = 0;
  slider.max = places.length - 1;
  slider.hidden = false;
  show(places.length - 1);
  slider.addEventListener("input", () => show(slider.valueAsNumber));
  drawing.addEventListener("pointermove", (event) => {
    const box = drawing.getBoundingClientRect();
    const wanted = ((event.clientX - box.left) / box.width) * drawing.viewBox.baseVal.width;
    const far = (index) => Math.abs(across(places[index]) - wanted);
    let nearest = 0;
    for (let index = 1; index < places.length; index += 1) if (far(index) < far(nearest)) nearest = index;
    show(nearest);
  });
}
