// How much of each example is shown, which groups, and whether line breaks break lines.
import { ask, base, span } from "./tokens.js";

export function examples() {
  for (const box of document.querySelectorAll(".examples")) {
    const settings = { view: "snippet", groups: "interval", breaks: "off", ...JSON.parse(localStorage.getItem("examples") ?? "{}") };
    const apply = () => {
      Object.assign(box.dataset, settings);
      if (settings.view === "full") for (const row of box.querySelectorAll(".example")) watcher.observe(row);
      else watcher.disconnect();
    };
    // What is not looked at is not fetched.
    const watcher = new IntersectionObserver((entries) => {
      for (const entry of entries) if (entry.isIntersecting && settings.view === "full") open(entry.target);
    }, { rootMargin: "600px" });
    for (const input of box.querySelectorAll(".toggles input")) {
      if (input.type === "checkbox") input.checked = settings.breaks === "on";
      else input.checked = settings[input.name] === input.value;
      input.addEventListener("change", () => {
        settings[input.name] = input.type === "checkbox" ? (input.checked ? "on" : "off") : input.value;
        localStorage.setItem("examples", JSON.stringify(settings));
        apply();
      });
    }
    box.addEventListener("click", (event) => {
      const row = event.target.closest(".example");
      if (row && event.target.closest(".expand, .tokens")) toggle(row);
    });
    apply();
  }
}

async function toggle(row) {
  const wide = !row.classList.contains("wide-open");
  row.classList.toggle("wide-open", wide);
  row.querySelector(".expand").setAttribute("aria-expanded", String(wide));
  if (wide) await open(row);
}

// Fetch the tokens further away, once.
async function open(row) {
  if (row.dataset.full) return;
  row.dataset.full = "asked";
  const latent = row.closest(".examples").dataset.latentOf;
  const path = `${base()}/latents/${latent}/context?passage=${row.dataset.passage}&position=${row.dataset.position}`;
  const full = document.createElement("p");
  full.className = "tokens full";
  full.dir = "auto";
  try {
    const record = await (await ask(path)).json();
    record.tokens.forEach((token, i) => full.append(span(token, record.activations[i], record.max)));
    const note = document.createElement("small");
    note.textContent = `document ${record.document}, from token ${record.start}`;
    full.append(note);
  } catch (error) {
    full.textContent = error.message;
  }
  row.append(full);
  row.dataset.full = "yes";
}
