"use strict";
const DIMENSIONS = ["VQ", "MQ", "TA"];
const form = $("form");
let frames; // of a clip
let running = new AbortController(); // ends the request that is under way
let drift = {}; // of one prompt, noise and CFG: {strength: scores}

const settings = () => Object.fromEntries(new FormData(form));
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

/** Shows the form's settings, and samples the clips they ask for. */
async function start() {
  running.abort();
  running = new AbortController();
  showSettings();
  alarm("");
  document.querySelectorAll("progress").forEach((bar) => bar.removeAttribute("value"));
  try {
    const response = await call("sample", settings(), running.signal);
    for await (const line of lines(response)) {
      if (line.error) throw Error(line.error);
      show(line);
    }
  } catch (error) {
    if (error.name !== "AbortError") alarm(error.message);
  }
}

function showSettings() {
  const {tab, prompt, seed, cfg} = settings();
  $("link").href = `#${new URLSearchParams(settings())}`;
  history.replaceState(null, "", $("link").href);
  $("steer").hidden = tab !== "steer";
  $("drift").hidden = tab !== "drift";
  if ($("clips").dataset.tab !== tab) $("clips").replaceChildren();
  $("clips").dataset.tab = tab;
  if (drift.of !== [prompt, seed, cfg].join()) drift = {of: [prompt, seed, cfg].join(), points: []};
}

/** The JSON objects of a response, one a line, as they come. */
async function* lines(response) {
  let rest = "";
  for await (const part of response.body.pipeThrough(new TextDecoderStream())) {
    const parts = (rest + part).split("\n");
    rest = parts.pop();
    for (const line of parts) yield JSON.parse(line);
  }
}

/** Shows a step of a clip. */
function show(line) {
  const figure = $(line.name) || newFigure(line.name);
  if (line.done === 0) figure.points = [];
  figure.querySelector("progress").value = line.done;
  if (!line.film) return;
  figure.querySelector(".film").style.backgroundImage = `url(${line.film})`;
  figure.querySelector(".bars").innerHTML = DIMENSIONS.map((name, i) => `<b>${name}</b>`
    + bar("true", 0, 1, line.true?.[i]) + bar("learned", -3, 3, line.learned[i])).join("");
  const point = {x: 1 - line.t, learned: (mean(line.learned) + 3) / 6};
  if (line.true) point.true = mean(line.true);
  figure.points.push(point);
  plot(figure, figure.points);
  if (line.name !== "drift" || line.done < 1) return;
  drift.points.push({...point, x: form.elements.strength.value / 2});
  plot($("drift"), drift.points.sort((a, b) => a.x - b.x));
}

function newFigure(name) {
  const figure = $("clip").content.cloneNode(true).firstElementChild;
  figure.id = name;
  figure.querySelector("figcaption").textContent = name;
  figure.querySelector(".film").style.setProperty("--frames", frames);
  $("clips")[name === "base" ? "prepend" : "append"](figure);
  return figure;
}

function bar(kind, min, max, value) {
  if (value === undefined) return "<i></i><i></i>";
  const meter = `<meter class="${kind}" min="${min}" max="${max}" value="${value}"></meter>`;
  return `${meter}<span>${value.toFixed(2)}</span>`;
}

/** Draws the curves of points {x, true, learned}, each from 0 to 1. */
function plot(parent, points) {
  for (const kind of ["true", "learned"]) {
    const places = points.filter((point) => kind in point);
    const path = places.map((point) => `${100 * point.x} ${40 - 40 * point[kind]}`).join("L");
    parent.querySelector(`path.${kind}`).setAttribute("d", path && `M${path}h0`);
  }
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
  showValues();
  start();
}

form.addEventListener("input", showValues);
form.addEventListener("change", start);
form.addEventListener("submit", (event) => event.preventDefault());
addEventListener("hashchange", restore);
$("save").addEventListener("click", async () => {
  $("saved").hidden = false;
  $("saved").textContent = "sample.py is writing the files";
  const answer = await ask("save", settings()).catch((error) => ({lines: [error.message]}));
  $("saved").textContent = answer.lines.join("\n");
});
ask("about", {}).then((about) => {
  frames = about.frames;
  $("prompts").append(...about.prompts.map((prompt) => new Option(prompt)));
  restore();
}, (error) => alarm(error.message));
