// What every page does; each part looks for its own elements and does nothing where there are none.
import { examples } from "./examples.js";
import { feature } from "./feature.js";
import { review } from "./review.js";

function theme() {
  document.getElementById("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    localStorage.setItem("theme", root.dataset.theme);
  });
}

// The value of whatever has one (data-v), shown beside the pointer; a touch shows it as well.
function tip() {
  const box = document.getElementById("tip");
  const show = (event) => {
    const target = event.target.closest?.("[data-v]");
    box.hidden = !target;
    if (!target) return;
    box.textContent = target.dataset.v;
    const { left, top, bottom, width } = target.getBoundingClientRect();
    const x = Math.min(Math.max(left + width / 2 - box.offsetWidth / 2, 4), innerWidth - box.offsetWidth - 4);
    const above = top - box.offsetHeight - 6;
    box.style.left = `${x}px`;
    box.style.top = `${above > 4 ? above : bottom + 6}px`;
  };
  for (const name of ["mouseover", "focusin", "click"]) document.addEventListener(name, show);
  document.addEventListener("scroll", () => { box.hidden = true; }, { passive: true });
}

// Names that a person types are kept for the next time.
function names() {
  for (const input of document.querySelectorAll("input.who")) {
    if (!input.value && input.form?.id === "propose") input.value = localStorage.getItem("who") ?? "";
    input.addEventListener("change", () => localStorage.setItem("who", input.value));
  }
}

function prompt() {
  for (const button of document.querySelectorAll("button.pick")) {
    button.addEventListener("click", () => {
      for (const other of document.querySelectorAll("button.pick")) {
        const on = other === button && other.getAttribute("aria-expanded") === "false";
        other.setAttribute("aria-expanded", String(on));
        document.getElementById(`token-${other.dataset.token}`).hidden = !on;
      }
    });
  }
}

theme();
tip();
names();
prompt();
examples();
feature();
review();
document.documentElement.dataset.ready = "yes";
