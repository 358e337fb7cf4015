"use strict";
const KEYS = {VQ: "qwei", MQ: "asdi", TA: "zxci"}; // of left, same, right and invalid
const SIDES = ["left", "same", "right", "invalid"];
const FLIP = {left: "right", right: "left", same: "same", invalid: "invalid"};
const $ = (id) => document.getElementById(id);
const clips = [...document.querySelectorAll("video")];
let question = {}; // what the server said last
let swapped = false, paused = false;
let last = Promise.resolve(); // requests go out one after the other

async function ask(path, body) {
  const request = body && {method: "POST", body: JSON.stringify(body)};
  const response = await fetch(path, request).catch(() => {
    throw Error("The server does not answer. Start the command again; no answer is lost.");
  });
  const answer = await response.json();
  if (!response.ok) throw Error(answer.error);
  return answer;
}

function alarm(text) {
  $("alert").textContent = text;
  $("alert").hidden = !text;
}

function inTurn(task) {
  last = last.then(task).then((state) => { show(state); alarm(""); }).catch(async (error) => {
    alarm(error.message);
    show(await ask("question")); // what the server has now
  }).catch(() => {});
}

function choose(dimension, side) {
  const asked = question.id;
  inTurn(() => {
    if (asked !== question.id) return question; // the key was meant for the pair before
    dimension ??= openRow();
    return ask("answer", {question: asked, dimension, side, swapped});
  });
}

const openRow = () => Object.keys(KEYS).find((name) => !question.answers[name]);

function show(state) {
  const isNew = state.id !== question.id;
  question = state;
  $("work").hidden = !state.id;
  $("end").hidden = Boolean(state.id);
  $("progress").max = state.count;
  $("progress").value = state.count - state.open;
  const seconds = state.seconds ? `, ${state.seconds.toFixed(1)} seconds a pair` : "";
  $("left").textContent = `${state.open} of ${state.count} left${seconds}`;
  if (!state.id) {
    clips.forEach((clip) => clip.removeAttribute("src"));
    $("file").textContent = state.file;
    ask("report").then(({lines}) => { $("report").textContent = lines.join("\n"); }, (e) => alarm(e.message));
    return;
  }
  $("prompt").textContent = state.prompt;
  if (isNew) {
    swapped = false;
    clips.forEach((clip, i) => { clip.src = `clip?question=${state.id}&side=${SIDES[2 * i]}`; });
  }
  paint();
}

function paint() {
  $("stage").classList.toggle("swapped", swapped);
  for (const button of document.querySelectorAll(".row button")) {
    const {dimension, side} = button.dataset;
    const answer = question.answers[dimension];
    button.setAttribute("aria-pressed", side === (swapped ? FLIP[answer] : answer));
    button.parentElement.classList.toggle("on", dimension === openRow());
  }
}

// ---- The clips, in step

const over = (clip) => clip.ended || clip.error;

function step() {
  if (question.id && clips.every((clip) => clip.error || clip.readyState > 1)) {
    if (!paused && clips.every(over)) clips.forEach((clip) => { clip.currentTime = 0; });
    for (const clip of clips) {
      if (paused) clip.pause();
      else if (clip.paused && !over(clip)) clip.play().catch(() => {});
    }
    const [a, b] = clips;
    const apart = Math.abs(a.currentTime - b.currentTime) > 0.1;
    if (apart && !clips.some(over)) b.currentTime = a.currentTime;
  }
  requestAnimationFrame(step);
}

function showFrame(change) {
  paused = true;
  const frames = Math.round(Math.max(...clips.map((clip) => clip.duration || 0)) * question.fps) || 1;
  const now = Math.floor(Math.max(...clips.map((clip) => clip.currentTime)) * question.fps);
  const frame = (Math.min(now, frames - 1) + change + frames) % frames;
  clips.forEach((clip) => { clip.currentTime = (frame + 0.5) / question.fps; });
}

// ---- Keys and buttons

const ACTIONS = {
  " ": () => { paused = !paused; },
  ",": () => showFrame(-1),
  ".": () => showFrame(1),
  "?": () => $("keys").showModal(),
  Tab: () => { swapped = !swapped; paint(); },
  Backspace: () => inTurn(() => ask("undo", {question: question.id})),
};

document.addEventListener("keydown", (event) => {
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const dimension = Object.keys(KEYS).find((name) => KEYS[name].includes(key));
  const known = key in ACTIONS || dimension && question.id;
  if (!known || $("keys").open || event.ctrlKey || event.metaKey || event.altKey) return;
  if (key === "Tab" && event.shiftKey) return; // walks through the buttons
  event.preventDefault();
  if (key in ACTIONS) ACTIONS[key]();
  else choose(key === "i" ? null : dimension, SIDES[KEYS[dimension].indexOf(key)]);
});

for (const [name, keys] of Object.entries(KEYS)) {
  const buttons = SIDES.map((side, i) =>
    `<button data-dimension="${name}" data-side="${side}">${side} <kbd>${keys[i]}</kbd></button>`);
  const row = `<div class="row" role="group" aria-label="${name}"><b>${name}</b>${buttons.join("")}</div>`;
  $("rows").insertAdjacentHTML("beforeend", row);
}
$("rows").addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  choose(button.dataset.dimension, button.dataset.side);
  if (event.detail) button.blur(); // after a mouse, so that the space bar pauses
});
$("help").addEventListener("click", ACTIONS["?"]);
for (const clip of clips) {
  clip.addEventListener("error", () => alarm("A clip cannot be played here; i says invalid."));
}
inTurn(() => ask("question"));
step();
