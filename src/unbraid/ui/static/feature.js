// A latent's page: try a text, steer, bookmark, propose a label.
import { ask, base, complain, tokens, visible } from "./tokens.js";

export function feature() {
  const head = document.querySelector(".head[data-latent]");
  if (!head) return;
  const latent = Number(head.dataset.latent);
  const here = `${base()}/latents/${latent}`;
  bookmark(latent);
  propose(here);
  if (document.getElementById("try-form")) {
    tryText(here, Number(head.dataset.max));
    strength();
    steer(latent);
  }
}

function bookmark(latent) {
  const button = document.getElementById("bookmark");
  button.addEventListener("click", async () => {
    const keep = button.getAttribute("aria-pressed") !== "true";
    await ask(`${base()}/lists/bookmarks`, { latent, keep });
    button.setAttribute("aria-pressed", String(keep));
    button.textContent = keep ? "★ Bookmarked" : "☆ Bookmark";
  });
}

function propose(here) {
  document.getElementById("propose").addEventListener("submit", async (event) => {
    event.preventDefault();
    const [text, by] = ["propose-text", "propose-by"].map((id) => document.getElementById(id));
    try {
      await ask(`${here}/labels`, { text: text.value, by: by.value });
      location.reload();
    } catch (error) {
      text.setCustomValidity(error.message);
      text.reportValidity();
      text.addEventListener("input", () => text.setCustomValidity(""), { once: true });
    }
  });
}

function tryText(here, max) {
  const problem = document.getElementById("try-problem");
  const result = document.getElementById("try-result");
  document.getElementById("try-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    await complain(problem, async () => {
      const text = document.getElementById("try-text").value;
      const record = await (await ask(`${here}/activations`, { text })).json();
      const note = document.createElement("small");
      note.textContent = record.max > 0 ? ` largest ${record.max.toFixed(3)}` : " it does not fire on this text";
      result.replaceChildren(...tokens(record, Math.max(max, record.max)), note);
    });
  });
}

// The slider is logarithmic in the strength over the largest activation; the sign is the number's.
function strength() {
  const [slider, input] = ["strength-slider", "strength"].map((id) => document.getElementById(id));
  const max = Number(slider.dataset.max) || 1;
  const follow = () => { slider.value = Math.log10(Math.max(Math.abs(Number(input.value)) / max, 1e-9)); };
  slider.addEventListener("input", () => {
    const sign = Number(input.value) < 0 ? -1 : 1;
    input.value = (sign * max * 10 ** Number(slider.value)).toPrecision(4);
  });
  input.addEventListener("input", follow);
  follow();
}

function steer(latent) {
  const get = (id) => document.getElementById(id);
  const button = get("steer");
  let stop = null;
  button.addEventListener("click", async () => {
    if (stop) {
      stop.abort();
      return;
    }
    stop = new AbortController();
    button.textContent = "Stop";
    get("steered").hidden = false;
    for (const name of ["default", "steered"]) get(`reply-${name}`).textContent = "";
    get("steer-proof").textContent = "";
    await complain(get("try-problem"), async () => {
      const body = {
        prompt: get("try-text").value,
        features: [{ latent, strength: Number(get("strength").value) }],
        method: get("method").value,
        new_tokens: Number(get("new-tokens").value),
        seed: Number(get("seed").value),
      };
      await stream(`${base()}/steer`, body, stop.signal, get);
    });
    stop = null;
    button.textContent = "Steer";
  });
}

async function stream(path, body, signal, get) {
  const headers = { "Content-Type": "application/json" };
  let answer;
  try {
    answer = await fetch(path, { method: "POST", headers, body: JSON.stringify(body), signal });
    if (!answer.ok) throw new Error((await answer.json()).error);
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) show(JSON.parse(line), get);
    }
  } catch (error) {
    if (error.name !== "AbortError") throw error;
  }
}

function show(line, get) {
  if (line.error) throw new Error(line.error);
  get(`reply-${line.condition}`).textContent = visible(line.text);
  if (line.done && line.condition === "steered") {
    const said = line.edits.map((e) => `${e.name}: fired at ${e.fired} of ${e.considered} tokens`);
    get("steer-proof").textContent = `Proof: ${said.join("; ")}.`;
  }
}
