"use strict";
const form = $("form");
let running = new AbortController(); // ends the request that is under way

const settings = () => new URLSearchParams(new FormData(form));
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

/** Samples the clips that the form asks for, and shows them while they form. */
async function start() {
  running.abort();
  running = new AbortController();
  history.replaceState(null, "", `#${settings()}`);
  document.querySelectorAll("figure progress").forEach((bar) => bar.removeAttribute("value"));
  alarm("");
  const response = await call("sample", settings(), running.signal);
  let rest = ""; // of a line; each line is a step of a clip
  for await (const part of response.body.pipeThrough(new TextDecoderStream())) {
    const lines = (rest + part).split("\n");
    rest = lines.pop();
    for (const line of lines) show(JSON.parse(line));
  }
}

function show(step) {
  if (step.error) throw Error(step.error);
  const figure = $(step.name) || newFigure(step.name);
  figure.querySelector("progress").value = 1 - step.t;
  figure.querySelector(".film").style.backgroundImage = `url(${step.film})`;
  showScores(figure, step, "learned", -3, 3);
  if (step.true) showScores(figure, step, "true", 0, 1);
}

function newFigure(name) {
  const figure = document.querySelector("template").content.firstElementChild.cloneNode(true);
  figure.id = figure.firstElementChild.textContent = name;
  $("clips")[name === "base" ? "prepend" : "append"](figure);
  return figure;
}

/** Bars of a step's VQ, MQ and TA, and their mean as the next point of the curve. */
function showScores(figure, step, kind, low, high) {
  const scores = step[kind];
  const bar = (score, i) => `<b>${["VQ", "MQ", "TA"][i]}</b>
    <meter min="${low}" max="${high}" value="${score}"></meter> <span>${score.toFixed(2)}</span>`;
  figure.querySelector(`div.${kind}`).innerHTML = scores.map(bar).join("");
  const curve = figure.querySelector(`polyline.${kind}`);
  const before = step.t === 1 ? "" : curve.getAttribute("points");
  const height = (mean(scores) - low) / (high - low);
  curve.setAttribute("points", `${before} ${1 - step.t},${1 - height}`);
}

function showValues() {
  for (const slider of form.querySelectorAll("[type=range]")) {
    slider.parentElement.dataset.value = slider.value;
  }
}

function restore() {
  for (const [name, value] of new URLSearchParams(location.hash.slice(1))) {
    if (form.elements[name]) form.elements[name].value = value;
  }
  $("clips").replaceChildren();
  showValues();
  start();
}

async function save() {
  $("saved").textContent = "sample.py writes the files.";
  $("saved").textContent = (await ask("save", settings())).lines.join("\n");
}

onhashchange = restore;
ask("about").then((about) => {
  $("clips").style.setProperty("--frames", about.frames);
  $("clips").style.setProperty("--ratio", about.ratio);
  $("prompts").append(...about.prompts.map((prompt) => new Option(prompt)));
  restore();
});
