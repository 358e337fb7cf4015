"use strict";
const $ = (id) => document.getElementById(id);
const alarm = (text) => { $("alert").textContent = text; };

/** Calls the server -> its response; an Error says what is wrong. */
async function call(name, settings = {}, signal) {
  const address = `${name}?${new URLSearchParams(settings)}`;
  const response = await fetch(address, {method: "POST", signal});
  if (!response.ok) throw Error((await response.json()).error);
  return response;
}

const ask = async (name, settings) => (await call(name, settings)).json();

addEventListener("unhandledrejection", ({reason}) => {
  if (reason.name !== "AbortError") alarm(reason.message);
});
