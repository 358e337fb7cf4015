"use strict";
const form = $("form");
let frames; // of a clip
let running = new AbortController(); // ends the request that is under way
let drift = {points: []}; // {of: prompt, noise and CFG, points: scores at the strengths seen}

const settings = () => Object.fromEntries(new FormData(form));
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

/** Shows the form's settings, and samples the clips that they ask for. */
async function start() {
  running.abort();
  running = new AbortController();
  const {tab, prompt, seed, cfg} = settings();
  $("link").href = `#${new URLSearchParams(settings())}`;
  history.replaceState(null, "", $("link").href);
  $("steer").hidden = tab !== "steer";
  $("drift").hidden = tab !== "drift";
  if ($("clips").dataset.tab !== tab) $("clips").replaceChildren();
  $("clips").dataset.tab = tab;
  if (drift.of !== prompt + seed + cfg) drift = {of: prompt + seed + cfg, points: []};
  document.querySelectorAll("progress").forEach((bar) => bar.removeAttribute("value"));
  alarm("");
  try {
    await read(await call("sample", settings(), running.signal));
  } catch (error) {
    if (error.name !== "AbortError") alarm(error.message);
  }
}

/** Shows the lines of a response, a step of a clip each, as they come. */
async function read(response) {
  let rest = "";
  for await (const part of response.body.pipeThrough(new TextDecoderStream())) {
    const lines = (rest + part).split("\n");
    rest = lines.pop();
    for (const line of lines) show(JSON.parse(line));
  }
}

function show(step) {
  if (step.error) throw Error(step.error);
  const figure = $(step.name) || newFigure(step.name);
  if (step.done === 0) figure.points = [];
  figure.querySelector("progress").value = step.done;
  if (!step.film) return;
  figure.querySelector(".film").style.backgroundImage = `url(${step.film})`;
  figure.querySelector(".bars").innerHTML = ["VQ", "MQ", "TA"].map((name, i) => `<b>${name}</b>`
    + bar("true", 0, 1, step.true?.[i]) + bar("learned", -3, 3, step.learned[i])).join("");
  const point = {x: 1 - step.t, learned: (mean(step.learned) + 3) / 6};
  if (step.true) point.true = mean(step.true);
  figure.points.push(point);
  if (step.name === "drifted" && step.done === 1) {
    drift.points.push({...point, x: form.elements.strength.value / 2});
    figure.points = drift.points.sort((a, b) => a.x - b.x);
  }
  for (const kind of ["true", "learned"]) {
    const places = figure.points.filter((point) => kind in point);
    const path = places.map((point) => `${point.x} ${1 - point[kind]}`).join("L");
    figure.querySelector(`path.${kind}`).setAttribute("d", path && `M${path}h.01`);
  }
}

function newFigure(name) {
  const figure = document.querySelector("template").content.firstElementChild.cloneNode(true);
  figure.id = figure.firstElementChild.textContent = name;
  figure.querySelector(".film").style.setProperty("--frames", frames);
  $("clips")[name === "base" ? "prepend" : "append"](figure);
  return figure;
}

function bar(kind, min, max, value) {
  if (value === undefined) return "<i></i><i></i>";
  const range = `min="${min}" max="${max}" value="${value}"`;
  return `<meter class="${kind}" ${range}></meter><span>${value.toFixed(2)}</span>`;
}

function showValues() {
  form.querySelectorAll("[type=range]").forEach((slider) => {
    slider.parentElement.dataset.value = slider.value;
  });
}

function restore() {
  for (const [name, value] of new URLSearchParams(location.hash.slice(1))) {
    if (form.elements[name]) form.elements[name].value = value;
  }
  showValues();
  start();
}

form.addEventListener("input", showValues);
form.addEventListener("change", start);
form.addEventListener("submit", (event) => event.preventDefault());
addEventListener("hashchange", restore);
$("save").addEventListener("click", async () => {
  $("saved").hidden = false;
  $("saved").textContent = "sample.py writes the files";
  const answer = await ask("save", settings()).catch((error) => ({lines: [error.message]}));
  $("saved").textContent = answer.lines.join("\n");
});
ask("about", {}).then((about) => {
  frames = about.frames;
  $("prompts").append(...about.prompts.map((prompt) => new Option(prompt)));
  restore();
}).catch((error) => alarm(error.message));
