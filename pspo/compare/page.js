"use strict";
// Draws a figure when it comes near the screen; the boxes of the legend show and hide an arm in all figures, and a figure
// in which no shown arm has a line.
const figures = JSON.parse(document.getElementById("figures").textContent);
const boxes = [...document.querySelectorAll(".legend input")];
const hidden = new Set(boxes.filter((box) => !box.checked).map((box) => box.value));
const MAX_ARMS_WITH_BANDS = 5;
const axis = {automargin: true, zeroline: false, gridcolor: "#e5e7eb", linecolor: "#6b7280",
              fixedrange: matchMedia("(pointer: coarse)").matches};  // a finger scrolls the page
const config = {responsive: true, displaylogo: false, modeBarButtons: [["zoom2d", "autoScale2d", "toImage"]]};

// The bands of many arms would cover one another and the lines.
const visible = (trace) => !hidden.has(trace.meta) && !(trace.fill && boxes.length - hidden.size > MAX_ARMS_WITH_BANDS);

function draw(element) {
  const {traces, layout} = figures[element.dataset.figure];
  for (const trace of traces) trace.visible = visible(trace);
  Plotly.newPlot(element, traces, {
    showlegend: false, dragmode: false, hovermode: "closest", margin: {l: 8, r: 12, t: 8, b: 8},
    font: {family: "system-ui, sans-serif", size: 12, color: "#1f2933"},
    ...layout, xaxis: {...axis, ...layout.xaxis}, yaxis: {...axis, ...layout.yaxis},
  }, config);
}

const near = new IntersectionObserver((entries) => {
  for (const {isIntersecting, target} of entries) {
    if (isIntersecting) { near.unobserve(target); draw(target); }
  }
}, {rootMargin: "800px"});
const plots = [...document.querySelectorAll(".plot")];
const hideEmpty = () => plots.forEach((plot) => {
  plot.parentElement.hidden = !figures[plot.dataset.figure].traces.some(visible);
});
hideEmpty();
plots.forEach((plot) => near.observe(plot));
addEventListener("beforeprint", () => plots.filter((plot) => !plot.data && !plot.parentElement.hidden).forEach(draw));

if (innerWidth < 700) document.querySelector(".legend").open = false;
for (const box of boxes) {
  box.addEventListener("change", () => {
    if (box.checked) hidden.delete(box.value); else hidden.add(box.value);
    hideEmpty();
    for (const plot of plots.filter((plot) => plot.data?.some((trace) => trace.meta))) {
      Plotly.restyle(plot, {visible: plot.data.map(visible)});
    }
  });
}
