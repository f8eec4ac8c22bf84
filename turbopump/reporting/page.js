"use strict";
// Draws the figures kept as JSON in the page. A string "--name" in them is a colour of the style sheet; it is looked up
// at each drawing, so the plots follow the page between light and dark.
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const touch = window.matchMedia("(pointer: coarse)").matches;
  const config = { responsive: true, displaylogo: false, displayModeBar: false, doubleClick: "reset" };

  function resolved(value, style) {
    if (typeof value === "string") return value.startsWith("--") ? style.getPropertyValue(value).trim() : value;
    if (Array.isArray(value)) {
      return typeof value[0] === "number" ? value : value.map((item) => resolved(item, style));
    }
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, resolved(item, style)]));
  }

  function draw(id) {
    const div = document.getElementById(id);
    if (!div) return Promise.resolve();
    const style = getComputedStyle(document.documentElement);
    const { data, layout } = resolved(figures[id], style);
    if (touch) layout.dragmode = false; // a finger on a plot scrolls the page
    return Plotly.react(div, data, layout, config);
  }

  function drawAll() {
    return Promise.all(Object.keys(figures).map(draw));
  }

  for (const button of document.querySelectorAll("button[data-logx]")) {
    button.addEventListener("click", () => {
      const on = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(on));
      const id = "plot-" + button.dataset.logx;
      figures[id].layout.xaxis.type = on ? "log" : "linear";
      figures[id].layout.uirevision = on ? "log" : "keep";
      draw(id);
    });
  }

  for (const button of document.querySelectorAll("button[data-trace]")) {
    button.addEventListener("click", () => {
      const on = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(on));
      const id = "plot-" + button.dataset.figure;
      figures[id].data[Number(button.dataset.trace)].visible = on;
      draw(id);
    });
  }

  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  window.addEventListener("beforeprint", drawAll);
  drawAll().then(() => document.documentElement.setAttribute("data-drawn", "true"));
})();
