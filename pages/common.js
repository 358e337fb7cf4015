"use strict";
const $ = (id) => document.getElementById(id);

/** Calls the server -> its response; an Error says what is wrong. */
async function call(name, body, signal) {
  const request = {method: "POST", body: JSON.stringify(body), signal};
  const response = await fetch(name, request).catch((error) => {
    const left = "The server does not answer. Start the command again; nothing is lost.";
    throw error.name === "AbortError" ? error : Error(left);
  });
  if (!response.ok) throw Error((await response.json()).error);
  return response;
}

const ask = async (name, body) => (await call(name, body)).json();

function alarm(text) {
  $("alert").textContent = text;
  $("alert").hidden = !text;
}
