// Draws the report's figures in the theme of the system, or of the button that was pressed.
"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  function draw() {
    const theme = chosen ?? (dark.matches ? "dark" : "light");
    if (chosen) document.documentElement.dataset.theme = chosen;
    for (const place of document.querySelectorAll("[data-figure]")) {
      const { data, layout } = structuredClone(figures[place.dataset.figure][theme]);
      layout.height = Number(place.dataset.height);
      Plotly.react(place, data, layout, { responsive: true, displaylogo: false });
    }
  }
  for (const button of document.querySelectorAll("[data-set]"))
    button.addEventListener("click", () => { chosen = button.dataset.set; draw(); });
  dark.addEventListener("change", draw);
  draw();
})();
